"""One weight with its mask and its running score.

Masks are stored as int8, -1 = kept and 0 = cut. Sign-extended to the width of the weight, a mask is applied by one
vectorised bitwise *and*, which leaves exact +0.0 whatever stood there.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pruning_core.checkpoint import pack_bits, unpack_bits
from pruning_core.criteria import fold_lines
from pruning_core.masks.options import LOCK, PrunerOptions
from pruning_core.masks.sharding import Place, local, place
from pruning_core.patterns import fold_blocks, parse_pattern, stretch_blocks
from pruning_core.selection import Target

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class MaskedWeight:
    """A target with its mask ``keep`` and its running ``score``, which is stored per unit where the fold is linear.

    ``whole_units`` is the mask made of whole units; it differs from ``keep`` only between the structured updates of
    progressive pruning. ``observed``: a gradient was looked for since the last update. ``sizes``: weights per unit of
    the local unit grid. ``largest`` and ``capacity``: the size of the largest unit and of all units together, over all
    ranks.
    """

    def __init__(self, target: Target, options: PrunerOptions) -> None:
        self.target, self.options = target, options
        self.pattern = parse_pattern("1x1") if options.kind == LOCK else options.parsed_pattern  # it has no units
        self.place: Place = place(target.name, target.parameter, target.layout, self.pattern)
        self.parameter = target.parameter
        here = local(target.parameter)
        self.shape = tuple(here.shape)
        self.keep = torch.full_like(here, -1, dtype=torch.int8, requires_grad=False)
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

    @property
    def weights(self) -> int:
        """Number of weights, over all ranks."""
        return self.target.parameter.numel()

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

    def gradient(self) -> Tensor | None:
        """The local gradient, or None."""
        gradient = self.target.parameter.grad
        return None if gradient is None else local(gradient.detach())

    def apply_(self) -> None:
        """Zeroes the cut weights in place."""
        mask_(self.weight(), self.keep)

    def view(self, x: Tensor) -> Tensor:
        """Stored shape -> (G, O, K, I)."""
        return self.place.layout.view(x)

    def observe(self, rate: Tensor | float, bad: Tensor | None) -> None:
        """Updates the score with this step's gradient; ``rate`` undoes a loss scale, ``bad`` skips the update.

        Without a gradient there is no score: a 0 would make the weight the first to go.
        """
        self.observed = True
        weight, gradient = self.weight(), self.gradient()
        criterion = self.options.criterion
        if gradient is None and (self.score is None or not criterion.accumulates):
            return
        new = criterion.score(weight, torch.zeros_like(weight) if gradient is None else gradient)
        new = criterion.each_step(self.fold(new) if self.stores_units else new)
        rate = rate**criterion.degree
        gain = rate * self.options.momentum_gain if criterion.accumulates else rate
        old = self.score
        if old is None:
            old = self.score = torch.zeros_like(new)
        if bad is not None:  # a flag on the device: select there, without a host sync
            decay = self.options.momentum_decay if criterion.accumulates else 0.0
            self.score = torch.where(bad, old, old * decay + new * gain)
        elif not criterion.accumulates:
            self.score = new.mul_(gain)
        elif isinstance(gain, Tensor):
            old.mul_(self.options.momentum_decay).add_(new.mul_(gain))
        else:
            if self.options.momentum_decay != 1:
                old.mul_(self.options.momentum_decay)
            old.add_(new, alpha=gain)

    def fold(self, score: Tensor) -> Tensor:
        """Stored shape -> local unit grid; for "mean" each unit is divided by its own size."""
        grid = self.pattern.fold(self.view(score), self.place.region, self.options.criterion_reduce_type)
        if self.options.criterion_reduce_type != "mean":
            return grid
        return grid if isinstance(self.sizes, int) and self.sizes == 1 else grid / self.sizes

    def _here(self, grid: Tensor) -> Tensor:
        """The part of a whole weight's unit grid that this rank's shard touches."""
        piece = self.place.slice
        if piece is None:
            return grid
        rows = piece.rows_here(self.place.region.extents[piece.axis])
        return grid.narrow(piece.axis, min(rows.start, grid.shape[piece.axis]), len(rows))

    def _raw_elements(self) -> Tensor:
        """Element scores before ``Criterion.finish``, in the stored shape; not where units are stored."""
        criterion = self.options.criterion
        if not criterion.needs_gradient:
            return criterion.each_step(criterion.score(self.weight(), None))
        assert self.score is not None and not self.stores_units
        return self.score

    def element_scores(self) -> Tensor:
        """The score of each element as a unit of its own, in the stored shape."""
        return self.options.criterion.finish(self._raw_elements())

    @property
    def folds_fast(self) -> bool:
        """Whether unit scores are cheap enough to be recomputed for every digit of the selection."""
        return self.pattern.folds_linearly

    def unit_sums(self) -> Tensor:
        """The unit grid before ``finish_units``; partial where a unit spans a shard border."""
        criterion = self.options.criterion
        if not self.stores_units:
            return self.fold(self._raw_elements() if self._finishes_units else self.element_scores())
        if criterion.needs_gradient:
            assert self.score is not None
            return self.score
        return criterion.each_step(self.fold(criterion.score(self.weight(), None)))

    def finish_units(self, sums: Tensor) -> Tensor:
        """The unit grid of scores, from sums that are complete over all ranks."""
        return self.options.criterion.finish(sums) if self._finishes_units else sums

    @property
    def _finishes_units(self) -> bool:
        """Whether sums over units are finished; else elements are, since a unit picks among them (N:M, max)."""
        return self.pattern.folds_linearly and self.options.criterion_reduce_type != "max"

    def alive(self) -> Tensor:
        """Bool unit grid: not cut yet."""
        return self.pattern.alive(self.view(self.whole_units), self.place.region)

    def owned(self, grid: Tensor) -> Tensor:
        """The part of a unit grid that this rank owns."""
        piece = self.place.slice
        if piece is None:
            return grid
        rows = piece.owned(self.place.region.extents[piece.axis])
        return grid[(slice(None),) * piece.axis + (rows,)]

    def flat(self, grid_or_view: Tensor) -> Tensor:
        """Flattened in storage order, in which ties are broken."""
        return self.place.layout.stored_order(grid_or_view).flatten()

    def unflat(self, flat: Tensor, like: Tensor) -> Tensor:
        """The inverse of ``flat``, for a tensor shaped as ``like``."""
        order = self.place.layout
        return order.from_stored_order(flat.view(order.stored_order(like).shape))

    def cut_units_(self, cut: Tensor) -> None:
        """Cuts the units of a bool grid (True = cut) from ``whole_units``; the weight does not change."""
        newly = cut & self.alive()
        keep = self._without(newly)
        if self.target.norm is not None:
            keep = self._without(newly & ~self._spared(keep))
        self.whole_units.mul_(keep)

    def _without(self, newly: Tensor) -> Tensor:
        """Bool, stored shape: what these units leave of the weight."""
        score = None if self.pattern.folds_linearly else self.view(self.element_scores())
        return self.place.layout.store(self.pattern.spread(~newly, score, self.place.region), self.shape)

    def _lines(self, x: Tensor) -> Tensor:
        """(slices, weights of each): the slices by whose lengths the norm divides."""
        return x.reshape(1, -1) if self.target.norm in (None, -1) else fold_lines(x, self.target.norm)

    def _spared(self, keep: Tensor) -> Tensor:
        """Bool unit grid: of each slice that would be all zero, the unit with its largest weight stays.

        A norm cannot divide by the length of zeros: the slice would become NaN.
        """
        sizes = torch.where(self.whole_units != 0, self.weight().abs(), -1)
        empty = ~self._lines(keep & (self.whole_units != 0)).any(1, keepdim=True)
        places = self._lines(torch.arange(keep.numel(), device=keep.device).view(self.shape))
        largest = places.gather(1, self._lines(sizes).argmax(1, keepdim=True))[empty]
        marks = torch.zeros(keep.numel(), device=keep.device).scatter_(0, largest, 1).view(self.shape)
        return fold_blocks(self.view(marks), self.place.region, "max") > 0

    def indivisible(self) -> bool:
        """Whether each unit is the only one of a slice that a norm divides by, so that none can be cut."""
        if not self.pattern.folds_linearly:  # an N:M group keeps N
            return False
        grid = self.alive()
        numbers = torch.arange(grid.numel(), device=grid.device).view(grid.shape)
        lines = self._lines(self.place.layout.store(stretch_blocks(numbers, self.place.region), self.shape))
        alone = lines.amin(1)[lines.amin(1) == lines.amax(1)]
        return len(alone.unique()) == grid.numel()

    def zeros(self) -> Tensor:
        """0-dim int64: number of zeros in the local weight, counted from its values."""
        weight = self.weight()
        return weight.numel() - torch.count_nonzero(weight)


def mask_(weight: Tensor, keep: Tensor) -> None:
    """``w = w where keep else +0.0``, in place and without a copy; ``keep``: int8, -1 = kept, 0 = cut."""
    weight.view(BITS[weight.element_size()]).bitwise_and_(keep)


def pack(keep: Tensor) -> Tensor:
    """A mask as packed bits (uint8)."""
    return torch.from_numpy(pack_bits((keep != 0).cpu().numpy()))


def unpack(bits: Tensor, like: Tensor) -> Tensor:
    """The inverse of ``pack``: an int8 mask shaped as ``like``."""
    flags = unpack_bits(bits.cpu().numpy(), like.numel())
    return torch.from_numpy(flags.view(np.int8)).neg().view(like.shape).to(like.device)


def checksum(keep: Tensor) -> int:
    """CRC-32 of the packed mask."""
    return zlib.crc32(pack(keep).numpy().tobytes())


def to_plain(score: Tensor | None) -> Any:
    """A score as it is saved: contiguous, or None."""
    return None if score is None else score.contiguous()
