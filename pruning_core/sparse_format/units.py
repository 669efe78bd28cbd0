"""Units of a saved tensor: what the mask has one code for.

Here a tensor is a plain array, as in a state dict: which axis is "input channels" is not known. A kind of unit says
which weights are ``stored`` for a given mask; ``encode`` turns the mask into bytes of a known ``length``, and
``decode`` is the inverse.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pruning_core.checkpoint import Bytes, CheckpointError, pack_bits, unpack_bits

Flags = NDArray[np.bool_]
LARGEST_GROUP = 8
CROP = 480
PROBE = 64
FACTORS = (2, 3, 5, 7)


@dataclass(frozen=True)
class Blocks:
    """Blocks of ``extents`` weights, one bit each, set where any weight is kept. ``(1, 1)``: single weights.

    Blocks at the far edges may be smaller.
    """

    extents: tuple[int, ...]

    def __str__(self) -> str:
        return "x".join(str(extent) for extent in self.extents)

    def alive(self, kept: Flags) -> Flags:
        """Bool unit grid: the blocks with a kept weight."""
        for axis, extent in enumerate(self.extents):
            kept = _any(kept, axis, extent)
        return kept

    def grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the unit grid."""
        return tuple(-(-length // extent) for length, extent in zip(shape, self.extents, strict=True))

    def encode(self, kept: Flags) -> Bytes:
        """One bit per block, in row-major order."""
        return pack_bits(self.alive(kept))

    def length(self, shape: tuple[int, ...]) -> int:
        """Number of bytes of the mask."""
        return -(-math.prod(self.grid(shape)) // 8)

    def decode(self, data: Bytes, shape: tuple[int, ...]) -> Flags:
        """The stored weights, from the bytes of ``encode``."""
        grid = self.grid(shape)
        return self.spread(unpack_bits(data, math.prod(grid)).reshape(grid), shape)

    def spread(self, alive: Flags, shape: tuple[int, ...]) -> Flags:
        """Unit grid -> the weights whose values are stored: all of each block that is alive."""
        for axis, (extent, length) in enumerate(zip(self.extents, shape, strict=True)):
            if extent > 1:
                alive = np.repeat(alive, extent, axis)[(slice(None),) * axis + (slice(0, length),)]
        return alive

    def stored(self, kept: Flags) -> Flags:
        """The weights whose values are stored, for a mask of kept weights."""
        if self.is_single:
            return kept
        return self.spread(self.alive(kept), kept.shape)

    @property
    def is_single(self) -> bool:
        """Whether each weight is a unit of its own."""
        return all(extent == 1 for extent in self.extents)

    def mask_bits(self, alive: Flags) -> float:
        """The entropy of a unit grid, in bits."""
        count = int(np.count_nonzero(alive))
        return alive.size * entropy([count, alive.size - count])


@dataclass(frozen=True)
class Combinations:
    """N:M along ``axis``: ``n`` of every ``m`` weights are stored; which, is a digit in base ``C(m, n)``."""

    n: int
    m: int
    axis: int

    @classmethod
    def of(cls, n: int, m: int, axis: int) -> Combinations:
        """N:M; ValueError for groups that are too large for a code."""
        if m > LARGEST_GROUP:
            raise ValueError(
                f"pattern: groups of more than {LARGEST_GROUP} have no code of their own, got {n}:{m}; leave it out"
            )
        return cls(n, m, axis)

    def __str__(self) -> str:
        return f"{self.n}:{self.m} along {self.axis}"

    @property
    def combinations(self) -> int:
        """``C(m, n)``, the base of the digits."""
        return math.comb(self.m, self.n)

    @property
    def per_byte(self) -> int:
        """The number of digits in a byte."""
        return int(math.log(256.5) / math.log(self.combinations))

    def _codes(self) -> NDArray[np.uint8]:
        """Bit j of ``codes[i]``: whether the i-th combination stores weight j."""
        ordered = itertools.combinations(range(self.m), self.n)
        return np.array([sum(1 << j for j in chosen) for chosen in ordered], dtype=np.uint8)

    def _filled(self) -> NDArray[np.uint8]:
        """Set of kept weights -> the first combination that stores them all; 255 where there are too many."""
        codes = self._codes()
        filled = np.full(1 << self.m, 255, dtype=np.uint8)
        for kept in range(1 << self.m):
            fits = np.flatnonzero(codes & kept == kept)
            if len(fits):
                filled[kept] = fits[0]
        return filled

    def _sets(self, flags: Flags) -> NDArray[np.uint8]:
        """The flags of each group as the bits of one number."""
        groups = np.ascontiguousarray(np.moveaxis(flags, self.axis, -1))
        if 8 % self.m:
            return np.packbits(groups.reshape(-1, self.m), axis=-1, bitorder="little").reshape(-1)
        together = pack_bits(groups)  # several groups in a byte
        sets = np.empty((len(together), 8 // self.m), dtype=np.uint8)
        for i in range(8 // self.m):
            sets[:, i] = (together >> (i * self.m)) & ((1 << self.m) - 1)
        return sets.reshape(-1)[: flags.size // self.m]

    def _chosen(self, kept: Flags) -> NDArray[np.uint8]:
        return self._filled()[self._sets(kept)]

    def encode(self, kept: Flags) -> Bytes:
        """One digit per group along ``axis``, the first digit of a byte lowest."""
        chosen = self._chosen(kept)
        digits = np.zeros((-(-len(chosen) // self.per_byte), self.per_byte), dtype=np.uint8)
        digits.reshape(-1)[: len(chosen)] = chosen
        data = np.zeros(len(digits), dtype=np.uint8)
        for digit in reversed(digits.T):
            data = data * self.combinations + digit
        return data.astype(np.uint8, copy=False)

    def length(self, shape: tuple[int, ...]) -> int:
        """Number of bytes of the mask."""
        return -(-(math.prod(shape) // self.m) // self.per_byte)

    def decode(self, data: Bytes, shape: tuple[int, ...]) -> Flags:
        """The stored weights, from the bytes of ``encode``; CheckpointError for a byte out of range."""
        if len(data) and int(data.max()) >= self.combinations**self.per_byte:
            raise CheckpointError(f"has a byte that names no combination of {self.n}:{self.m}")
        digits = np.empty((len(data), self.per_byte), dtype=np.uint8)
        for i in range(self.per_byte):
            data, digits[:, i] = np.divmod(data, self.combinations)
        return self._spread(digits.reshape(-1)[: math.prod(shape) // self.m], shape)

    def _spread(self, chosen: NDArray[np.uint8], shape: tuple[int, ...]) -> Flags:
        flags = np.unpackbits(self._codes()[chosen][:, None], axis=-1, count=self.m, bitorder="little")
        moved = (*shape[: self.axis], *shape[self.axis + 1 :], shape[self.axis])
        return np.ascontiguousarray(np.moveaxis(flags.view(np.bool_).reshape(moved), -1, self.axis))

    def stored(self, kept: Flags) -> Flags:
        """The weights whose values are stored, for a mask of kept weights: always ``n`` of ``m``."""
        return self._spread(self._chosen(kept), kept.shape)

    def holds(self, kept: Flags) -> bool:
        """Whether the mask keeps at most ``n`` of every ``m``."""
        if kept.shape[self.axis] % self.m:
            return False
        return most_kept(kept, self.m, self.axis) <= self.n


def most_kept(kept: Flags, m: int, axis: int) -> int:
    """The largest number of weights kept in any group of ``m``."""
    sizes = np.array([each.bit_count() for each in range(1 << m)], dtype=np.uint8)
    return int(sizes[Combinations(1, m, axis)._sets(kept)].max(initial=0))


Units = Blocks | Combinations


def to_plain(units: Units) -> dict[str, Any]:
    """Units as they stand in the head of a packed weight."""
    if isinstance(units, Blocks):
        return {"blocks": list(units.extents)}
    return {"choices": [units.n, units.m], "axis": units.axis}


def from_plain(plain: dict[str, Any], shape: tuple[int, ...]) -> Units:
    """The units that a head names; CheckpointError where they do not fit the shape."""
    match plain:
        case {"blocks": [*extents]} if len(plain) == 1 and len(extents) == len(shape):
            pairs = zip(extents, shape, strict=True)
            if all(type(extent) is int and 1 <= extent <= max(length, 1) for extent, length in pairs):
                return Blocks(tuple(extents))
        case {"choices": [int(n), int(m)], "axis": int(axis)} if len(plain) == 2:
            if 0 < n < m <= LARGEST_GROUP and 0 <= axis < len(shape) and shape[axis] % m == 0:
                return Combinations(n, m, axis)
    raise CheckpointError(f"names units that do not fit the shape {list(shape)}, got {plain!r:.80}")


def find(kept: Flags, value_bits: float) -> Units:
    """The units that need the fewest bits for this mask and its stored values.

    Blocks grow greedily from single weights. A large tensor is searched on a corner; the winner is then compared on the
    whole tensor, so that an unusual corner costs bytes, never a value.
    """
    single = Blocks((1,) * kept.ndim)
    count = int(np.count_nonzero(kept))
    corner = kept[tuple(slice(0, CROP) for _ in kept.shape)]
    if not 0.25 * count * corner.size <= np.count_nonzero(corner) * kept.size <= 4 * count * corner.size:
        corner = kept
    best: Units = single
    best_bits = _mask_cost(kept) + count * value_bits
    grown = Blocks(_reaching(_grow(corner, value_bits), corner.shape, kept.shape))
    if not grown.is_single:
        alive = grown.alive(kept)
        stored = int(np.count_nonzero(grown.spread(alive, kept.shape)))
        bits = _mask_cost(alive) + stored * value_bits
        if bits < best_bits:
            best, best_bits = grown, bits
    for choices in _choices(corner):
        if choices.holds(kept):
            groups = kept.size / choices.m
            bits = groups * (8 / choices.per_byte + choices.n * value_bits)
            if bits < best_bits:
                best, best_bits = choices, bits
    return best


def _mask_cost(alive: Flags) -> float:
    """Bits of a mask as it is coded: a byte takes at least one bit in a Huffman code."""
    return max(Blocks((1,) * alive.ndim).mask_bits(alive), alive.size / 8)


def _grow(kept: Flags, value_bits: float) -> tuple[int, ...]:
    """The extents at which greedy growth ends. Each step works on the ever smaller grid of the step before."""
    shape, extents, alive = kept.shape, [1] * kept.ndim, kept
    best = _mask_cost(kept) + int(np.count_nonzero(kept)) * value_bits
    while True:
        found = None
        for axis, length in enumerate(alive.shape):
            for factor in sorted({*FACTORS, length}):
                if 1 < factor <= length:
                    grown = _any(alive, axis, factor)
                    bits = _bits(grown, axis, factor, extents, shape, value_bits)
                    if bits < best:
                        best, found = bits, (axis, factor, grown)
        if found is None:
            return tuple(extents)
        axis, factor, alive = found
        extents[axis] = min(extents[axis] * factor, shape[axis])


def _bits(alive: Flags, axis: int, factor: int, extents: list[int], shape: tuple[int, ...], value_bits: float) -> float:
    """Bits of mask and values, for a grid that was grown by ``factor`` along ``axis``."""
    grown = [extent * factor if i == axis else extent for i, extent in enumerate(extents)]
    if all(length % extent == 0 for length, extent in zip(shape, grown, strict=True)):
        stored = int(np.count_nonzero(alive)) * math.prod(grown)
    else:
        stored = _weights_in(alive, grown, shape)
    return _mask_cost(alive) + stored * value_bits


def _weights_in(alive: Flags, extents: list[int], shape: tuple[int, ...]) -> int:
    """Number of weights in living blocks, where those at the edges are smaller; axis by axis, to save memory."""
    counts: NDArray[Any] = alive
    for length, extent in zip(reversed(shape), reversed(extents), strict=True):
        along = np.full(counts.shape[-1], extent, dtype=np.int64)
        along[-1:] = length - extent * (len(along) - 1)
        counts = counts @ along if counts.dtype != np.bool_ else np.einsum("...i,i->...", counts, along)
    return int(counts)


def _reaching(extents: tuple[int, ...], corner: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """A block that spans the corner along an axis spans the whole tensor."""
    axes = zip(extents, corner, shape, strict=True)
    return tuple(whole if extent == part else extent for extent, part, whole in axes)


def _choices(kept: Flags) -> list[Combinations]:
    """The N:M that hold in a part of the tensor, at most one per group size and axis."""
    found = []
    for axis, length in enumerate(kept.shape[:2]):
        for m in (2, 4, LARGEST_GROUP):
            if length % m == 0 and kept.size and most_kept(kept[:PROBE, :PROBE], m, axis) < m:
                most = most_kept(kept, m, axis)
                if 0 < most < m:
                    found.append(Combinations(most, m, axis))
    return found


def _any(flags: Flags, axis: int, extent: int) -> Flags:
    """Whether any of ``extent`` neighbours along the axis is set; the last group may be smaller."""
    if extent == 1:
        return flags
    if extent >= flags.shape[axis]:
        return np.asarray(flags.any(axis, keepdims=True))
    front = (slice(None),) * axis
    lanes = [flags[(*front, slice(i, None, extent))] for i in range(extent)]
    result = lanes[0].copy()
    for lane in lanes[1:]:
        part = result[(*front, slice(0, lane.shape[axis]))]
        np.logical_or(part, lane, out=part)
    return result


def entropy(counts: Sequence[int] | NDArray[Any]) -> float:
    """Bits per symbol, for independent symbols with these counts."""
    shares = np.asarray(counts, dtype=np.float64)
    shares = shares[shares > 0] / max(float(shares.sum()), 1.0)
    return float(-(shares * np.log2(shares)).sum())
