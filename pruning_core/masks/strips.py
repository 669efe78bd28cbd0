"""A weight in strips, so that what is computed from it stays in the cache and takes no memory of the weight's size."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pruning_core.masks.bits import part_size
from pruning_core.patterns import Region
from pruning_core.selection import Layout

WIDER = 8
"""Strips of columns are this much larger: their rows are far apart in memory, and narrow ones are slow to read."""


class Strip(NamedTuple):
    """``rows`` of stored axis ``dim``, and the ``units`` along ``axis`` of the unit grid that they touch."""

    layout: Layout
    region: Region
    dim: int
    rows: slice
    axis: int
    units: slice

    def of(self, stored: Tensor) -> Tensor:
        """The strip of a tensor in the stored shape."""
        return stored[(slice(None),) * self.dim + (self.rows,)]

    def of_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The stored shape of the strip of a tensor of this shape."""
        return (*shape[: self.dim], self.rows.stop - self.rows.start, *shape[self.dim + 1 :])

    def of_grid(self, grid: Tensor) -> Tensor:
        """The strip of a unit grid."""
        return grid[(slice(None),) * self.axis + (self.units,)]


def unit_strips(layout: Layout, region: Region, device: torch.device) -> list[Strip]:
    """Strips of whole units, such that the units of one strip after the other are all units in storage order."""
    first = _axis(layout, 0)
    dim = 1 if _fills(region, first) and not _fills(region, _axis(layout, 1)) else 0  # the first with several units
    return _strips(layout, region, device, dim, split=not _fills(region, _axis(layout, dim)))


def row_strips(layout: Layout, region: Region, device: torch.device, through_units: bool) -> list[Strip]:
    """Strips of the first stored axis, of whole units; ``through_units``: but for a unit that fills the axis."""
    return _strips(layout, region, device, 0, split=through_units or not _fills(region, _axis(layout, 0)))


def one_strip(layout: Layout, region: Region, device: torch.device) -> list[Strip]:
    """The whole local weight."""
    return _strips(layout, region, device, 0, split=False)


def _axis(layout: Layout, dim: int) -> int:
    """The (G, O, K, I) axis of a stored one."""
    if dim == 0 and layout.groups > 1:
        return 0
    return 3 if layout.in_first == (dim == 0) else 1


def _fills(region: Region, axis: int) -> bool:
    """Whether one unit fills the axis."""
    return region.extents[axis] == region.shape[axis]


def _strips(layout: Layout, region: Region, device: torch.device, dim: int, split: bool) -> list[Strip]:
    axis = _axis(layout, dim)
    length, start = region.local[axis], region.start[axis]
    extent = 1 if _fills(region, axis) else region.extents[axis]
    lead = start % extent
    size = part_size(device) * (WIDER if dim else 1)
    step = max(size * length // max(math.prod(region.local), 1) // extent, 1) * extent
    if not split or step >= length:
        step = lead + length
    scale = region.local[1 if not layout.in_first else 3] if axis == 0 else 1  # stored rows of each group
    found = []
    for border in range(-lead, length, step) if length else [0]:
        first, last = max(border, 0), min(border + step, length)
        local, starts = list(region.local), list(region.start)
        local[axis], starts[axis] = last - first, start + first
        part = Region(region.shape, region.extents, tuple(local), tuple(starts))
        units = slice((first + lead) // extent, -(-(last + lead) // extent))
        if _fills(region, axis):
            units = slice(0, 1)
        inside = Layout(last - first, layout.in_first) if axis == 0 else layout
        found.append(Strip(inside, part, dim, slice(first * scale, last * scale), axis, units))
    return found
