"""One weight with its mask and its running score."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pruning_core.criteria import fold_lines
from pruning_core.masks.bits import Bits
from pruning_core.masks.options import LOCK, PrunerOptions
from pruning_core.masks.sharding import Place, local, place
from pruning_core.masks.strips import Strip, one_strip, row_strips, unit_strips
from pruning_core.patterns import fold_blocks, parse_pattern, stretch_blocks
from pruning_core.selection import Target


class MaskedWeight:
    """A target with its mask ``keep`` and its running ``score``, which is stored per unit where the fold is linear.

    ``whole_units`` is the mask made of whole units; it differs from ``keep`` only between the structured updates of
    progressive pruning. ``observed``: a gradient was looked for since the last update. ``sizes``: weights per unit of
    the local unit grid. ``largest`` and ``capacity``: the size of the largest unit and of all units together, over all
    ranks. ``strips`` and ``rows``: the parts in which it is scored and masked.
    """

    def __init__(self, target: Target, options: PrunerOptions) -> None:
        self.target, self.options = target, options
        self.pattern = parse_pattern("1x1") if options.kind == LOCK else options.parsed_pattern  # it has no units
        self.place: Place = place(target.name, target.parameter, target.layout, self.pattern)
        self.parameter = target.parameter
        here = local(target.parameter)
        self.shape = tuple(here.shape)
        self.keep = Bits(self.shape, here.device)
        self.whole_units = self.keep
        self.score: Tensor | None = None
        self.observed = False
        self.stores_units = (
            options.kind == "basic" and self.pattern.folds_linearly and options.criterion_reduce_type != "max"
        )
        sizes = self.pattern.sizes(self.place.region)
        units = math.prod(-(-n // e) for n, e in zip(self.place.region.shape, self.place.region.extents, strict=True))
        self.largest = sizes if isinstance(sizes, int) else int(sizes.max())
        self.capacity = units * sizes if isinstance(sizes, int) else int(sizes.sum())
        self.sizes = sizes if isinstance(sizes, int) else self._here(sizes).to(here.device)
        self._cut_into_strips()

    def _cut_into_strips(self) -> None:
        layout, region, device = self.place.layout, self.place.region, self.keep.device
        if self.options.criterion.elementwise:
            self.strips = unit_strips(layout, region, device)
            self.rows = row_strips(layout, region, device, through_units=self.pattern.folds_linearly)
        else:
            self.strips = self.rows = one_strip(layout, region, device)

    @property
    def weights(self) -> int:
        """Number of weights, over all ranks."""
        return self.target.parameter.numel()

    @property
    def grid(self) -> tuple[int, ...]:
        """The shape of the local unit grid."""
        region = self.place.region
        axes = zip(region.start, region.local, region.extents, strict=True)
        return tuple(
            -(-(start + length) // extent) - start // extent if length else 0 for start, length, extent in axes
        )

    def weight(self) -> Tensor:
        """The local weight, without autograd but with its version counter; moves the mask to its device.

        RuntimeError when the parameter was replaced or has another shape.
        """
        parameter = self.target.parameter
        here = local(parameter.detach())
        if parameter is not self.parameter or tuple(here.shape) != self.shape:
            raise RuntimeError(
                f"{self.target.name}: the parameter changed under the pruner, from shape {self.shape} to "
                f"{tuple(here.shape)} or to another object; change, convert and shard the model first, then begin"
            )
        if here.device != self.keep.device:
            self._move(here.device)
        return here

    def _move(self, device: torch.device) -> None:
        separate = self.whole_units is not self.keep
        self.keep = self.keep.to(device)
        self.whole_units = self.whole_units.to(device) if separate else self.keep
        self.score = None if self.score is None else self.score.to(device)
        self.sizes = self.sizes if isinstance(self.sizes, int) else self.sizes.to(device)
        self._cut_into_strips()

    def gradient(self) -> Tensor | None:
        """The local gradient, or None."""
        gradient = self.target.parameter.grad
        return None if gradient is None else local(gradient.detach())

    def apply_(self) -> None:
        """Zeroes the cut weights in place."""
        weight = self.weight()  # may move the mask
        self.keep.apply_(weight)

    def observe(self, rate: Tensor | float, bad: Tensor | None) -> None:
        """Updates the score with this step's gradient; ``rate`` undoes a loss scale, ``bad`` skips the update.

        Without a gradient there is no score: a 0 would make the weight the first to go.
        """
        self.observed = True
        weight, gradient = self.weight(), self.gradient()
        criterion = self.options.criterion
        if gradient is None and (self.score is None or not criterion.accumulates):
            return
        rate = rate**criterion.degree
        gain = rate * self.options.momentum_gain if criterion.accumulates else rate
        for strip in self.strips:
            part = strip.of(weight)
            new = criterion.score(part, torch.zeros_like(part) if gradient is None else strip.of(gradient))
            new = criterion.each_step(self.fold(new, strip) if self.stores_units else new)
            if self.score is None:
                self.score = new.new_zeros(self.grid if self.stores_units else self.shape)
            self._add_(strip.of_grid(self.score) if self.stores_units else strip.of(self.score), new, gain, bad)

    def _add_(self, old: Tensor, new: Tensor, gain: Tensor | float, bad: Tensor | None) -> None:
        decay = self.options.momentum_decay if self.options.criterion.accumulates else 0.0
        if bad is not None:  # a flag on the device: select there, without a host sync
            old.copy_(torch.where(bad, old, old * decay + new * gain))
        elif not self.options.criterion.accumulates:
            old.copy_(new.mul_(gain))
        else:
            if isinstance(gain, Tensor) or decay != 1:
                old.mul_(decay)
            if isinstance(gain, Tensor):
                old.add_(new.mul_(gain))
            else:
                old.add_(new, alpha=gain)

    def fold(self, score: Tensor, strip: Strip) -> Tensor:
        """Stored shape -> unit grid of a strip; for "mean" each unit is divided by its own size."""
        grid = self.pattern.fold(strip.layout.view(score), strip.region, self.options.criterion_reduce_type)
        if self.options.criterion_reduce_type != "mean":
            return grid
        sizes = self.sizes if isinstance(self.sizes, int) else strip.of_grid(self.sizes)
        return grid if isinstance(sizes, int) and sizes == 1 else grid / sizes

    def _here(self, grid: Tensor) -> Tensor:
        """The part of a whole weight's unit grid that this rank's shard touches."""
        piece = self.place.slice
        if piece is None:
            return grid
        rows = piece.rows_here(self.place.region.extents[piece.axis])
        return grid.narrow(piece.axis, min(rows.start, grid.shape[piece.axis]), len(rows))

    def _raw_elements(self, strip: Strip) -> Tensor:
        """Element scores before ``Criterion.finish``, in the stored shape; not where units are stored."""
        criterion = self.options.criterion
        if not criterion.needs_gradient:
            return criterion.each_step(criterion.score(strip.of(self.weight()), None))
        assert self.score is not None and not self.stores_units
        return strip.of(self.score)

    def element_scores(self, strip: Strip) -> Tensor:
        """The score of each element of a strip as a unit of its own, in the stored shape."""
        return self.options.criterion.finish(self._raw_elements(strip))

    def unit_sums(self, strip: Strip) -> Tensor:
        """The unit grid of a strip before ``finish_units``; partial where a unit spans a shard border."""
        criterion = self.options.criterion
        if not self.stores_units:
            return self.fold(self._raw_elements(strip) if self._finishes_units else self.element_scores(strip), strip)
        if criterion.needs_gradient:
            assert self.score is not None
            return strip.of_grid(self.score)
        return criterion.each_step(self.fold(criterion.score(strip.of(self.weight()), None), strip))

    def finish_units(self, sums: Tensor) -> Tensor:
        """The unit grid of scores, from sums that are complete over all ranks."""
        return self.options.criterion.finish(sums) if self._finishes_units else sums

    @property
    def _finishes_units(self) -> bool:
        """Whether sums over units are finished; else elements are, since a unit picks among them (N:M, max)."""
        return self.pattern.folds_linearly and self.options.criterion_reduce_type != "max"

    def join(self, grids: list[Tensor]) -> Tensor:
        """The local unit grid from those of the strips."""
        return torch.cat(grids, self.strips[0].axis)

    def alive(self) -> Iterator[Tensor]:
        """Per strip its bool unit grid: not cut yet."""
        if self.strips[0].dim == 0:
            return map(self._alive, self.strips)
        top = self.rows[0] if self.pattern.folds_linearly else one_strip(*self.place[:2], self.keep.device)[0]
        alive = self._alive(top)  # a unit that fills the first axis is in each of its rows
        return (strip.of_grid(alive) for strip in self.strips)

    def _alive(self, rows: Strip) -> Tensor:
        kept = self.whole_units.kept(*self.span(rows)).view(rows.of_shape(self.shape))
        return self.pattern.alive(rows.layout.view(kept), rows.region)

    def span(self, rows: Strip) -> tuple[int, int]:
        """``(first, count)`` of the weights in these rows, in storage order."""
        size = math.prod(self.shape[1:])
        return rows.rows.start * size, (rows.rows.stop - rows.rows.start) * size

    def owned(self, grid: Tensor, strip: Strip | None = None) -> Tensor:
        """The part of a unit grid, or of a strip's, that this rank owns."""
        piece = self.place.slice
        if piece is None or (strip is not None and strip.axis == piece.axis and strip.units.start):
            return grid
        rows = piece.owned(self.place.region.extents[piece.axis])
        return grid[(slice(None),) * piece.axis + (rows,)]

    def flat(self, grid: Tensor) -> Tensor:
        """Flattened in storage order, in which ties are broken."""
        return self.place.layout.stored_order(grid).flatten()

    def unflat(self, flat: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The inverse of ``flat``, for a grid of this shape."""
        order = self.place.layout
        stored = order.stored_order(torch.empty(shape, device="meta")).shape
        return order.from_stored_order(flat.view(stored))

    def cut_units_(self, cut: Tensor) -> None:
        """Cuts the units of a bool grid (True = cut) from ``whole_units``; the weight does not change."""
        if self.target.norm is not None:
            cut = cut & ~self._spared(cut)
        for rows in self.rows:
            self.whole_units.keep_only_(self._without(cut, rows), self.span(rows)[0])

    def _without(self, cut: Tensor, rows: Strip) -> Tensor:
        """Bool, in storage order: what the units of a grid leave of these rows when they are cut.

        A block that is cut is cut again, which changes nothing; a group of N:M would lose others.
        """
        cut = rows.of_grid(cut)
        if self.pattern.folds_linearly:
            left = self.pattern.spread(~cut, None, rows.region)
        else:
            score = rows.layout.view(self.element_scores(rows))
            left = self.pattern.spread(~(cut & self._alive(rows)), score, rows.region)
        return rows.layout.stored_order(left)

    def _lines(self, x: Tensor) -> Tensor:
        """(slices, weights of each): the slices by whose lengths the norm divides."""
        return x.reshape(1, -1) if self.target.norm in (None, -1) else fold_lines(x, self.target.norm)

    def _spared(self, cut: Tensor) -> Tensor:
        """Bool unit grid: of each slice that would be all zero, the unit with its largest weight stays.

        A norm cannot divide by the length of zeros: the slice would become NaN.
        """
        kept = self.whole_units.whole()
        left = torch.cat([self._without(cut, rows).reshape(rows.of_shape(self.shape)) for rows in self.rows]) & kept
        sizes = torch.where(kept, self.weight().abs(), -1)
        empty = ~self._lines(left).any(1, keepdim=True)
        places = self._lines(torch.arange(kept.numel(), device=kept.device).view(self.shape))
        largest = places.gather(1, self._lines(sizes).argmax(1, keepdim=True))[empty]
        marks = torch.zeros(kept.numel(), device=kept.device).scatter_(0, largest, 1).view(self.shape)
        return fold_blocks(self.place.layout.view(marks), self.place.region, "max") > 0

    def indivisible(self) -> bool:
        """Whether each unit is the only one of a slice that a norm divides by, so that none can be cut."""
        if not self.pattern.folds_linearly:  # an N:M group keeps N
            return False
        numbers = torch.arange(math.prod(self.grid), device=self.keep.device).view(self.grid)
        lines = self._lines(self.place.layout.store(stretch_blocks(numbers, self.place.region), self.shape))
        alone = lines.amin(1)[lines.amin(1) == lines.amax(1)]
        return len(alone.unique()) == numbers.numel()

    def zeros(self) -> Tensor:
        """0-dim int64: number of zeros in the local weight, counted from its values."""
        weight = self.weight()
        return weight.numel() - torch.count_nonzero(weight)


def to_plain(score: Tensor | None) -> Any:
    """A score as it is saved: contiguous, or None."""
    return None if score is None else score.contiguous()
