"""Asked and reached sparsity per layer, counted from the weights, of a live run or of a saved model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pruning_core.checkpoint import unpack_bits
from pruning_core.masks.config import WeightPruningConfig
from pruning_core.masks.groups import MaskGroup
from pruning_core.masks.options import LOCK, PrunerOptions
from pruning_core.masks.sharding import local, shard_groups
from pruning_core.report import Bars, Report, plain, text_table
from pruning_core.selection import Skipped, Target, family, kind_of, split_key

NO_GRADIENT = "no gradient came"
COLUMNS = ("layer", "type", "shape", "pattern", "asked", "reached", "zeros", "why")


class _Counted:
    """``reached = zeros / weights``."""

    zeros: int
    weights: int

    @property
    def reached(self) -> float:
        """The share of zeros, in [0, 1]."""
        return self.zeros / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class LayerSparsity(_Counted):
    """One weight. ``asked`` is None where no sparsity is asked for; ``note`` says why a layer is left dense."""

    name: str
    kind: str
    shape: tuple[int, ...]
    weights: int
    zeros: int
    pattern: str | None = None
    asked: float | None = None
    note: str = ""

    def cells(self) -> tuple[str, ...]:
        """The row of the printed table, one string per column."""
        shape = "x".join(str(length) for length in self.shape)
        asked = "" if self.asked is None else f"{self.asked:.2%}"
        numbers = f"{self.reached:.2%}", f"{self.zeros:,}"
        return self.name, self.kind, shape, self.pattern or "", asked, *numbers, self.note


@dataclass(frozen=True)
class PrunerSparsity(_Counted):
    """One pruner: the sparsity it asks for at its end (``target``) and now (``asked``), and its layers."""

    title: str
    target: float
    asked: float
    layers: tuple[LayerSparsity, ...]

    @property
    def weights(self) -> int:  # type: ignore[override]
        """Number of weights of all layers."""
        return sum(layer.weights for layer in self.layers)

    @property
    def zeros(self) -> int:  # type: ignore[override]
        """Number of zeros of all layers."""
        return sum(layer.zeros for layer in self.layers)


@dataclass(frozen=True)
class SparsityReport(Report):
    """Sparsity per layer: ``print(report)``, ``to_dict``, ``save_json``, ``save_markdown``, ``plot``.

    ``groups``: one per pruner of the configuration. ``dense``: the weights that no pruner took, with the reason.
    ``others``: parameters of no selected type, by the class of their layer (of a saved model all under ""). The whole
    model is counted by ``parameters`` and ``zeros``. ``step`` is None for a saved model without a pruner's state.
    """

    step: int | None
    groups: tuple[PrunerSparsity, ...]
    dense: tuple[LayerSparsity, ...]
    parameters: int
    zeros: int
    metrics: dict[str, Any] = field(default_factory=dict)
    others: dict[str, int] = field(default_factory=dict)

    title = "Pruning report"

    @property
    def sparsity(self) -> float:
        """The share of zeros among all parameters of the model, biases and embeddings included."""
        return self.zeros / self.parameters if self.parameters else 0.0

    @property
    def reached(self) -> float:
        """The share of zeros among the weights that take part."""
        weights = sum(group.weights for group in self.groups)
        return sum(group.zeros for group in self.groups) / weights if weights else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data; shares are in [0, 1]."""
        groups = []
        for group in self.groups:
            layers = [{**asdict(layer), "reached": layer.reached} for layer in group.layers]
            groups.append({**asdict(group), "layers": layers, "reached": group.reached})
        return {
            "step": self.step,
            "sparsity": self.sparsity,
            "parameters": self.parameters,
            "zeros": self.zeros,
            "metrics": plain(self.metrics),
            "groups": groups,
            "dense": [{**asdict(layer), "reached": layer.reached} for layer in self.dense],
            "others": self.others,
        }

    def __str__(self) -> str:
        lines = [] if self.step is None else [f"step {self.step}"]
        for group in self.groups:
            now = f"asked {group.asked:.2%}"
            if group.asked != group.target:
                now += f" now, {group.target:.2%} at the end"
            zeros = f"{group.zeros:,} of {group.weights:,} weights are zero"
            lines += [group.title, f"  {now}, reached {group.reached:.2%}: {zeros}", _table(group.layers)]
        if self.dense:
            lines += ["left dense" if self.groups else "weights", _table(self.dense)]
        if self.others:
            counts = ", ".join(f"{kind} {count:,}" for kind, count in self.others.items() if kind)
            total = f"no part in pruning: {sum(self.others.values()):,} parameters"
            lines.append(f"{total} ({counts})" if counts else total)
        lines.append(f"model: {self.zeros:,} of {self.parameters:,} parameters are zero, {self.sparsity:.2%}")
        if self.metrics:
            lines.append("metric: " + ", ".join(f"{name} {value}" for name, value in self.metrics.items()))
        return "\n".join(lines)

    def draw(self, bars: Bars) -> None:
        """A bar per layer at the sparsity reached, and a line at the sparsity asked of its pruner."""
        rows = [layer for group in self.groups for layer in group.layers] + list(self.dense)
        bars.names, bars.notes = [row.name for row in rows], [f"{row.reached:.1%}" for row in rows]
        bars.shares, bars.heading = True, f"{self.sparsity:.1%} of {self.parameters:,} parameters are zero"
        bars.add(0, [1] * len(rows), "0.95")
        first = 0
        for i, group in enumerate(self.groups):
            label = f"{group.title}; asked {group.asked:.1%} (line)"
            bars.add(first, [row.reached for row in group.layers], f"C{i % 9}", label)
            bars.mark(first, len(group.layers), group.asked)
            first += len(group.layers)
        if self.dense:
            bars.add(first, [row.reached for row in self.dense], "0.6", "left dense" if self.groups else "weights")


