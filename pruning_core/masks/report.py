"""The report of a live pruning run, and of one that was saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pruning_core.config import WeightPruningConfig
from pruning_core.masks.basic import MaskGroup
from pruning_core.options import LOCK, PrunerOptions
from pruning_core.report import GroupRow, LayerRow, Report
from pruning_core.selection import Spared, kind_of
from pruning_core.sharding import local, shard_groups


def title(where: str, options: PrunerOptions) -> str:
    if options.kind == LOCK:
        return f"{where}: pattern_lock, today's zeros stay"
    when = f"step {options.start_step}"
    if options.end_step > options.start_step:
        when = f"{options.sparsity_decay_type}, steps {options.start_step} to {options.end_step}"
        when += f" every {options.pruning_frequency}"
    return f"{where}: {options.pruning_type}, {options.pattern}, {options.pruning_scope}, {when}"


def report_of(model: nn.Module, groups: Sequence[MaskGroup], step: int, metrics: Mapping[str, Any]) -> Report:
    """Under ``fully_shard`` every rank must ask for it: zeros are summed over the ranks."""
    rows = []
    for group in groups:
        share = group.share(step) if group.updated_at >= 0 else 0.0
        counts = torch.stack([weight.zeros() for weight in group.weights])
        counts = group.ranks.sum_(counts) if group.ranks else counts
        layers = []
        for weight, zeros in zip(group.weights, counts.tolist(), strict=True):
            target = weight.target
            shape, kind = tuple(target.parameter.shape), kind_of(target.module)
            layers.append(LayerRow(target.name, kind, shape, weight.weights, zeros, group.options.pattern, share))
        target_share = share if group.options.kind == LOCK else group.options.target_sparsity
        rows.append(GroupRow(title(group.where, group.options), target_share, share, tuple(layers)))
    state = dict(model.named_parameters())
    zeros = sum(_zeros(parameter) for parameter in state.values())
    dense = _dense({row.name for group in rows for row in group.layers}, [g.spared for g in groups], state)
    return Report(step, tuple(rows), dense, sum(p.numel() for p in state.values()), zeros, dict(metrics))


def report_of_saved(model: Mapping[str, Any], pruner: Mapping[str, Any] | None) -> Report:
    """From a state dict and, when there is one, the state of its pruner."""
    state = _parameters(model)
    rows, spared = [], []
    for i, (options, group) in enumerate(_groups(pruner)):
        asked = _asked(options, group)
        names = [name for name in group["weights"] if name in state]
        layers = tuple(
            LayerRow(n, "", tuple(state[n].shape), state[n].numel(), _zeros(state[n]), options.pattern, asked)
            for n in names
        )
        target = options.target_sparsity if asked is not None and options.kind != LOCK else asked
        rows.append(GroupRow(title(f"pruning_configs[{i}]", options), target or 0.0, asked or 0.0, layers))
        spared.append([Spared(*each) for each in group["spared"]])
    dense = _dense({row.name for group in rows for row in group.layers}, spared, state, everything=not rows)
    step = min(clock["now"] for clock in pruner["clocks"]) if pruner else None
    once = _once(state)
    zeros = sum(_zeros(value) for value in once.values())
    return Report(step, tuple(rows), dense, sum(value.numel() for value in once.values()), zeros)


def _parameters(model: Mapping[str, Any]) -> dict[str, Tensor]:
    """The floating-point tensors of a state dict without the running statistics of norms, which are no parameters."""
    floats = {name: value for name, value in model.items() if isinstance(value, Tensor) and value.is_floating_point()}
    return {name: value for name, value in floats.items() if not name.endswith(("running_mean", "running_var"))}


def _once(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tied weights under the first of their names only, as ``named_parameters`` has them."""
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
        kept = sum(int(torch.count_nonzero(_bits(each["keep"]))) for each in group["weights"].values())
        total = sum(torch.Size(each["shape"]).numel() for each in group["weights"].values())
        return (total - kept) / total if total else 0.0
    return options.timetable.share(group["updated_at"]) if group["updated_at"] >= 0 else 0.0


def _bits(packed: Tensor) -> Tensor:
    return packed.unsqueeze(-1).bitwise_and(torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8))


def _zeros(tensor: Tensor) -> int:
    here = local(tensor.detach())
    zeros = here.numel() - torch.count_nonzero(here)
    for group in shard_groups(tensor):
        zeros = group.sum_(zeros)
    return int(zeros)


def _dense(
    pruned: set[str], spared: Sequence[Sequence[Spared]], state: Mapping[str, Tensor], everything: bool = False
) -> tuple[LayerRow, ...]:
    """The weights that no pruner took, each with the reason of the last pruner that looked at it."""
    reasons = {each.layer: each for group in spared for each in group if each.reason}
    rows = []
    for name, tensor in state.items():
        layer, _, attribute = name.rpartition(".")
        if name in pruned or tensor.dim() < 2 or not (everything or layer in reasons):
            continue
        each = reasons.get(layer, Spared(layer, "", ""))
        if "weight" in attribute:
            row = LayerRow(name, each.kind, tuple(tensor.shape), tensor.numel(), _zeros(tensor), note=each.reason)
            rows.append(row)
    return tuple(rows)
