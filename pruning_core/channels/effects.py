"""To first order: how the loss of one example after another changes as a channel becomes zero where it is read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from pruning_core.channels.weights import UnitScores
from pruning_core.criteria import Criterion, fold_lines
from pruning_core.graph import ChannelGraph
from pruning_core.graph.trace.labels import Axis

FORWARDS = frozenset(
    kind.forward
    for kind in (
        *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
        *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    )
)

MOST_ROWS = 256
"""So many examples of a batch are kept apart: each takes eight bytes for each unit."""


class Effects:
    """Sums ``w g`` over all that reads a unit: by example where a convolution or a linear layer reads it, whose input
    and its gradient say it, elsewhere by batch, from the weight and its gradient.

    A unit that no weight reads has the sum over the weights that make it. A context manager: hooks watch the layers.
    """

    def __init__(self, graph: ChannelGraph, axes: Iterable[Axis]) -> None:
        self.graph, self.units = graph, torch.from_numpy(graph.components.of_label)
        self.count = int(self.units.max()) + 1
        self.total, self.scored = (torch.zeros(self.count, dtype=kind) for kind in (torch.float64, torch.bool))
        self._examples: dict[int, Tensor] = {}
        self._hooks: list[Any] = []
        axes = list(axes)
        reading = [axis for axis in axes if axis in graph.consumers and graph.stored.names[axis.tensor].dim() > 1]
        read = {int(unit) for axis in reading for unit in self._units_of(axis)}
        making = [axis for axis in axes if read.isdisjoint(self._units_of(axis).tolist())]
        self._watched = {axis: each for axis in reading if (each := _reader(graph, axis)) is not None}
        self._by_weight = [axis for axis in (*reading, *making) if axis not in self._watched]

    def _units_of(self, axis: Axis) -> Tensor:
        return self.units[self.graph.labels.axes[axis].long()]

    def __enter__(self) -> Effects:
        for axis, (module, dim) in self._watched.items():
            hook = self._watch(self._units_of(axis), dim)
            self._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _watch(self, units: Tensor, dim: int) -> Any:
        def watch(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return None
            given = args[0] if args else kwargs["input"]
            # The gradient of this view is that of this reader alone.
            seen = given.view_as(given) if given.requires_grad else given.detach().requires_grad_()
            seen.register_hook(lambda gradient: self._add(units, dim, seen.detach(), gradient))
            return ((seen, *args[1:]), kwargs) if args else (args, {**kwargs, "input": seen})

        return watch

    def _add(self, units: Tensor, dim: int, x: Tensor, gradient: Tensor) -> None:
        """One row of sums for each example: the first dimension, unless channels lie there."""
        product = x * gradient if x.dtype in (torch.float32, torch.float64) else x.float() * gradient.float()
        rows = product.movedim(dim, -1)
        rows = rows.reshape(rows.shape[0] if rows.dim() > 1 else 1, -1, rows.shape[-1])
        self._note(units, rows.sum(1, dtype=torch.float64).cpu())

    def _note(self, units: Tensor, rows: Tensor) -> None:
        if len(rows) > MOST_ROWS:  # flattened words or regions: neighbours are of one example
            rows = torch.stack([some.sum(0) for some in rows.tensor_split(MOST_ROWS)])
        sums = self._examples.setdefault(len(rows), torch.zeros(len(rows), self.count, dtype=torch.float64))
        sums.index_add_(1, units, rows)
        self.scored[units] = True

    def add(self, criterion: Criterion, gradients: dict[str, Tensor]) -> None:
        """Adds one batch, after its backward pass."""
        for axis in self._by_weight:
            if axis.tensor in gradients:
                weight = self.graph.stored.names[axis.tensor].detach().double()
                score = criterion.score(weight, gradients[axis.tensor].double())
                self._note(self._units_of(axis), fold_lines(score, axis.dim).sum(1)[None].cpu())
        for sums in self._examples.values():
            self.total += criterion.each_example(sums).sum(0)
        self._examples.clear()

    def scores(self, batches: int) -> UnitScores:
        """Of all batches."""
        return UnitScores((self.total / batches).numpy(), self.scored.numpy())


def _reader(graph: ChannelGraph, axis: Axis) -> tuple[nn.Module, int] | None:
    """The layer whose input has its channels, one by one, along this axis of its weight, and where they are there."""
    path, _, name = axis.tensor.rpartition(".")
    module = graph.model.get_submodule(path)
    if name != "weight" or module._parameters.get("weight") is not graph.stored.names[axis.tensor]:
        return None
    if type(module).forward not in FORWARDS:  # of a subclass the input may be something else
        return None
    if isinstance(module, nn.Linear) and axis.dim == 1:
        return module, -1
    if isinstance(module, _ConvNd) and module.groups == 1:
        turned = isinstance(module, _ConvTransposeNd)
        return (module, 1 - module.weight.dim()) if axis.dim == (0 if turned else 1) else None
    return None
