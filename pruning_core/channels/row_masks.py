"""Masks of whole rows of a weight and its bias, and the channels that they remove."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils import parametrize

from pruning_core.graph import ChannelGraph, ChannelGroup, GraphError
from pruning_core.graph.trace.labels import Axis

SHOWN = 4


class FakeStructuredSparsity(nn.Module):
    """A parametrization under which rows whose ``mask`` is False read as zero."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, tensor: Tensor) -> Tensor:
        return zero_rows(tensor, self.mask)


def zero_rows(tensor: Tensor, mask: Tensor) -> Tensor:
    """A copy with the rows whose mask is False set to zero."""
    return tensor.masked_fill(~mask.view(-1, *[1] * (tensor.dim() - 1)), 0)


class RowMask:
    """One configured tensor under its mask. The Parameter objects, and their order, outlive the mask."""

    def __init__(
        self,
        fqn: str,
        module: nn.Module,
        name: str,
        prune_bias: bool,
        mask: Tensor | None = None,
        parametrization: Callable[[Tensor], nn.Module] = FakeStructuredSparsity,
    ) -> None:
        self.fqn, self.module, self.name, self.prune_bias = fqn, module, name, prune_bias
        self.order: list[str] = []
        self.under = [name]
        rows, bias = self.tensor.shape[:1], module._parameters.get("bias")
        beside = name == "weight" and not isinstance(module, _ConvTransposeNd)  # whose rows are inputs
        if prune_bias and beside and bias is not None and bias.shape == rows:
            self.under.append("bias")
        ones = torch.ones(rows, dtype=torch.bool, device=self.tensor.device)
        self.fake = parametrization(ones if mask is None else mask.to(ones.device))
        self.check()

    @property
    def tensor(self) -> Tensor:
        """As it is without the mask."""
        tensor = self.module._parameters.get(self.name)
        return self.module.get_parameter(f"parametrizations.{self.name}.original") if tensor is None else tensor

    @property
    def mask(self) -> Tensor:
        """Bool (rows,): True = kept."""
        return self.fake.mask  # type: ignore[return-value]

    def attach(self) -> None:
        """Puts the mask on as a parametrization."""
        self.order = list(self.module._parameters)
        for name in self.under:
            parametrize.register_parametrization(self.module, name, self.fake)

    def detach(self) -> None:
        """Removes the parametrization; Parameter objects and their order are as before."""
        for name in self.under:
            parametrize.remove_parametrizations(self.module, name, leave_parametrized=False)
        parameters = self.module._parameters
        for name in self.order:
            parameters[name] = parameters.pop(name)

    def settle(self, undo: ExitStack) -> None:
        """Writes what the parametrization computes, with zero rows, into the parameters themselves."""
        for name in self.under:
            tensor = self.module._parameters[name]
            assert tensor is not None
            undo.callback(setattr, tensor, "data", tensor.data)
            with torch.no_grad():
                tensor.data = zero_rows(self.fake(tensor.data), self.mask)

    def check(self) -> None:
        """ValueError for a mask that ``update_mask`` left with a wrong shape, dtype or no row."""
        mask = self.mask
        if mask.dtype != torch.bool or mask.shape != self.tensor.shape[:1]:
            raise ValueError(
                f"{self.fqn}: its mask must be boolean, one value for each of {len(self.tensor)} rows, got "
                f"{mask.dtype} of shape {tuple(mask.shape)}; write into the mask in place"
            )


@dataclass
class Chosen:
    """Channels that go, by group; those of them that had no ``prune_bias``; how many masked rows stay, and why."""

    removed: dict[str, list[int]] = field(default_factory=dict)
    stay: Counter[str] = field(default_factory=Counter)
    with_constants: dict[str, list[int]] = field(default_factory=dict)
    padded: Counter[str] = field(default_factory=Counter)
    """Masked rows that stay because a consumer pads its input, by the names of both."""

    def keep(self, graph: ChannelGraph, axis: Axis) -> None:
        """Leaves in place what the consumer with this axis reads, and what must stay of one size with it."""
        before, names = self.removed, [name for name in self.with_constants if axis in graph.groups[name].axes]
        self.removed = graph.restored({name: at for name, at in before.items() if name not in names})
        for name, at in before.items():
            if stay := len(at) - len(self.removed.get(name, ())):
                made = next(each.tensor for each in graph.groups[name].axes if each not in graph.consumers)
                self.padded[f"{made}, which {axis.tensor.rpartition('.')[0]} pads"] += stay
        self.with_constants = {name: at for name, at in self.removed.items() if name in self.with_constants}


def choose(graph: ChannelGraph, masks: list[RowMask]) -> Chosen:
    """A channel goes when every configured tensor that holds it masks all its rows of it."""
    names = {id(tensor): name for name, tensor in graph.stored.names.items()}
    known = {Axis(names[id(mask.tensor)], 0): mask for mask in masks if id(mask.tensor) in names}
    dead = {axis: (~mask.mask).cpu().tolist() for axis, mask in known.items()}
    for axis, mask in known.items():
        _refuse_frozen(graph, axis, mask.fqn, dead[axis])
    chosen = Chosen()
    agreed = {
        group.name: [i for i in range(len(group)) if (rows := _rows(group, i, dead)) and all(rows)]
        for group in graph.groups.values()
    }
    chosen.removed = graph.restored({name: at for name, at in agreed.items() if at})
    for group in graph.groups.values():
        gone = set(chosen.removed.get(group.name, ()))
        for i in range(len(group)):
            if i not in gone and any(_rows(group, i, dead)):
                chosen.stay[_names(group, i, known, dead)] += sum(_rows(group, i, dead))
        if gone and any(axis in known and not known[axis].prune_bias for axis in group.axes):
            chosen.with_constants[group.name] = sorted(gone)
    return chosen


def _rows(group: ChannelGroup, i: int, dead: Mapping[Axis, list[bool]]) -> list[bool]:
    """Of each row of a channel in configured tensors whether it is masked."""
    return [dead[axis][row] for axis, rows in group.slices[i].items() if axis in dead for row in rows]


def _names(group: ChannelGroup, i: int, known: Mapping[Axis, RowMask], dead: Mapping[Axis, list[bool]]) -> str:
    held = [(known[axis].fqn, dead[axis][row]) for axis, at in group.slices[i].items() if axis in known for row in at]
    gone = list(dict.fromkeys(fqn for fqn, masked in held if masked))
    kept = list(dict.fromkeys(fqn for fqn, masked in held if not masked))
    beside = f"kept rows of {_some(kept)}" if kept else "pieces that must stay of one size"
    return f"{_some(gone)} with {beside}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _refuse_frozen(graph: ChannelGraph, axis: Axis, fqn: str, dead: list[bool]) -> None:
    if all(dead):
        raise GraphError(f"{fqn}: its mask prunes every row, got {len(dead)} of {len(dead)}; keep one at least")
    units = graph.components.of_label[graph.labels.axes[axis].numpy()]
    stuck = [row for row, gone in enumerate(dead) if gone and int(units[row]) not in graph.where]
    if stuck:
        unit = int(units[stuck[0]])
        unused = "no operation uses it on these inputs" if graph.components.fixed(unit) else "no row is coupled like it"
        raise GraphError(
            f"{fqn}: masked rows cannot be removed ({graph.components.reasons.get(unit) or unused}), got {len(stuck)} "
            f"such rows, the first is {stuck[0]}; keep them or leave the layer out of the config"
        )