def _table(layers: Sequence[LayerSparsity]) -> str:
    return text_table(COLUMNS, [layer.cells() for layer in layers], right=("asked", "reached", "zeros"), indent="    ")


def title(where: str, options: PrunerOptions) -> str:
    """A pruner on one line: where it is configured, its criterion, pattern, scope and schedule."""
    if options.kind == LOCK:
        return f"{where}: pattern_lock, today's zeros stay"
    when = f"step {options.start_step}"
    if options.end_step > options.start_step:
        when = f"{options.sparsity_decay_type}, steps {options.start_step} to {options.end_step}"
        when += f" every {options.pruning_frequency}"
    return f"{where}: {options.pruning_type}, {options.pattern}, {options.pruning_scope}, {when}"


def report_of(model: nn.Module, groups: Sequence[MaskGroup], step: int, metrics: Mapping[str, Any]) -> SparsityReport:
    """The report of a live run. Collective under ``fully_shard``: zeros are summed over the ranks."""
    rows = []
    for group in groups:
        share = group.sparsity(step) if group.updated_at >= 0 else 0.0
        counts = torch.stack([weight.zeros() for weight in group.taking_part])
        counts = group.ranks.sum_(counts) if group.ranks else counts
        layers = []
        for weight, zeros in zip(group.taking_part, counts.tolist(), strict=True):
            target = weight.target
            shape, kind = tuple(target.parameter.shape), kind_of(target.module)
            layers.append(LayerSparsity(target.name, kind, shape, weight.weights, zeros, group.options.pattern, share))
        target_share = share if group.options.kind == LOCK else group.options.target_sparsity
        rows.append(PrunerSparsity(title(group.where, group.options), target_share, share, tuple(layers)))
    state = dict(model.named_parameters())
    zeros = sum(_zeros(parameter) for parameter in state.values())
    skipped = [[*group.skipped, *(_without_gradient(weight.target) for weight in group.left_out)] for group in groups]
    dense = _dense({row.name for group in rows for row in group.layers}, skipped, state)
    listed = {id(weight.target.parameter) for group in groups for weight in group.taking_part}  # tied: by another name
    listed |= {id(state[row.name]) for row in dense}
    others = _others(model, {name: each for name, each in state.items() if id(each) not in listed})
    total = sum(parameter.numel() for parameter in state.values())
    return SparsityReport(step, tuple(rows), dense, total, zeros, dict(metrics), others)


def _others(model: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, int]:
    """Number of parameters by what they belong to, most first: biases, or the class of the layer."""
    counts: dict[str, int] = {}
    for name, parameter in parameters.items():
        layer, attribute = split_key(name)
        module = model.get_submodule(layer)
        kind = "biases" if "bias" in attribute and family(module) else kind_of(module)
        counts[kind] = counts.get(kind, 0) + parameter.numel()
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _without_gradient(target: Target) -> Skipped:
    return Skipped(target.layer, kind_of(target.module), NO_GRADIENT)


