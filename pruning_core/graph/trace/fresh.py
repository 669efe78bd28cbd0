"""Tensors that the code makes of constants (``zeros``): they get labels by what is written into them or reads them."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pruning_core.graph.trace.labels import NONE, holds_any, unexpanded, varies


class FreshTensors:
    """The shadows of fresh tensors, by the memory that they and views of them lie in."""

    def __init__(self) -> None:
        self._buffers: dict[int, Tensor] = {}
        self._joined = WeakTensorKeyDictionary()

    def add(self, shape: tuple[int, ...]) -> Tensor:
        """A shadow for a fresh tensor; views of the tensor write into it."""
        labels = torch.zeros(shape, dtype=torch.int32)
        self._buffers[labels.untyped_storage().data_ptr()] = labels
        return labels

    def holds(self, labels: Tensor) -> bool:
        """Whether labels lie in the memory of a fresh tensor."""
        return labels.untyped_storage().data_ptr() in self._buffers

    def filled(self, labels: Tensor) -> None:
        """Where a fresh tensor got channels in some rows, its other rows, which keep their constant, have them too."""
        whole = self._buffers[labels.untyped_storage().data_ptr()]
        for dim in range(whole.dim()):
            line = whole.amax(dim, keepdim=True)
            elsewhere = any(varies(line, other) for other in range(whole.dim()) if other != dim)
            if elsewhere and bool(((whole == NONE) | (whole == line)).all()):
                whole.copy_(line.expand(whole.shape))

    def joined(self, tensor: Tensor, dim: int, pieces: list[Tensor]) -> bool:
        """Remembers fresh tensors that were joined with others along ``dim``; whether there are any."""
        starts = itertools.accumulate((each.shape[dim] for each in pieces), initial=0)
        fresh = [(dim, at, each) for at, each in zip(starts, pieces, strict=False) if self.holds(each)]
        if fresh:
            self._joined[tensor] = fresh
        return bool(fresh)

    def read(self, tensor: Tensor, labels: Tensor, dim: int, taken: Tensor) -> Tensor:
        """The labels of what a weight reads as ``taken``: of a first state of zeros, or of one beside an input too."""
        for along, at, each in self._joined.get(tensor, ()):
            if along == dim % labels.dim():
                there = unexpanded(labels)[0].narrow(dim, at, each.shape[dim])
                mine = self.begun(each, dim, taken[at : at + each.shape[dim]])
                there.copy_(mine[tuple(slice(size) for size in there.shape)])
        return self.begun(labels, dim, taken)

    def begun(self, labels: Tensor, dim: int, taken: Tensor) -> Tensor:
        """A fresh tensor that a weight reads before anything was written into it (a first state of zeros) is as wide as
        that weight: it gets the labels that are read."""
        if not self.holds(labels) or holds_any(labels) or labels.shape[dim] != len(taken):
            return labels
        view = [1] * labels.dim()
        view[dim] = len(taken)
        core = unexpanded(labels)[0]
        core.copy_(taken.view(view).expand(core.shape))
        return labels
