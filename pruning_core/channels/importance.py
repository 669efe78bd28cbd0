"""How much each channel matters: a number for every slice of every tensor that goes with it, added up."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pruning_core.graph import ChannelGraph, GraphError
from pruning_core.graph.labels import Axis
from pruning_core.graph.tracing import still
from pruning_core.registry import Registry

ToLoss = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class Data:
    """Batches, and ``to_loss(model, batch)``; what first-order scores are computed from."""

    batches: Iterable[Any] = ()
    to_loss: ToLoss | None = None


class Importance(ABC):
    """One number for each index of an axis; ``None`` where this axis says nothing."""

    needs_gradients = False

    def __init__(self, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def prepare(self, graph: ChannelGraph, data: Data) -> None:
        """Whatever has to run before the numbers can be given."""
        if self.needs_gradients:
            self.gradients = gradients(graph, data)

    @abstractmethod
    def of(self, graph: ChannelGraph, axis: Axis, tensor: Tensor) -> Tensor | None: ...


IMPORTANCES: Registry[Importance] = Registry("importance")


def _lines(tensor: Tensor, dim: int) -> Tensor:
    return tensor.detach().movedim(dim, 0).reshape(tensor.shape[dim], -1).double()


def is_weight(graph: ChannelGraph, axis: Axis) -> bool:
    """A buffer (a norm's statistics) is sliced along, but says nothing of how much a channel matters."""
    return axis.tensor in graph.parameters


@IMPORTANCES.add("magnitude")
class Magnitude(Importance):
    """Mean of squares over the slice."""

    def of(self, graph: ChannelGraph, axis: Axis, tensor: Tensor) -> Tensor | None:
        return _lines(tensor, axis.dim).square().sum(1) if tensor.dim() > 1 else None


@IMPORTANCES.add("l1")
class L1(Importance):
    def of(self, graph: ChannelGraph, axis: Axis, tensor: Tensor) -> Tensor | None:
        return _lines(tensor, axis.dim).abs().sum(1) if tensor.dim() > 1 else None


@IMPORTANCES.add("bn_scale")
class NormScale(Importance):
    """The scale of the norms behind a channel. Groups without a norm have none and stay."""

    def of(self, graph: ChannelGraph, axis: Axis, tensor: Tensor) -> Tensor | None:
        owner = graph.model.get_submodule(axis.tensor.rpartition(".")[0])
        is_scale = tensor.dim() == 1 and axis.tensor.endswith("weight") and hasattr(owner, "running_mean")
        return tensor.detach().double().abs() if is_scale else None


@IMPORTANCES.add("random")
class Random(Importance):
    def of(self, graph: ChannelGraph, axis: Axis, tensor: Tensor) -> Tensor | None:
        return torch.rand(tensor.shape[axis.dim], generator=self.generator, dtype=torch.float64)


@IMPORTANCES.add("gradient")
class Gradient(Importance):
    needs_gradients = True

    def of(self, graph: ChannelGraph, axis: Axis, tensor: Tensor) -> Tensor | None:
        return sum(_lines(each[axis.tensor], axis.dim).abs().sum(1) for each in self.gradients)  # type: ignore[return-value]


@IMPORTANCES.add("taylor")
class Taylor(Importance):
    """Molchanov et al. 2017: how much the loss changes, to first order, when the slice becomes zero."""

    needs_gradients = True

    def of(self, graph: ChannelGraph, axis: Axis, tensor: Tensor) -> Tensor | None:
        change = [(_lines(tensor, axis.dim) * _lines(each[axis.tensor], axis.dim)).sum(1) for each in self.gradients]
        return torch.stack(change).mean(0).abs()


@IMPORTANCES.add("fisher")
class Fisher(Importance):
    """The same, squared batch by batch: what changes the loss up here and down there matters too."""

    needs_gradients = True

    def of(self, graph: ChannelGraph, axis: Axis, tensor: Tensor) -> Tensor | None:
        change = [(_lines(tensor, axis.dim) * _lines(each[axis.tensor], axis.dim)).sum(1) for each in self.gradients]
        return torch.stack(change).square().mean(0)


@IMPORTANCES.add("geometric_median")
class GeometricMedian(Importance):
    """He et al. 2019: a filter near all others can be replaced by them."""

    def of(self, graph: ChannelGraph, axis: Axis, tensor: Tensor) -> Tensor | None:
        if tensor.dim() < 2 or axis in graph.consumers:
            return None
        lines = _lines(tensor, axis.dim)
        return torch.cdist(lines, lines).sum(1)


@IMPORTANCES.add("activation")
class Activation(Importance):
    """The mean absolute value that the layers behind a channel read."""

    def prepare(self, graph: ChannelGraph, data: Data) -> None:
        to_loss = _needed(data, "activation")
        self._sums = graph.read_values(lambda model: [to_loss(model, batch) for batch in data.batches])

    def of(self, graph: ChannelGraph, axis: Axis, tensor: Tensor) -> Tensor | None:
        """An activation carries the labels of the axis that produced it."""
        values = self._sums[graph.labels.axes[axis].numpy()]
        return torch.from_numpy(values) if values.any() else None


def _needed(data: Data, name: str) -> ToLoss:
    if data.to_loss is None:
        raise GraphError(f"importance: {name} is computed from data, got none; give batches and to_loss")
    return data.to_loss


def gradients(graph: ChannelGraph, data: Data) -> list[dict[str, Tensor]]:
    """The gradients of each batch; the model's own are left as they are."""
    to_loss = _needed(data, "a first-order score")
    found = []
    with own_gradients(graph.model):
        for batch in data.batches:
            graph.model.zero_grad(set_to_none=True)
            loss = to_loss(graph.model, batch)
            loss.sum().backward()
            found.append(
                {
                    name: torch.zeros_like(each) if each.grad is None else each.grad.detach().clone()
                    for name, each in graph.model.named_parameters()
                }
            )
    if not found:
        raise GraphError("importance: batches is empty, got no batch; give at least one")
    return found


@contextlib.contextmanager
def own_gradients(model: nn.Module) -> Iterator[None]:
    """A pass that only looks: gradients and buffers are afterwards what they were."""
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        with still(model):
            yield
    finally:
        for parameter, grad in before:
            parameter.grad = grad


def unit_scores(graph: ChannelGraph, importance: Importance, data: Data) -> dict[int, float]:
    """Of each unit the mean over its slices, then over the mean of its group: groups can be compared.

    A unit that no slice says anything about has no score, and stays.
    """
    importance.prepare(graph, data)
    units = graph.components.of_label
    total, count = np.zeros(units.max() + 1), np.zeros(units.max() + 1)
    tensors = graph.stored.names
    for axis in sorted({axis for group in graph.groups.values() for axis in group.axes}, key=str):
        if not is_weight(graph, axis):
            continue
        each = importance.of(graph, axis, tensors[axis.tensor])
        if each is not None:
            owners = units[graph.labels.axes[axis].numpy()]
            np.add.at(total, owners, each.double().cpu().numpy())
            np.add.at(count, owners, 1)
    scores: dict[int, float] = {}
    for group in graph.groups.values():
        members = [unit for unit in group.members if count[unit]]
        raw = total[members] / count[members]
        mean = raw.mean() if len(raw) and raw.mean() > 0 else 1.0
        scores.update({unit: float(value / mean) for unit, value in zip(members, raw, strict=True)})
    if not all(np.isfinite(list(scores.values()))):
        raise GraphError("importance: a score is not finite, got nan or inf in weights or gradients; mend them first")
    return scores
