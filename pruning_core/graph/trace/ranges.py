"""Ranges of a dimension that an operation takes by numbers: which channels these are."""

from __future__ import annotations

from torch import Tensor

from pruning_core.graph.trace.labels import varying
from pruning_core.graph.trace.recorder import Numbers, Operation
from pruning_core.graph.trace.shadows import AxisLabels

RANGES = {"slice": 4, "narrow": 3, "select": 2}
"""Take a range of a dimension by so many numbers, the dimension among them."""


def along_range(operation: Operation) -> Tensor | None:
    """The labels along the dimension that a range is taken of; None where it has none of its own."""
    shape, shadow = operation.tensors[0]
    if len(operation.numbers) != RANGES.get(operation.name):
        return None
    dim = int(operation.numbers[0]) % len(shape)
    if isinstance(shadow, AxisLabels):
        return shadow.axes[dim]
    if shadow is None or varying(shadow) != [dim]:
        return None
    return shadow.movedim(dim, -1).reshape(-1, shape[dim])[0]


def positions(operation: Operation, numbers: Numbers, size: int) -> range:
    """Which indices of a dimension ``slice``, ``narrow`` or ``select`` takes, by its numbers."""
    start, *more = (int(each) for each in numbers[1:])
    if operation.name == "slice":
        return range(size)[slice(start, *more)]
    first = start % max(size, 1)
    return range(first, first + (more[0] if more else 1))
