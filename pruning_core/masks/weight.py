"""One weight with its mask and its running score.

Masks are stored as int8, -1 = kept and 0 = cut: sign-extended to the width of the weight, the mask and the weight's
own bits are one vectorised *and*, which leaves exact +0.0 whatever stood there.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pruning_core.bits import pack_bits, unpack_bits
from pruning_core.masks.options import LOCK, PrunerOptions
from pruning_core.masks.sharding import Place, local, place
from pruning_core.patterns import parse_pattern
from pruning_core.selection import Target

BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class MaskedWeight:
    """``keep`` cuts the weight; ``whole_units`` is the part of it made of whole units (another tensor only while
    progressive pruning is between the two). ``score`` is folded into units when the fold is linear. ``sizes``: weights
    per unit, of the units seen here; ``largest`` and ``capacity``: the largest and all of them, over all ranks."""

    def __init__(self, target: Target, options: PrunerOptions) -> None:
        self.target, self.options = target, options
        self.pattern = parse_pattern("1x1") if options.kind == LOCK else options.parsed_pattern  # no units to respect
        self.place: Place = place(target.name, target.parameter, target.layout, self.pattern)
        self.parameter = target.parameter
        here = local(target.parameter)
        self.shape = tuple(here.shape)
        self.keep = torch.full_like(here, -1, dtype=torch.int8, requires_grad=False)
        self.whole_units = self.keep
        self.score: Tensor | None = None
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
        """Number of weights in all, over all ranks."""
        return self.target.parameter.numel()

    def weight(self) -> Tensor:
        """The weight stored here, without autograd but with its version counter."""
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
        gradient = self.target.parameter.grad
        return None if gradient is None else local(gradient.detach())

    def apply_(self) -> None:
        mask_(self.weight(), self.keep)

    def view(self, x: Tensor) -> Tensor:
        """Stored shape -> (G, O, K, I)."""
        return self.place.layout.view(x)

    def observe(self, rate: Tensor | float, bad: Tensor | None) -> None:
        """Takes this step's gradient into the score. ``rate`` undoes a loss scale; where ``bad``, nothing changes."""
        weight, gradient = self.weight(), self.gradient()
        criterion = self.options.criterion
        if gradient is None:
            new = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        else:
            new = criterion.score(weight, gradient)
        new = criterion.each_step(self.fold(new) if self.stores_units else new)
        rate = rate**criterion.degree
        gain = rate * self.options.momentum_gain if criterion.accumulates else rate
        old = self.score
        if old is None:
            old = self.score = torch.zeros_like(new)
        if bad is not None:  # the verdict is on a device: choose there, without waiting for it
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
        """Stored shape -> the unit grid of what is here, with edge units on their own scale."""
        grid = self.pattern.fold(self.view(score), self.place.region, self.options.criterion_reduce_type)
        if self.options.criterion_reduce_type != "mean":
            return grid
        return grid if isinstance(self.sizes, int) and self.sizes == 1 else grid / self.sizes

    def _here(self, grid: Tensor) -> Tensor:
        """The part of a whole weight's unit grid that this rank sees."""
        piece = self.place.slice
        if piece is None:
            return grid
        rows = piece.rows_here(self.place.region.extents[piece.axis])
        return grid.narrow(piece.axis, min(rows.start, grid.shape[piece.axis]), len(rows))

    def _raw_elements(self) -> Tensor:
        """Sums that no unit has finished yet, in the stored shape; only for weights that do not store units."""
        criterion = self.options.criterion
        if not criterion.needs_gradient:
            return criterion.each_step(criterion.score(self.weight(), None))
        assert self.score is not None and not self.stores_units
        return self.score

    def element_scores(self) -> Tensor:
        """Each weight as a unit of its own, in the stored shape."""
        return self.options.criterion.finish(self._raw_elements())

    @property
    def folds_fast(self) -> bool:
        """Unit scores are cheap enough to be computed again for every digit of the selection."""
        return self.pattern.folds_linearly

    def unit_sums(self) -> Tensor:
        """The unit grid before ``finish_units``, partial where a unit reaches over the border of a slice."""
        criterion = self.options.criterion
        if not self.stores_units:
            return self.fold(self._raw_elements() if self._finishes_units else self.element_scores())
        if criterion.needs_gradient:
            assert self.score is not None
            return self.score
        return criterion.each_step(self.fold(criterion.score(self.weight(), None)))

    def finish_units(self, sums: Tensor) -> Tensor:
        """The unit grid of scores, of sums that are complete over all ranks."""
        return self.options.criterion.finish(sums) if self._finishes_units else sums

    @property
    def _finishes_units(self) -> bool:
        """Sums of weights can be finished as a whole; where a unit picks among its weights, each finishes its own."""
        return self.pattern.folds_linearly and self.options.criterion_reduce_type != "max"

    def alive(self) -> Tensor:
        """Unit grid: not cut yet."""
        return self.pattern.alive(self.view(self.whole_units), self.place.region)

    def owned(self, grid: Tensor) -> Tensor:
        """The part of a unit grid that this rank decides on."""
        piece = self.place.slice
        if piece is None:
            return grid
        rows = piece.owned(self.place.region.extents[piece.axis])
        return grid[(slice(None),) * piece.axis + (rows,)]

    def flat(self, grid_or_view: Tensor) -> Tensor:
        """In the order in which the weight is stored; ties are broken by it."""
        return self.place.layout.stored_order(grid_or_view).flatten()

    def unflat(self, flat: Tensor, like: Tensor) -> Tensor:
        order = self.place.layout
        return order.from_stored_order(flat.view(order.stored_order(like).shape))

    def cut_units_(self, cut: Tensor) -> None:
        """Cuts the units of a bool grid (those of this rank and, at borders, of its neighbours)."""
        newly = cut & self.alive()
        score = None if self.pattern.folds_linearly else self.view(self.element_scores())
        keep = self.pattern.spread(~newly, score, self.place.region)
        self.whole_units.mul_(self.place.layout.store(keep, self.shape))

    def zeros(self) -> Tensor:
        """How many of the weights stored here are zero, counted from the weights."""
        weight = self.weight()
        return weight.numel() - torch.count_nonzero(weight)


def mask_(weight: Tensor, keep: Tensor) -> None:
    """``weight <- weight where keep, else +0.0``; in place, no new storage."""
    weight.view(BITS[weight.element_size()]).bitwise_and_(keep)


def pack(keep: Tensor) -> Tensor:
    """A mask as bits, eight to a byte."""
    return torch.from_numpy(pack_bits((keep != 0).cpu().numpy()))


def unpack(bits: Tensor, like: Tensor) -> Tensor:
    """The inverse of ``pack``."""
    flags = unpack_bits(bits.cpu().numpy(), like.numel())
    return torch.from_numpy(flags.view(np.int8)).neg().view(like.shape).to(like.device)


def checksum(keep: Tensor) -> int:
    return zlib.crc32(pack(keep).numpy().tobytes())


def to_plain(score: Tensor | None) -> Any:
    return None if score is None else score.contiguous()
