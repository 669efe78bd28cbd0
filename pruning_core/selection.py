"""Selects the weights that take part by layer name and type, and reads each as (G, O, K, I)."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.optim.swa_utils import AveragedModel

from pruning_core.registry import did_you_mean

FAMILIES = ("Conv", "Linear")
CLASSES = (
    *("Linear", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"),
    *("Conv1D", "MultiheadAttention", "NonDynamicallyQuantizableLinear", "LSTM", "GRU", "RNN"),
)
SCRIPTED = "it is TorchScript; prune the model that it was made from, then script"
COMPUTED = "its weight is computed by a parametrization"
NO_PARAMETER = "its weight is not a parameter"
NORMS = ("WeightNorm", "SpectralNorm", "_WeightNorm", "_SpectralNorm")
"""Of ``torch.nn.utils``: a zero in the tensor that they normalize is a zero in the weight."""


@dataclass(frozen=True)
class Layout:
    """Reads a stored weight as (G, O, K, I): groups, output channels, kernel positions, input channels.

    ``in_first``: the input channels are the first stored axis (transposed convolutions, ``transformers`` Conv1D).
    """

    groups: int = 1
    in_first: bool = False

    def view(self, weight: Tensor) -> Tensor:
        """``(G*O, I, *kernel)`` or ``(G*I, O, *kernel)`` -> (G, O, K, I); a view where the strides allow one."""
        grouped = weight.flatten(2) if weight.dim() > 2 else weight.unsqueeze(2)
        grouped = grouped.unflatten(0, (self.groups, grouped.shape[0] // self.groups))
        return grouped.permute(0, 2, 3, 1) if self.in_first else grouped.permute(0, 1, 3, 2)

    def store(self, x_GOKI: Tensor, shape: Sequence[int]) -> Tensor:
        """The inverse of ``view``: (G, O, K, I) -> the stored shape."""
        return self.stored_order(x_GOKI).reshape(tuple(shape))

    def stored_order(self, x_GOKI: Tensor) -> Tensor:
        """(G, O, K, I) or a unit grid, permuted to storage order; ties between units are broken in this order."""
        return x_GOKI.permute(0, 3, 1, 2) if self.in_first else x_GOKI.permute(0, 1, 3, 2)

    def from_stored_order(self, x: Tensor) -> Tensor:
        """The inverse of ``stored_order``."""
        return x.permute(0, 2, 3, 1) if self.in_first else x.permute(0, 1, 3, 2)

    def shape(self, stored: Sequence[int]) -> tuple[int, int, int, int]:
        """(G, O, K, I) of a stored shape."""
        first, second = stored[0] // self.groups, stored[1]
        positions = 1
        for length in stored[2:]:
            positions *= length
        out, into = (second, first) if self.in_first else (first, second)
        return self.groups, out, positions, into


@dataclass(frozen=True)
class Target:
    """One weight that takes part: parameter ``attribute`` of the layer that ``named_modules()`` calls ``layer``.

    Where a norm of ``torch.nn.utils`` or ``prune`` computes the weight, this is the parameter that it is made from:
    ``weight_v``, ``weight_orig``, ``parametrizations.weight.original``. ``norm``: the dimension whose slices a norm
    divides by, each by its own length; -1 for the length of all; None without a norm.
    """

    layer: str
    attribute: str
    module: nn.Module
    layout: Layout
    norm: int | None = None

    @property
    def name(self) -> str:
        """The key of the weight in the model's ``state_dict``."""
        return f"{self.layer}.{self.attribute}" if self.layer else self.attribute

    @property
    def parameter(self) -> Tensor:
        """The parameter, read from the module at each access."""
        return self._read(self.module)

    @cached_property
    def _read(self) -> Callable[[nn.Module], Tensor]:
        return attrgetter(self.attribute)

    @property
    def pruned(self) -> Tensor | None:
        """The mask of ``torch.nn.utils.prune`` on this weight, if there is one."""
        if not self.attribute.endswith("_orig"):
            return None
        return getattr(self.module, self.attribute.removesuffix("_orig") + "_mask", None)


@dataclass(frozen=True)
class Skipped:
    """A layer of a selected type that stays dense, and why."""

    layer: str
    kind: str
    reason: str


def is_transformers_conv1d(module: nn.Module) -> bool:
    """Whether this is ``transformers`` Conv1D. Decided by name, so that ``transformers`` need not be installed."""
    return any(c.__name__ == "Conv1D" and c.__module__.startswith("transformers.") for c in type(module).__mro__)


