"""Labels: one integer for each index of each axis of each parameter, and what ties them together.

An activation carries, element by element, the label of the parameter index that produced it; label 0 is none. Channels
that must go together are tied; channels that must stay are frozen, with the reason. What is left falls apart into
units: the smallest things that can be removed.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

NONE = 0
_HIGH = 1 << 32


def words(text: str) -> list[str]:
    return text.split()


@dataclass(frozen=True)
class Axis:
    """One axis of a parameter or a buffer."""

    tensor: str
    dim: int

    def __str__(self) -> str:
        return f"{self.tensor}:{self.dim}"

    @staticmethod
    def parse(text: str) -> Axis:
        tensor, _, dim = text.rpartition(":")
        return Axis(tensor, int(dim))


def varies(labels: Tensor, dim: int) -> bool:
    """Whether the labels differ along this dimension."""
    return labels.shape[dim] > 1 and labels.stride(dim) != 0 and bool((labels != labels.narrow(dim, 0, 1)).any())


def varying(labels: Tensor) -> list[int]:
    return [dim for dim in range(labels.dim()) if varies(labels, dim)]


def compact(labels: Tensor) -> Tensor:
    """The same labels, stored once along the dimensions where they do not differ (an expanded view)."""
    core = labels
    for dim in reversed(range(labels.dim())):
        if core.shape[dim] > 1 and not varies(core, dim):
            core = core.narrow(dim, 0, 1)
    return core.contiguous().expand(labels.shape) if core.shape != labels.shape else labels


def stored(*labels: Tensor) -> tuple[Tensor, ...]:
    """Tensors of one shape, without the dimensions along which all of them are expanded views."""
    for dim in range(labels[0].dim()):
        if labels[0].shape[dim] > 1 and all(each.stride(dim) == 0 for each in labels):
            labels = tuple(each.narrow(dim, 0, 1) for each in labels)
    return labels


def holds_any(labels: Tensor | None) -> bool:
    return labels is not None and bool((stored(labels)[0] != NONE).any())


class Labels:
    """All labels of a model. ``here`` names the operation that is looked at, for the reasons; with ``narrow_heads``
    attention loses channels of every head, not heads."""

    def __init__(self, narrow_heads: bool = False) -> None:
        self.here, self.narrow_heads = "", narrow_heads
        self.axes: dict[Axis, Tensor] = {}
        self._starts: list[int] = [0]
        self._owners: list[Axis | None] = [None]
        self._count = 1
        self._ties: list[Tensor] = []
        self._frozen: list[tuple[Tensor, str]] = []
        self._free: list[Tensor] = []
        self.balances: list[tuple[Tensor, Tensor]] = []

    def add(self, axis: Axis, size: int) -> Tensor:
        self._starts.append(self._count)
        self._owners.append(axis)
        self.axes[axis] = torch.arange(self._count, self._count + size, dtype=torch.int32)
        self._count += size
        return self.axes[axis]

    def owner(self, label: int) -> Axis | None:
        return self._owners[bisect.bisect_right(self._starts, label) - 1]

    def same_owner(self, labels: Tensor) -> bool:
        return len({self.owner(int(label)) for label in labels.unique()}) == 1

    def tie(self, left: Tensor, right: Tensor, because: str = "") -> None:
        """Element by element: both go or both stay. Beside no label, a label stays."""
        left, right = self._pairs(left, right)
        self.freeze(torch.cat([left[right == NONE], right[left == NONE]]), because or "meets a fixed size")
        self._keep_pairs(left, right)

    def tie_where_both(self, left: Tensor, right: Tensor) -> None:
        """The same, but no label beside a label means nothing."""
        self._keep_pairs(*self._pairs(left, right))

    def tie_along(self, labels: Tensor, dim: int) -> Tensor:
        """Ties all that lies on one line along ``dim``; the labels of its first index."""
        first = labels.narrow(dim, 0, 1)
        if varies(labels, dim):
            self.tie(labels, first.expand(labels.shape))
        return first

    def balance(self, left: Tensor, right: Tensor) -> None:
        """As many go on one side as on the other, but not the same ones: two pieces of one ``chunk``."""
        self.balances.append((left, right))

    def freeze(self, labels: Tensor, because: str) -> None:
        labels = stored(labels)[0].unique()
        labels = labels[labels != NONE]
        if labels.numel():
            self._frozen.append((labels, f"{because}, at {self.here}" if self.here else because))

    def free(self, labels: Tensor) -> None:
        """These may go alone: nothing reads them, and nothing says that they stay."""
        self._free.append(stored(labels)[0].unique())

    def __len__(self) -> int:
        return self._count

    @staticmethod
    def _pairs(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        left, right = stored(*torch.broadcast_tensors(left, right))
        keys = (left.long() * _HIGH + right.long()).unique()
        return (keys // _HIGH).int(), (keys % _HIGH).int()

    def _keep_pairs(self, left: Tensor, right: Tensor) -> None:
        matter = (left != NONE) & (right != NONE) & (left != right)
        if bool(matter.any()):
            self._ties.append(torch.stack([left[matter], right[matter]]))

    def solve(self) -> Components:
        pairs = torch.cat([torch.zeros(2, 0, dtype=torch.int32), *self._ties], dim=1).numpy()
        ones = np.ones(pairs.shape[1], dtype=bool)
        matrix = coo_matrix((ones, (pairs[0], pairs[1])), shape=(self._count, self._count))
        _, component = connected_components(matrix, directed=False)
        reasons: dict[int, str] = {int(component[NONE]): ""}
        for labels, why in self._frozen:
            for found in np.unique(component[labels.numpy()]):
                reasons.setdefault(int(found), why)
        return Components(component, reasons, torch.cat([torch.zeros(0, dtype=torch.int32), *self._free]).numpy())


class Components:
    """Which unit a label belongs to, and why a unit must stay."""

    def __init__(self, of_label: np.ndarray, reasons: dict[int, str], free: np.ndarray) -> None:
        self.of_label, self.reasons = of_label, reasons
        self._fixed = np.bincount(of_label) == 1  # an axis that nothing has looked at
        self._fixed[of_label[free]] = False
        self._fixed[list(reasons)] = True

    def fixed(self, unit: int) -> bool:
        return bool(self._fixed[unit])

    def of(self, labels: Tensor) -> Tensor:
        """The units of labels, all that must stay as -1."""
        units = self.of_label[labels.numpy()]
        return torch.from_numpy(np.where(self._fixed[units], -1, units))
