"""Shadows: the labels of an activation's elements, or of a parameter's axes.

An activation's shadow is a label tensor of its shape. A parameter's shadow has one vector of labels for each axis; any
view of a parameter shares its memory, so its axes are read from its strides, whatever operations made it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pruning_core.graph.trace.labels import NONE, Axis, Labels, compact, varying

Move = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class AxisLabels:
    """Per axis: its labels, or None where none belongs to it alone."""

    axes: tuple[Tensor | None, ...]
    shape: tuple[int, ...]

    def spread(self, dim: int) -> Tensor:
        """The labels of one axis as a label tensor of the whole shape."""
        vector = self.axes[dim]
        assert vector is not None
        view = [1] * len(self.shape)
        view[dim] = self.shape[dim]
        return vector.view(view).expand(self.shape)

    def vector(self, dim: int) -> Tensor:
        """The labels of one axis; no labels where there are none."""
        vector = self.axes[dim]
        return torch.zeros(self.shape[dim], dtype=torch.int32) if vector is None else vector

    def labelled(self) -> list[int]:
        """The dimensions that have labels of their own."""
        return [dim for dim, vector in enumerate(self.axes) if vector is not None and self.shape[dim] > 1]

    def moved(self, labels: Labels, move: Move) -> AxisLabels:
        """After a movement of data; an axis that is split or merged stays."""
        blank = torch.zeros((), dtype=torch.int32).expand(self.shape)
        shape = tuple(move(blank).shape)
        axes: list[Tensor | None] = [None] * len(shape)
        for dim in self.labelled():
            spread = compact(move(self.spread(dim)))
            found = varying(spread)
            if len(found) == 1 and axes[found[0]] is None:
                axes[found[0]] = spread.movedim(found[0], -1).reshape(-1, spread.shape[found[0]])[0]
            elif found:
                labels.freeze(self.vector(dim), "its axis is split or merged")
        return AxisLabels(tuple(axes), shape)


class StoredTensors:
    """The parameters and buffers of a model, found again by the memory that a tensor lies in."""

    def __init__(self, labels: Labels, model: nn.Module) -> None:
        self.labels = labels
        self.names: dict[str, Tensor] = {}
        self._by_memory: dict[int, list[tuple[str, Tensor]]] = {}
        self._known: dict[tuple[Any, ...], AxisLabels] = {}
        for name, tensor in self._all(model):
            if tensor.numel() == 0 or tensor.dim() == 0:
                continue
            self.names[name] = tensor
            self._by_memory.setdefault(_memory(tensor), []).append((name, tensor))
            for dim, size in enumerate(tensor.shape):
                labels.add(Axis(name, dim), size)

    @staticmethod
    def _all(model: nn.Module) -> list[tuple[str, Tensor]]:
        """Tied parameters once, under their first name."""
        return [*model.named_parameters(), *model.named_buffers()]

    def shadow(self, view: Tensor) -> AxisLabels | None:
        """The axes' labels of a view of a parameter; None for a tensor outside of all parameters."""
        if view.layout != torch.strided:
            return None
        for name, tensor in self._by_memory.get(_memory(view), ()):
            offset = int(view.storage_offset() - tensor.storage_offset())
            if 0 <= offset < _extent(tensor) and view.dtype == tensor.dtype:
                key = (name, offset, view.shape, view.stride())
                if key not in self._known:
                    whole = view.shape == tensor.shape and view.is_contiguous() and tensor.is_contiguous()
                    self._known[key] = self._own(name, tensor) if whole else self._axes(name, tensor, view, offset)
                return self._known[key]
        return None

    def _own(self, name: str, tensor: Tensor) -> AxisLabels:
        axes = (self.labels.axes[Axis(name, dim)] if size > 1 else None for dim, size in enumerate(tensor.shape))
        return AxisLabels(tuple(axes), tuple(tensor.shape))

    def _axes(self, name: str, tensor: Tensor, view: Tensor, offset: int) -> AxisLabels:
        where = [_coordinates(tensor, offset, view.stride(dim), view.shape[dim]) for dim in range(view.dim())]
        moved = [[axis for axis, index in enumerate(each) if bool((index != index[0]).any())] for each in where]
        axes: list[Tensor | None] = []
        for dim, found in enumerate(moved):  # of merged axes the first can lose channels: a kernel's axes stay anyway
            alone = [sum(axis in other for other in moved) == 1 for axis in found]
            first = bool(found) and all(alone)
            axes.append(self.labels.axes[Axis(name, found[0])][where[dim][found[0]]] if first else None)
            for axis in found[1:] if first else found:
                self.labels.freeze(self.labels.axes[Axis(name, axis)], "its axis is split or merged")
        return AxisLabels(tuple(axes), tuple(view.shape))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _extent(tensor: Tensor) -> int:
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _coordinates(tensor: Tensor, offset: int, stride: int, size: int) -> list[Tensor]:
    """Where one step after another along a view's axis leads in the parameter."""
    left = offset + stride * torch.arange(size)
    found = [torch.zeros(size, dtype=torch.long)] * tensor.dim()
    for dim in sorted(range(tensor.dim()), key=lambda dim: (tensor.stride(dim), tensor.shape[dim]), reverse=True):
        if tensor.shape[dim] > 1:
            found[dim] = left // tensor.stride(dim)
            left = left % tensor.stride(dim)
    return found


Shadow = Tensor | AxisLabels | None


def as_activation(labels: Labels, shadow: Shadow, shape: tuple[int, ...], beside: Tensor | None = None) -> Tensor:
    """A label tensor of this shape. Of a parameter with several axes the one that ``beside`` varies along is taken,
    or the last: the others stay."""
    if shadow is None:
        return torch.zeros((), dtype=torch.int32).expand(shape)
    if isinstance(shadow, Tensor):
        return shadow
    candidates = shadow.labelled()
    if not candidates:
        single = [dim for dim, vector in enumerate(shadow.axes) if vector is not None]
        for dim in single:
            labels.freeze(shadow.vector(dim), "is a single value")
        return torch.full((), NONE, dtype=torch.int32).expand(shadow.shape)
    chosen = candidates[-1]
    if beside is not None:
        last = beside.dim() - len(shadow.shape)
        chosen = next((dim for dim in candidates if dim + last in varying(beside)), chosen)
    for dim in candidates:
        if dim != chosen:
            labels.freeze(shadow.vector(dim), "its axis is no channel axis")
    return shadow.spread(chosen)
