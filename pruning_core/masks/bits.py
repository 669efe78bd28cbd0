"""A mask as bits: one per weight, in storage order, eight to a byte, the first in the lowest bit; set = kept.

To be applied, bits are spread to int8, -1 = kept and 0 = cut. Sign-extended to the width of the weight, that is one
vectorised bitwise *and*, which leaves exact +0.0 whatever stood there. It is done in parts that stay in the cache: that
is faster than a mask of bytes, and takes an eighth of its memory.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
PART = 1 << 19
"""Weights that a thread of a CPU works on at a time: two megabytes of float32."""
GATHER = 0x0102040810204080
"""Times eight bytes of 0 or 1, read as one little-endian integer: the highest byte has them as bits, in order."""


class Bits:
    """The mask of one weight; everything is kept at first. Bits that fill up the last byte are 0."""

    def __init__(self, shape: tuple[int, ...], device: torch.device) -> None:
        self.shape, self.count = shape, math.prod(shape)
        self.packed = torch.full((-(-self.count // 8),), 0xFF, dtype=torch.uint8, device=device)
        if self.count % 8:
            self.packed[-1] = (1 << self.count % 8) - 1

    @property
    def device(self) -> torch.device:
        """Where the bits are."""
        return self.packed.device

    def to(self, device: torch.device) -> Bits:
        """A copy on that device."""
        copy = Bits(self.shape, device)
        copy.packed.copy_(self.packed)
        return copy

    def kept(self, first: int, count: int) -> Tensor:
        """Bool, flat: which of ``count`` weights from ``first`` on are kept."""
        return self._spread(1, first, count).view(torch.bool)

    def whole(self) -> Tensor:
        """Bool, in the shape of the weight: which weights are kept."""
        return self.kept(0, self.count).view(self.shape)

    def _spread(self, kept: int, first: int, count: int) -> Tensor:
        """int8, flat: ``kept`` or 0 for ``count`` weights from ``first`` on."""
        some = self.packed if count == self.count else self.packed[first // 8 : -(-(first + count) // 8)]
        wide = _eight(kept, self.device).index_select(0, some.int()).view(torch.int8)
        return wide if wide.numel() == count else wide[first % 8 : first % 8 + count]

    def keep_only_(self, kept: Tensor, first: int = 0) -> None:
        """Cuts, of the weights from ``first`` on, those where ``kept`` (bool, any shape) is False."""
        lead, last = first % 8, first + kept.numel()
        touched = slice(first // 8, -(-last // 8))
        eights = kept.new_empty(8 * (touched.stop - touched.start))
        eights[:8] = eights[-8:] = True
        eights[lead : lead + kept.numel()].view(kept.shape).copy_(kept)
        self.packed[touched] &= eights.view(torch.int64).mul_(GATHER).bitwise_right_shift_(56).to(torch.uint8)

    def intersect_(self, other: Bits) -> None:
        """Cuts what ``other`` cuts."""
        self.packed &= other.packed

    def without(self, other: Bits) -> Bits:
        """What is kept here and cut there."""
        rest = self.to(self.device)
        rest.packed &= ~other.packed
        return rest

    def load_(self, packed: Tensor) -> None:
        """Takes over saved bits; ValueError unless there are as many, and 0 where they fill up the last byte."""
        if packed.dtype != torch.uint8 or packed.shape != self.packed.shape:
            got = f"{packed.dtype} of shape {tuple(packed.shape)}"
            raise ValueError(f"a mask of {self.count} weights has {len(self.packed)} bytes, got {got}")
        if self.count % 8 and int(packed[-1]) >> self.count % 8:
            raise ValueError(f"a mask of {self.count} weights has no bit behind them, got {int(packed[-1])} at the end")
        self.packed.copy_(packed)

    def apply_(self, weight: Tensor) -> None:
        """``w = w where kept else +0.0``, in place."""
        numbers = weight.view(INTEGERS[weight.element_size()])
        rows = numbers.view(-1) if numbers.is_contiguous() else numbers
        row = math.prod(rows.shape[1:])
        for part in parts(rows.shape, self.device):
            some = rows[part]
            some.bitwise_and_(self._spread(-1, part.start * row, some.numel()).view(some.shape))

    def count_cut(self) -> Tensor:
        """0-dim int64: the number of weights that are cut."""
        return self.count - self.count_kept()

    def count_kept(self) -> Tensor:
        """0-dim int64: the number of weights that are kept."""
        kept = torch.zeros((), dtype=torch.int64, device=self.device)
        for part in parts((len(self.packed), 8), self.device):
            kept += _ones_in_a_byte(self.device).index_select(0, self.packed[part].int()).sum()
        return kept

    def checksum(self) -> int:
        """CRC-32 of the bits."""
        return zlib.crc32(self.packed.cpu().numpy().tobytes())


def part_size(device: torch.device) -> int:
    """Weights to work on at a time: on a CPU what its caches hold, on a GPU enough to hide the launches."""
    return min(PART * torch.get_num_threads(), 1 << 22) if device.type == "cpu" else 1 << 24


def parts(shape: tuple[int, ...], device: torch.device) -> Iterator[slice]:
    """Ranges of the first axis of about ``part_size`` weights."""
    step = max(part_size(device) // max(math.prod(shape[1:]), 1), 1)
    return (slice(first, min(first + step, shape[0])) for first in range(0, shape[0], step))


@cache
def _eight(kept: int, device: torch.device) -> Tensor:
    """int64 (256,): for each byte eight int8, ``kept`` where a bit is set and else 0, read as one number."""
    bits = (torch.arange(256).unsqueeze(1) >> torch.arange(8)) & 1
    return (kept * bits).to(torch.int8).view(torch.int64).flatten().to(device)


@cache
def _ones_in_a_byte(device: torch.device) -> Tensor:
    """int64 (256,): how many bits of each byte are set."""
    return ((torch.arange(256).unsqueeze(1) >> torch.arange(8)) & 1).sum(1).to(device)
