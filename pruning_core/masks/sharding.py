"""Weights sharded over ranks by ``fully_shard`` (FSDP2), and the collectives that pruning them needs.

Each rank scores and masks its own shard. A unit that spans a shard border belongs to the rank that holds its first
weight; for such units alone, partial scores and then verdicts are summed over the ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from pruning_core.patterns import Pattern, Region
from pruning_core.selection import Layout


class RankGroup:
    """The ranks that hold shards of one weight, in shard order."""

    def __init__(self, handle: dist.ProcessGroup) -> None:
        self.handle = handle
        self.rank = dist.get_rank(handle)
        self.size = dist.get_world_size(handle)
        self.members = dist.get_process_group_ranks(handle)

    def sum_(self, x: Tensor) -> Tensor:
        """All-reduces ``x`` in place and returns it: the sum over the ranks."""
        dist.all_reduce(x, group=self.handle)
        return x

    def max_(self, x: Tensor) -> Tensor:
        """All-reduces ``x`` in place and returns it: the maximum over the ranks."""
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self.handle)
        return x

    def before(self, x: Tensor) -> Tensor:
        """The sum of ``x`` over the ranks before this one."""
        rows = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(rows, x.contiguous(), group=self.handle)
        return torch.stack([torch.zeros_like(x), *rows[: self.rank]]).sum(0)


def local(x: Tensor) -> Tensor:
    """The local shard of a DTensor; an ordinary tensor itself."""
    return x.to_local() if isinstance(x, DTensor) else x


def reshard(model: nn.Module) -> None:
    """Reshards FSDP2 modules: a forward pass without a backward pass leaves the root's parameters gathered."""
    if dist.is_available() and dist.is_initialized():
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def shard_groups(parameter: Tensor) -> list[RankGroup]:
    """One ``RankGroup`` per mesh axis over which a parameter is not replicated; none for an ordinary tensor."""
    if not isinstance(parameter, DTensor):
        return []
    mesh, placements = parameter.device_mesh, parameter.placements
    return [RankGroup(mesh.get_group(axis)) for axis, each in enumerate(placements) if not isinstance(each, Replicate)]


def shard_group(name: str, parameter: Tensor) -> RankGroup | None:
    """The ranks over which a parameter is sharded along its first axis; None for an ordinary tensor."""
    if not isinstance(parameter, DTensor):
        return None
    mesh, found = parameter.device_mesh, None
    for axis, placement in enumerate(parameter.placements):
        if type(placement) is Shard and placement.dim == 0 and found is None:
            found = axis
        elif not isinstance(placement, Replicate):
            raise ValueError(
                f"{name}: only weights sharded once, along their first axis, can be pruned, "
                f"got placements {parameter.placements}; use fully_shard without a shard_placement_fn"
            )
    return None if found is None else RankGroup(mesh.get_group(found))


@dataclass(frozen=True)
class Slice:
    """This rank's shard of a weight, along the one (G, O, K, I) axis that is sharded."""

    group: RankGroup
    axis: int
    bounds: tuple[tuple[int, int], ...]
    """``(first, last + 1)`` of each rank along the axis."""

    def crossing(self, extent: int) -> list[int]:
        """The unit rows along the axis that span a shard border."""
        borders = {first for first, end in self.bounds if first < end and first % extent}
        return sorted({border // extent for border in borders})

    def owned(self, extent: int) -> slice:
        """The rows of this rank's unit grid that it owns: it holds their first weight."""
        first, end = self.bounds[self.group.rank]
        return slice(1 if first % extent else 0, None) if first < end else slice(0, 0)

    def rows_here(self, extent: int) -> range:
        """The unit rows that this rank's shard touches."""
        first, end = self.bounds[self.group.rank]
        return range(first // extent, -(-end // extent)) if first < end else range(0)


class Place(NamedTuple):
    """How the local part of a weight is read: layout, region and, when it is sharded, the slice."""

    layout: Layout
    region: Region
    slice: Slice | None = None

    @property
    def shares_units(self) -> bool:
        """Whether a unit spans a border between ranks."""
        return self.slice is not None and bool(self.slice.crossing(self.region.extents[self.slice.axis]))


def place(name: str, parameter: Tensor, layout: Layout, pattern: Pattern) -> Place:
    """Where the local part of a parameter lies; ValueError where the pattern does not fit the shards."""
    shape = layout.shape(parameter.shape)
    group = shard_group(name, parameter)
    if group is None:
        return Place(layout, pattern.region(shape))
    axis = 3 if layout.in_first else 1
    extents = pattern.extents(shape)
    if layout.groups > 1 and shape[axis] % extents[axis]:
        raise ValueError(
            f"{name}: under fully_shard the {shape[axis]} channels of each group must be a multiple of "
            f"{extents[axis]}, got pattern {pattern}; exclude the layer or choose another pattern"
        )
    whole = list(shape)  # units do not cross groups, so groups and channels may be read as one axis
    whole[axis], whole[0] = parameter.shape[0], 1
    chunk = -(-parameter.shape[0] // group.size)  # torch.chunk: all ranks but the last ones hold this many rows
    borders = [min(rank * chunk, parameter.shape[0]) for rank in range(group.size + 1)]
    bounds = tuple(pairwise(borders))
    first, end = bounds[group.rank]
    here, start = list(whole), [0, 0, 0, 0]
    here[axis], start[axis] = end - first, first if first < end else 0
    region, piece = Region(tuple(whole), extents, tuple(here), tuple(start)), Slice(group, axis, bounds)
    if not pattern.folds_linearly and piece.crossing(extents[axis]):
        raise ValueError(
            f"{name}: under fully_shard the {chunk} rows of a rank must be a multiple of {extents[axis]}, got pattern "
            f"{pattern}; exclude the layer or choose another pattern"
        )
    return Place(Layout(in_first=layout.in_first), region, piece)


def common_group(where: str, places: Mapping[str, Place]) -> RankGroup | None:
    """The ranks that shard all these weights, None when all are whole; ValueError for a mixture."""
    groups = {name: each.slice.group if each.slice else None for name, each in places.items()}
    holders = {name: f"over ranks {group.members}" if group else "whole" for name, group in groups.items()}
    first = next(iter(holders))
    for name, held in holders.items():
        if held != holders[first]:
            raise ValueError(
                f"{where}: all weights of a pruner must be sharded alike, got {first} {holders[first]} and {name} "
                f"{held}; call fully_shard on the whole model, or give them separate pruners"
            )
    return groups[first]


def agree(grids: Sequence[Tensor], places: Sequence[Place], operation: Literal["sum", "max"]) -> None:
    """Completes, in place, the entries of units that span shard borders; one all-reduce for all weights."""
    parts, views = [], []
    for grid, (_, region, piece) in zip(grids, places, strict=True):
        if piece is None:
            continue
        extent = region.extents[piece.axis]
        here = piece.rows_here(extent)
        for row in piece.crossing(extent):
            shape = [length for axis, length in enumerate(grid.shape) if axis != piece.axis]
            neutral = grid.new_full(shape, -torch.inf) if operation == "max" else grid.new_zeros(shape)
            views.append(grid.select(piece.axis, row - here.start) if row in here else None)
            parts.append((neutral if views[-1] is None else views[-1]).flatten())
    if not parts:
        return
    group = next(each.slice.group for each in places if each.slice)
    flat = torch.cat(parts)
    complete = (group.max_ if operation == "max" else group.sum_)(flat).split([part.numel() for part in parts])
    for view, values in zip(views, complete, strict=True):
        if view is not None:
            view.copy_(values.view(view.shape))