def kind_of(module: nn.Module) -> str:
    """The name of the module's class, without what ``fully_shard``, ``parametrize`` and ``torch.jit`` make of it."""
    if isinstance(module, torch.jit.ScriptModule):
        return getattr(module, "original_name", type(module).__name__)
    first, *others = (each.__name__ for each in type_before_parametrizations(module).__mro__)
    return others[1] if others[0] == "FSDPModule" else first


def family(module: nn.Module) -> str | None:
    """ "Conv" or "Linear"; None for a module of neither, such as an LSTM, which is named by its class."""
    if isinstance(module, torch.jit.ScriptModule):
        kind = kind_of(module)
        return next((name for name in FAMILIES if kind in CLASSES and kind.startswith(name)), None)
    if isinstance(module, nn.modules.conv._ConvNd):
        return "Conv"
    if isinstance(module, nn.Linear | nn.MultiheadAttention) or is_transformers_conv1d(module):
        return "Linear"
    return None


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel, AveragedModel or ``torch.compile``: its own names."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel | AveragedModel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def targets_of(layer: str, module: nn.Module) -> list[Target]:
    """The weights of one layer: one; or three of an attention with separate projections; or all of a recurrent one."""
    if isinstance(module, nn.MultiheadAttention):
        names = ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
        layouts = dict.fromkeys(names, Layout())
        if module._qkv_same_embed_dim:  # query, key and value stacked: no block spans two of them
            layouts = {"in_proj_weight": Layout(groups=3)}
    elif isinstance(module, nn.RNNBase):
        gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
        names = [name for each in module._all_weights for name in each if name.startswith("weight")]
        layouts = {name: Layout(1 if name.startswith("weight_hr") else gates) for name in names}
    elif isinstance(module, nn.modules.conv._ConvNd):
        layouts = {"weight": Layout(module.groups, in_first=module.transposed)}
    else:
        layouts = {"weight": Layout(in_first=is_transformers_conv1d(module))}
    return [
        Target(layer, made, module, layouts[name], norm)
        for name in layouts
        for made, norm in [_made_from(module, name)]
    ]


def _made_from(module: nn.Module, attribute: str) -> tuple[str, int | None]:
    """The parameter in which a zero is a zero of this weight, and ``Target.norm``: mostly the weight itself."""
    parametrizations = getattr(module, "parametrizations", {})
    if attribute in parametrizations and all(_is_norm(each) for each in parametrizations[attribute]):
        found = f"parametrizations.{attribute}.original"
        norm = _norm_of(parametrizations[attribute][0])
        return (found if hasattr(parametrizations[attribute], "original") else f"{found}1"), norm
    hooks: list[Any] = list(module._forward_pre_hooks.values())
    for hook in hooks:
        if isinstance(hook, prune.BasePruningMethod) and hook._tensor_name == attribute:
            return _made_from(module, f"{attribute}_orig")
        if _is_norm(hook) and hook.name == attribute:
            kept = "v" if type(hook).__name__ == "WeightNorm" else "orig"
            return _made_from(module, f"{attribute}_{kept}")[0], _norm_of(hook)
    return attribute, None


def _is_norm(each: object) -> bool:
    return type(each).__name__ in NORMS and type(each).__module__.startswith("torch.nn.utils.")


def _norm_of(norm: Any) -> int:
    """The dimension of a weight norm; -1 where the length of the whole weight divides, as in a spectral norm."""
    return norm.dim if "Weight" in type(norm).__name__ and norm.dim is not None else -1


def split_key(key: str) -> tuple[str, str]:
    """(layer, attribute) of a key of a ``state_dict``; what a parametrization keeps belongs to the layer it is on."""
    made = re.fullmatch(r"(.*?)\.?parametrizations\.(\w+)\.original\d*", key)
    if made:
        return made[1], made[2]
    layer, _, attribute = key.rpartition(".")
    return layer, attribute


def unfit(target: Target) -> str | None:
    """Why a weight cannot be masked in place, or None."""
    if isinstance(target.module, torch.jit.ScriptModule):
        return SCRIPTED
    if target.attribute in getattr(target.module, "parametrizations", {}):
        return COMPUTED
    if "." not in target.attribute and target.attribute not in target.module._parameters:
        return NO_PARAMETER
    if nn.parameter.is_lazy(target.parameter):
        return "its weight has no shape yet; run one forward pass first"
    if not target.parameter.is_floating_point():
        return f"its weight is {target.parameter.dtype}, not floating point"
    if not target.parameter.numel():
        return f"its weight is empty, {tuple(target.parameter.shape)}"
    return None


