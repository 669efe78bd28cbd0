"""Labels: one integer for each index of each axis of each parameter, with ties and freezes.

An activation carries, element by element, the label of the parameter index that produced it; label 0 is none. Channels
that go together are tied; channels that must stay are frozen, with the reason. ``couple`` solves them into units.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

NONE = 0
_HIGH = 1 << 32


@dataclass(frozen=True)
class Axis:
    """One axis of a parameter or a buffer."""

    tensor: str
    dim: int

    def __str__(self) -> str:
        return f"{self.tensor}:{self.dim}"

    @staticmethod
    def parse(text: str) -> Axis:
        """``weight:0`` -> the axis."""
        tensor, _, dim = text.rpartition(":")
        return Axis(tensor, int(dim))


def varies(labels: Tensor, dim: int) -> bool:
    """Whether the labels differ along this dimension."""
    if labels.shape[dim] < 2 or labels.stride(dim) == 0:
        return False
    core = unexpanded(labels)[0]
    return not torch.equal(core, core.narrow(dim, 0, 1).expand(core.shape))


def varying(labels: Tensor) -> list[int]:
    """The dimensions along which labels differ."""
    return [dim for dim in range(labels.dim()) if varies(labels, dim)]


def compact(labels: Tensor, but: int | None = None) -> Tensor:
    """The same labels as an expanded view: stored once along dimensions where they do not vary (``but`` for one)."""
    core = labels
    for dim in reversed(range(labels.dim())):
        if core.shape[dim] > 1 and dim != but and not varies(core, dim):
            core = core.narrow(dim, 0, 1)
    return core.contiguous().expand(labels.shape) if core.shape != labels.shape else labels


def unexpanded(*labels: Tensor) -> tuple[Tensor, ...]:
    """Tensors of one shape, narrowed to length 1 along the dimensions in which all of them are expanded views."""
    for dim in range(labels[0].dim()):
        if labels[0].shape[dim] > 1 and all(each.stride(dim) == 0 for each in labels):
            labels = tuple(each.narrow(dim, 0, 1) for each in labels)
    return labels


def holds_any(labels: Tensor | None) -> bool:
    """Whether there is any label."""
    return labels is not None and bool((unexpanded(labels)[0] != NONE).any())


def left(labels: Tensor, dead: Tensor) -> tuple[int, ...] | None:
    """The shape of a label tensor without its dead labels; None where that is not rectangular."""
    core = unexpanded(labels)[0]
    alive = ~dead[core.long()]
    shape = []
    for dim, size in enumerate(labels.shape):
        if alive.shape[dim] != size:
            shape.append(size)
        else:
            shape.append(int(alive.movedim(dim, 0).reshape(size, -1).any(1).sum()) if size else 0)
    known = [n for dim, n in enumerate(shape) if alive.shape[dim] == labels.shape[dim]]
    return tuple(shape) if int(alive.sum()) == int(torch.tensor(known or [1]).prod()) else None


class Labels:
    """All labels of a model; ties, frozen and removable labels, and balances are collected while it runs.

    ``narrow_heads``: attention loses channels of every head, not heads.
    """

    def __init__(self, narrow_heads: bool = False) -> None:
        self.narrow_heads = narrow_heads
        self.axes: dict[Axis, Tensor] = {}
        self.ties: list[Tensor] = []
        self.frozen: list[tuple[Tensor, str]] = []
        self.removable: list[Tensor] = []
        self.balances: list[tuple[Tensor, Tensor]] = []
        self.place = ""
        self._starts: list[int] = [0]
        self._owners: list[Axis | None] = [None]
        self._count = 1

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        """Inside the ``with`` block, reasons of freezes name this place in the model."""
        outer, self.place = self.place, place
        try:
            yield
        finally:
            self.place = outer

    def add(self, axis: Axis, size: int) -> Tensor:
        """Fresh labels for an axis: int32 (size,)."""
        self._starts.append(self._count)
        self._owners.append(axis)
        self.axes[axis] = torch.arange(self._count, self._count + size, dtype=torch.int32)
        self._count += size
        return self.axes[axis]

    def owners(self, labels: Tensor) -> set[Axis | None]:
        """The axes that labels belong to."""
        places = np.searchsorted(self._starts, unexpanded(labels)[0].numpy().ravel(), side="right")
        return {self._owners[place - 1] for place in np.unique(places)}

    def same_owner(self, labels: Tensor) -> bool:
        """Whether all labels belong to one axis."""
        return len(self.owners(labels)) == 1

    def tie(self, left: Tensor, right: Tensor, because: str = "") -> None:
        """Ties labels element by element; a label that meets none is frozen."""
        left, right = self._pairs(left, right)
        self.freeze(torch.cat([left[right == NONE], right[left == NONE]]), because or "meets a fixed size")
        self._keep_pairs(left, right)

    def tie_where_both(self, left: Tensor, right: Tensor) -> None:
        """Like ``tie``, but a label that meets none stays free."""
        self._keep_pairs(*self._pairs(left, right))

    def tie_along(self, labels: Tensor, dim: int) -> Tensor:
        """Ties each line along ``dim`` to its first element; returns the first elements, length 1 along ``dim``."""
        first = labels.narrow(dim, 0, 1)
        if varies(labels, dim):
            self.tie(labels, first.expand(labels.shape))
        return first

    def balance(self, left: Tensor, right: Tensor) -> None:
        """Requires as many removals on one side as on the other: two pieces of one ``chunk``."""
        self.balances.append((left, right))

    def freeze(self, labels: Tensor, because: str) -> None:
        """Freezes labels, with the reason that ``frozen()`` reports."""
        labels = unexpanded(labels)[0].unique()
        labels = labels[labels != NONE]
        if labels.numel():
            self.frozen.append((labels, f"{because}, at {self.place}" if self.place else because))

    def mark_removable(self, labels: Tensor) -> None:
        """Marks labels without consumers as removable."""
        self.removable.append(unexpanded(labels)[0].unique())

    def __len__(self) -> int:
        return self._count

    @staticmethod
    def _pairs(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        left, right = unexpanded(*torch.broadcast_tensors(left, right))
        keys = (left.long() * _HIGH + right.long()).unique()
        return (keys // _HIGH).int(), (keys % _HIGH).int()

    def _keep_pairs(self, left: Tensor, right: Tensor) -> None:
        matter = (left != NONE) & (right != NONE) & (left != right)
        if bool(matter.any()):
            self.ties.append(torch.stack([left[matter], right[matter]]))