def report_of_saved(model: Mapping[str, Any], pruner: Mapping[str, Any] | None) -> SparsityReport:
    """The report of a state dict and, when there is one, of the state of its pruner."""
    state = _parameters(model)
    rows, skipped = [], []
    for i, (options, group) in enumerate(_groups(pruner)):
        asked = _asked(options, group)
        names = [name for name in group["weights"] if name in state and name not in group["left_out"]]
        layers = tuple(
            LayerSparsity(n, "", tuple(state[n].shape), state[n].numel(), _zeros(state[n]), options.pattern, asked)
            for n in names
        )
        target = options.target_sparsity if asked is not None and options.kind != LOCK else asked
        rows.append(PrunerSparsity(title(f"pruning_configs[{i}]", options), target or 0.0, asked or 0.0, layers))
        left_out = [Skipped(split_key(name)[0], "", NO_GRADIENT) for name in group["left_out"]]
        skipped.append([*(Skipped(*each) for each in group["skipped"]), *left_out])
    dense = _dense({row.name for group in rows for row in group.layers}, skipped, state, everything=not rows)
    step = min(clock["now"] for clock in pruner["clocks"]) if pruner else None
    once = _once(state)
    zeros, total = sum(_zeros(value) for value in once.values()), sum(value.numel() for value in once.values())
    rest = total - sum(layer.weights for layer in (*dense, *(each for group in rows for each in group.layers)))
    others = {"": rest} if rows and rest > 0 else {}  # a state dict does not say which layer a name belongs to
    return SparsityReport(step, tuple(rows), dense, total, zeros, others=others)


def _parameters(model: Mapping[str, Any]) -> dict[str, Tensor]:
    """The floating-point tensors of a state dict, without the running statistics of norms."""
    floats = {name: value for name, value in model.items() if isinstance(value, Tensor) and value.is_floating_point()}
    return {name: value for name, value in floats.items() if not name.endswith(("running_mean", "running_var"))}


def _once(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tied weights once, under the first of their names, as in ``named_parameters``."""
    first: dict[Any, str] = {}
    for name, value in state.items():
        here = local(value)
        memory = (here.data_ptr(), here.stride()) if here.layout == torch.strided and here.data_ptr() else name
        first.setdefault((memory, value.shape), name)
    return {name: state[name] for name in first.values()}


def _groups(pruner: Mapping[str, Any] | None) -> list[tuple[PrunerOptions, Any]]:
    if pruner is None:
        return []
    return list(zip(WeightPruningConfig(dict(pruner["config"])).pruners, pruner["groups"], strict=True))


def _asked(options: PrunerOptions, group: Mapping[str, Any]) -> float:
    if options.kind == LOCK:
        sizes = [(each["keep"].numpy(), torch.Size(each["shape"]).numel()) for each in group["weights"].values()]
        kept, total = sum(int(unpack_bits(*each).sum()) for each in sizes), sum(size for _, size in sizes)
        return (total - kept) / total if total else 0.0
    return options.timetable.sparsity(group["updated_at"]) if group["updated_at"] >= 0 else 0.0


def _zeros(tensor: Tensor) -> int:
    here = local(tensor.detach())
    zeros = here.numel() - torch.count_nonzero(here)
    for group in shard_groups(tensor):
        zeros = group.sum_(zeros)
    return int(zeros)


def _dense(
    pruned: set[str], skipped: Sequence[Sequence[Skipped]], state: Mapping[str, Tensor], everything: bool = False
) -> tuple[LayerSparsity, ...]:
    """The weights that no pruner took, each with the reason of the last pruner that considered it."""
    reasons = {each.layer: each for group in skipped for each in group if each.reason}
    rows = []
    for name, tensor in state.items():
        layer, attribute = split_key(name)
        if name in pruned or tensor.dim() < 2 or not (everything or layer in reasons):
            continue
        each = reasons.get(layer, Skipped(layer, "", ""))
        if "weight" in attribute:
            row = LayerSparsity(name, each.kind, tuple(tensor.shape), tensor.numel(), _zeros(tensor), note=each.reason)
            rows.append(row)
    return tuple(rows)