@dataclass(frozen=True)
class Selector:
    """Selects layers by name and type.

    - ``op_names``: regular expressions (``re.search``) of the layers that take part; empty for all.
    - ``excluded``: regular expressions of the layers that stay dense.
    - ``op_types``: "Conv", "Linear", or class names.
    - ``where``: what error messages begin with, such as ``pruning_configs[0]``.

    >>> targets, skipped = Selector("", [], ["classifier"], ["Linear"]).select(model)
    """

    where: str
    op_names: Sequence[str]
    excluded: Sequence[str]
    op_types: Sequence[str]

    @property
    def prefix(self) -> str:
        """``where`` and a dot, or an empty string."""
        return f"{self.where}." if self.where else ""

    def why_not(self, layer: str) -> str | None:
        """Why a layer of a selected type does not take part, or None."""
        if self.op_names and not any(re.search(pattern, layer) for pattern in self.op_names):
            return "not among op_names"
        hit = next((pattern for pattern in self.excluded if re.search(pattern, layer)), None)
        return None if hit is None else f"excluded by {hit!r}"

    def check(self, model: nn.Module) -> list[tuple[str, nn.Module]]:
        """The candidates. ValueError for a type or name the model lacks; warns of an exclusion that matches nothing."""
        candidates = list(self.candidates(model))
        self._check_types(model)
        self._check_names([layer for layer, _ in candidates])
        self._check_exclusions(model)
        return candidates

    def candidates(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """(name, module) of each layer of a selected type, whatever its name."""
        for layer, module in model.named_modules():
            kind = family(module)
            has_weights = kind is not None or isinstance(module, nn.RNNBase)
            if kind in self.op_types or (has_weights and kind_of(module) in self.op_types):
                yield layer, module

    def select(self, model: nn.Module) -> tuple[list[Target], list[Skipped]]:
        """Targets in ``named_modules()`` order, and the layers of a selected type that stay dense, with reasons."""
        targets: list[Target] = []
        skipped: list[Skipped] = []
        for layer, module in self.check(model):
            why_not = self.why_not(layer)
            if why_not is not None:
                skipped.append(Skipped(layer, kind_of(module), why_not))
                continue
            for target in targets_of(layer, module):
                reason = unfit(target)
                if reason is None:
                    targets.append(target)
                else:
                    self.skip(target, reason, skipped)
        if not targets and not skipped:
            raise ValueError(f"{self.prefix}pruning_op_types: the model has no such layer, got {list(self.op_types)}")
        return targets, skipped

    def skip(self, target: Target, reason: str, skipped: list[Skipped]) -> None:
        """Leaves a layer dense and appends the reason; ValueError where ``op_names`` names the layer explicitly."""
        if self.names_explicitly(target.layer):
            raise ValueError(f"{self.where}: {target.layer} cannot be pruned: {reason}; take it out of op_names")
        if reason in (SCRIPTED, COMPUTED, NO_PARAMETER):  # nothing in the layer's type tells
            where = f"{self.where}: " if self.where else ""
            warnings.warn(f"{where}{target.layer} stays dense: {reason}", stacklevel=2)
        skipped.append(Skipped(target.layer, kind_of(target.module), reason))

    def names_explicitly(self, layer: str) -> bool:
        """Whether an ``op_names`` entry is the whole name of this layer, anchored or not."""
        names = [pattern.lstrip("^").rstrip("$") for pattern in self.op_names]
        return any(layer in (name, re.sub(r"\\(\W)", r"\1", name)) for name in names)

    def _check_types(self, model: nn.Module) -> None:
        present = {kind_of(module) for module in model.modules()}
        prunable = {kind_of(module) for module in model.modules() if family(module)}
        for i, kind in enumerate(self.op_types):
            if kind in FAMILIES or kind in CLASSES or kind in prunable:
                continue
            known = did_you_mean(kind, [*FAMILIES, *sorted({*CLASSES, *prunable})])
            why = "layers of this type cannot be pruned" if kind in present else "unknown layer type"
            raise ValueError(f"{self.prefix}pruning_op_types[{i}]: {why}, got {kind!r}; {known}")

    def _check_names(self, layers: list[str]) -> None:
        for i, pattern in enumerate(self.op_names):
            if not any(re.search(pattern, layer) for layer in layers):
                types = " or ".join(self.op_types)
                hint = did_you_mean(pattern, layers) if layers else "the model has none"
                raise ValueError(f"{self.prefix}op_names[{i}]: matches no {types} layer, got {pattern!r}; {hint}")

    def _check_exclusions(self, model: nn.Module) -> None:
        names = [name for name, _ in model.named_modules()]
        for pattern in self.excluded:
            if not any(re.search(pattern, name) for name in names):
                warnings.warn(f"{self.prefix}excluded_op_names: {pattern!r} matches no layer", stacklevel=2)
