"""Scores channels: folds a criterion over every tensor along which a channel runs."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pruning_core.channels.effects import Effects
from pruning_core.channels.weights import NOT_FINITE, UnitScores, folded, mean_of_slices, of_weights
from pruning_core.criteria import Criterion, Slices
from pruning_core.graph import ChannelGraph, GraphError
from pruning_core.graph.inputs import buffers_kept, leaves
from pruning_core.graph.trace.labels import Axis

NO_BATCH = "criterion: batches is empty, got no batch; give at least one"
ToLoss = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class Data:
    """Batches, and ``to_loss(model, batch)``: what gradients and activations are computed from."""

    batches: Iterable[Any] = ()
    to_loss: ToLoss | None = None

    def criterion(self) -> str:
        """The best one for what is given (docs/benchmarks.md)."""
        given = self.to_loss is not None or not isinstance(self.batches, tuple) or bool(self.batches)
        return "taylor" if given else "l2"

    def needed(self, what: str) -> ToLoss:
        """``to_loss``; GraphError where none was given."""
        if self.to_loss is None:
            raise GraphError(f"criterion: {what} needs data, got none; give batches and to_loss")
        if not isinstance(self.batches, Iterable):
            raise GraphError(f"batches: must be a list or a DataLoader, got {type(self.batches).__name__}")
        return self.to_loss


def unit_scores(graph: ChannelGraph, criterion: Criterion, data: Data) -> dict[int, float]:
    """By unit, divided by the mean of its group, which makes groups comparable.

    A unit that nothing scored has no score and is kept. Buffers are not scored.
    """
    every = sorted({axis for group in graph.groups.values() for axis in group.axes}, key=str)
    axes = [axis for axis in every if axis.tensor in graph.parameters]
    found = _scores(graph, criterion, axes, data)
    scores: dict[int, float] = {}
    for group in graph.groups.values():
        members = [unit for unit in group.members if found.known[unit]]
        raw = found.values[members]
        mean = raw.mean() if len(raw) and raw.mean() > 0 else 1.0
        scores.update({unit: float(value / mean) for unit, value in zip(members, raw, strict=True)})
    if not all(np.isfinite(list(scores.values()))):
        raise GraphError(NOT_FINITE)
    if scores and not any(scores.values()) and criterion.needs_gradient:
        raise GraphError(
            "criterion: all gradients are zero, got a loss that no channel changes; give the training loss"
        )
    return scores


def _scores(graph: ChannelGraph, criterion: Criterion, axes: list[Axis], data: Data) -> UnitScores:
    if type(criterion).of_slices is not Criterion.of_slices:
        values = _activations(graph, data) if criterion.needs.startswith("the activations") else None
        found = {axis: criterion.of_slices(_slices(graph, axis, values)) for axis in axes}
        return mean_of_slices(graph, {axis: each for axis, each in found.items() if each is not None})
    if not criterion.needs_gradient:
        return of_weights(graph, criterion, axes)
    seen: set[str] = set()
    sums, batches = dict[Axis, Tensor](), 0
    by_example = type(criterion).each_example is not Criterion.each_example
    with Effects(graph, axes) if by_example else contextlib.nullcontext() as effects:
        for gradients in _gradients(graph, data):  # without one there is no score: 0 would be the first to go
            seen |= gradients.keys()
            batches += 1
            if effects is not None:
                effects.add(criterion, gradients)
                continue
            there = [axis for axis in axes if axis.tensor in gradients]
            for axis, each in folded(graph, criterion, there, gradients).items():
                sums[axis] = sums[axis] + each if axis in sums else each
    if not batches:
        raise GraphError(NO_BATCH)
    _tell_without_gradient(graph, {axis.tensor for axis in axes} - seen)
    if effects is not None:
        return effects.scores(batches)
    return mean_of_slices(graph, {axis: criterion.finish(each / batches) for axis, each in sums.items()})


def _tell_without_gradient(graph: ChannelGraph, names: set[str]) -> None:
    tensors = {name: graph.stored.names[name] for name in sorted(names)}
    found = [name for name, tensor in tensors.items() if tensor.requires_grad and tensor.dim() > 1]
    if found:
        warnings.warn(f"criterion: no gradient came for {', '.join(found)}; their channels stay", stacklevel=2)


def _slices(graph: ChannelGraph, axis: Axis, activations: np.ndarray | None) -> Slices:
    tensor = graph.stored.names[axis.tensor]
    layer, _, name = axis.tensor.rpartition(".")
    norm_scale = tensor.dim() == 1 and name == "weight" and hasattr(graph.model.get_submodule(layer), "running_mean")
    values = None if activations is None else torch.from_numpy(activations[graph.labels.axes[axis].numpy()])
    return Slices(tensor, axis.dim, axis in graph.consumers, norm_scale, values)


def _activations(graph: ChannelGraph, data: Data) -> np.ndarray:
    """An activation carries the labels of the axis that produced it."""
    to_loss, calls = data.needed("activation"), 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    def run(model: nn.Module) -> None:
        batches = 0
        for batch in data.batches:
            batches += 1
            to_loss(model, batch)
        if not batches:
            raise GraphError(NO_BATCH)

    hook = graph.model.register_forward_pre_hook(count)
    try:
        found = graph.mean_activations(run)
    finally:
        hook.remove()
    if not calls:
        raise GraphError("to_loss: must call the model that it is given, got a function that does not")
    return found


def _gradients(graph: ChannelGraph, data: Data) -> Iterator[dict[str, Tensor]]:
    """The gradients of one batch after the other; the model's own are left as they are."""
    to_loss = data.needed("a gradient")
    with own_gradients(graph.model):
        for batch in data.batches:
            for parameter in graph.model.parameters():
                parameter.grad = None
            loss_of(to_loss, graph.model, batch).backward()
            found = {name: each.grad for name, each in graph.model.named_parameters() if each.grad is not None}
            yield found
            found.clear()  # before the next batch makes its own


def loss_of(to_loss: ToLoss, model: nn.Module, batch: Any) -> Tensor:
    """A number: a tensor is summed, and so are several losses. Not outputs that are returned beside a loss."""
    given = to_loss(model, batch)
    parts = [leaf for leaf in leaves(given) if leaf.requires_grad]
    if not parts:
        raise GraphError(f"to_loss: must return a tensor that depends on the model, got {_what(given)}")
    if len(parts) > 1 and any(leaf.numel() > 1 for leaf in parts):
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in parts[:4])
        raise GraphError(f"to_loss: must return the loss alone, got tensors of shapes {shapes}; return output.loss")
    return torch.stack([leaf.sum().float() for leaf in parts]).sum()


def _what(given: Any) -> str:
    return "a tensor without a gradient" if isinstance(given, Tensor) else type(given).__name__


@contextlib.contextmanager
def own_gradients(model: nn.Module) -> Iterator[None]:
    """Restores gradients and buffers at exit."""
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        with buffers_kept(model):
            yield
    finally:
        for parameter, grad in before:
            parameter.grad = grad
