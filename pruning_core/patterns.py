"""Which weights live and die together: scores are folded into units, a unit mask is spread over the weight.

Every weight is seen as ``(G, O, K, I)``: groups, output channels, kernel positions, input channels (see
``selection.Layout``). A *unit grid* has one entry per unit along each of the four axes. Edges that do not divide make
smaller edge units; no layer is skipped for them.

A rank may hold only a slice of the weight. ``Region`` says which, so that unit borders fall where they fall in the
whole weight; the rank then sees its first unit, its last unit, or both, in part.

A pattern is one class and one registry line: ``parse``, ``units``, ``fold``, ``spread`` and what they need.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor

from pruning_core.registry import Registry

Reduce = Literal["mean", "sum", "max"]
WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""A group's bool flags, read as one number."""
Shape = Sequence[int]


class Region(NamedTuple):
    """The part of a (G, O, K, I) weight that is here: whole shape, extents of a unit, local shape, first index."""

    shape: tuple[int, ...]
    extents: tuple[int, ...]
    local: tuple[int, ...]
    start: tuple[int, ...] = (0, 0, 0, 0)


class Pattern(ABC):
    """Folds scores of shape (G, O, K, I) into a unit grid and spreads a unit grid over (G, O, K, I)."""

    examples: tuple[str, ...] = ()
    """Texts that parse to this kind; the contract tests run over them."""

    @classmethod
    @abstractmethod
    def parse(cls, text: str) -> Self | None:
        """The pattern that ``text`` spells; None when it spells another kind, ValueError when it is malformed."""

    @property
    def max_sparsity(self) -> float:
        """The highest sparsity that the pattern itself allows."""
        return 1.0

    def unfit(self, shape: Shape) -> str | None:
        """Why a weight of this (whole) shape cannot carry the pattern, or None."""
        return None

    @abstractmethod
    def extents(self, shape: Shape) -> tuple[int, int, int, int]:
        """How far a unit reaches along G, O, K and I of a whole weight of this shape."""

    @property
    def folds_linearly(self) -> bool:
        """True when the fold of a sum is the sum of the folds, so that running scores may be stored folded."""
        return False

    @abstractmethod
    def fold(self, score: Tensor, region: Region, reduce: Reduce) -> Tensor:
        """Unit scores. For "mean" it returns the *sum*; ``sizes`` says what to divide by."""

    @abstractmethod
    def spread(self, keep: Tensor, score: Tensor | None, region: Region) -> Tensor:
        """Bool (G, O, K, I): True = kept. ``score`` decides inside a unit where the pattern leaves a choice."""

    @abstractmethod
    def alive(self, kept: Tensor, region: Region) -> Tensor:
        """Bool unit grid: the units that a mask made of whole units has not cut yet."""

    @abstractmethod
    def sizes(self, region: Region) -> int | Tensor:
        """How many weights become zero with a unit: one number, or a grid (of the whole weight) when edges differ."""

    def region(self, shape: Shape) -> Region:
        """The region of a weight that is here as a whole."""
        return Region(tuple(shape), self.extents(shape), tuple(shape))


PATTERNS: Registry[Pattern] = Registry("pattern")


def parse_pattern(text: str) -> Pattern:
    """The pattern that ``text`` spells: ``4x1``, ``1xchannel``, ``2:4``. ValueError for anything else.

    ``oc_pattern_4x1`` and ``tile_pattern_4x1`` mean ``4x1``.

    >>> parse_pattern("2:4").max_sparsity
    0.5
    """
    core = re.sub(r"^\w*pattern_", "", text)
    for name in PATTERNS:
        pattern = PATTERNS[name].parse(core)
        if pattern is not None:
            return pattern
    raise ValueError(
        f"unknown pattern, got {text[:40]!r}; use NxM blocks such as '4x1', '1x1' for single weights, "
        "'1xchannel' or 'channelx1' for channels, N:M such as '2:4'"
    )


def axis_units(length: int, extent: int) -> list[int]:
    """The lengths of the units along one axis: ``axis_units(10, 4) == [4, 4, 2]``."""
    whole, rest = divmod(length, extent)
    return [extent] * whole + ([rest] if rest else [])


def _split(x: Tensor, axis: int, extent: int, start: int, reduce: Reduce) -> Tensor:
    """One axis -> (units, extent); where an edge unit reaches past ``x``, the neutral element of ``reduce``."""
    lead = start % extent
    tail = -(lead + x.shape[axis]) % extent
    if lead or tail:
        pad = [0, 0] * (x.dim() - axis - 1) + [lead, tail]
        x = torch.nn.functional.pad(x, pad, value=-torch.inf if reduce == "max" else 0.0)
    return x.unflatten(axis, (x.shape[axis] // extent, extent))


def _reduce(x: Tensor, axis: int, reduce: Reduce, keepdim: bool = False) -> Tensor:
    if reduce == "max" and x.shape[axis]:
        return x.amax(axis, keepdim)
    return x.sum(axis, keepdim)


def fold_blocks(score: Tensor, region: Region, reduce: Reduce) -> Tensor:
    """(G, O, K, I) -> unit grid: the sum or maximum over each block of ``region.extents``."""
    for axis, extent in enumerate(region.extents):
        if extent == 1:
            continue
        if extent == region.shape[axis]:  # one unit, also for a rank that holds a part of the axis
            score = _reduce(score, axis, reduce, keepdim=True)
        else:
            score = _reduce(_split(score, axis, extent, region.start[axis], reduce), axis + 1, reduce)
    return score


def stretch_blocks(values: Tensor, region: Region) -> Tensor:
    """Unit grid -> (G, O, K, I): each value over all weights of its block."""
    for axis, extent in enumerate(region.extents):
        if extent == 1:
            continue
        if extent == region.shape[axis]:
            sizes = [-1] * values.dim()
            sizes[axis] = region.local[axis]
            values = values.expand(sizes)
        else:
            wide = values.unsqueeze(axis + 1).expand(*values.shape[: axis + 1], extent, *values.shape[axis + 1 :])
            values = wide.flatten(axis, axis + 1).narrow(axis, region.start[axis] % extent, region.local[axis])
    return values


@PATTERNS.add("block")
@dataclass(frozen=True)
class Block(Pattern):
    """``NxM``: N output channels by M input channels at one kernel position.

    ``1xchannel`` is a whole filter, ``channelx1`` a whole input channel, ``channelx64`` 64 of them together; kernel
    positions are included, and the extents along the whole axes are None.
    """

    out_channels: int | None
    in_channels: int | None
    examples = ("1x1", "4x1", "2x3", "1x4", "1xchannel", "channelx1")

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """``NxM``, ``Nxchannel`` or ``channelxM``; None for other text."""
        match = re.fullmatch(r"(\d+|channel)x(\d+|channel)", text)
        if match is None or match[1] == match[2] == "channel":
            return None
        n, m = (None if each == "channel" else int(each) for each in match.groups())
        if n == 0 or m == 0:
            raise ValueError(f"a block needs at least one row and one column, got {text!r}; use for example '4x1'")
        return cls(n, m)

    def __str__(self) -> str:
        return f"{self.out_channels or 'channel'}x{self.in_channels or 'channel'}"

    @property
    def folds_linearly(self) -> bool:
        """True: the fold is a sum over the block."""
        return True

    def extents(self, shape: Shape) -> tuple[int, int, int, int]:
        """``(1, N, 1, M)``, clipped to the weight; a channel spans K and the other channel axis."""
        _, O, K, I = shape  # noqa: E741
        if self.out_channels is None or self.in_channels is None:
            return 1, min(self.out_channels or O, O), K, min(self.in_channels or I, I)
        return 1, min(self.out_channels, O), 1, min(self.in_channels, I)

    def fold(self, score: Tensor, region: Region, reduce: Reduce) -> Tensor:
        """Sums (or maxima) over the blocks."""
        return fold_blocks(score, region, reduce)

    def spread(self, keep: Tensor, score: Tensor | None, region: Region) -> Tensor:
        """Repeats each unit's verdict over its weights; ``score`` is not used."""
        return stretch_blocks(keep, region)

    def alive(self, kept: Tensor, region: Region) -> Tensor:
        """The first weight of each block: blocks are cut whole."""
        # A unit is cut as a whole, so its first weight tells.
        for axis, extent in enumerate(region.extents):
            lead = region.start[axis] % extent
            if extent == 1:
                continue
            if extent == region.shape[axis]:
                kept = kept[(slice(None),) * axis + (slice(0, 1),)]
            elif lead == 0:
                kept = kept[(slice(None),) * axis + (slice(None, None, extent),)]
            else:
                first = [0, *range(extent - lead, kept.shape[axis], extent)] if kept.shape[axis] else []
                kept = kept.index_select(axis, torch.tensor(first, device=kept.device, dtype=torch.int64))
        return kept.bool()

    def sizes(self, region: Region) -> int | Tensor:
        """``N * M`` where the blocks divide the weight, else an int64 grid."""
        axes = list(zip(region.shape, region.extents, strict=True))
        if all(length % extent == 0 for length, extent in axes):
            return math.prod(region.extents)
        size = torch.ones((), dtype=torch.int64)
        for length, extent in axes:
            size = size.unsqueeze(-1) * torch.tensor(axis_units(length, extent))
        return size


@PATTERNS.add("n:m")
@dataclass(frozen=True)
class NinM(Pattern):
    """``N:M``: N weights are kept of every M consecutive input channels at one kernel position.

    The unit is the group of M; its score is that of the M - N weights it would lose. Under a schedule the share of
    cut groups rises; at sparsity ``1 - N/M`` every group is N:M.
    """

    kept: int
    of: int
    examples = ("2:4", "1:4", "3:4")

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """``N:M`` with ``0 < N < M``; None for other text."""
        match = re.fullmatch(r"(\d+):(\d+)", text)
        if match is None:
            return None
        n, m = int(match[1]), int(match[2])
        if not 0 < n < m:
            raise ValueError(f"N:M keeps N of M weights and needs 0 < N < M, got {text!r}; use for example '2:4'")
        return cls(n, m)

    def __str__(self) -> str:
        return f"{self.kept}:{self.of}"

    @property
    def max_sparsity(self) -> float:
        """``1 - N/M``."""
        return 1 - self.kept / self.of

    def unfit(self, shape: Shape) -> str | None:
        """The input channels must be a multiple of M."""
        if shape[3] % self.of:
            return f"its {shape[3]} input channels are not a multiple of {self.of}"
        return None

    def extents(self, shape: Shape) -> tuple[int, int, int, int]:
        """``(1, 1, 1, M)``."""
        return 1, 1, 1, self.of

    def _lanes(self, score: Tensor) -> list[Tensor]:
        """M times (G, O, K, I / M): the first score of each group, the second, and so on; contiguous."""
        return list(score.unflatten(3, (-1, self.of)).movedim(-1, 0).contiguous().unbind())

    def fold(self, score: Tensor, region: Region, reduce: Reduce) -> Tensor:
        """The sum (or maximum) of the M - N lowest scores of each group: what cutting it loses.

        Whole lanes are compared and exchanged, which is vectorised, unlike a sort of millions of tiny rows.
        """
        lanes = self._lanes(score)
        lost = self.of - self.kept
        for i in range(lost):
            for j in range(i + 1, self.of):
                lanes[i], lanes[j] = torch.minimum(lanes[i], lanes[j]), torch.maximum(lanes[i], lanes[j])
        return lanes[lost - 1] if reduce == "max" else sum(lanes[1:lost], lanes[0])

    def spread(self, keep: Tensor, score: Tensor | None, region: Region) -> Tensor:
        """Kept groups stay whole; each cut group loses its M - N lowest scores, ties by index.

        The rank of a score is the number of scores before it in the order (score, index).
        """
        assert score is not None
        lanes = self._lanes(score)
        number = torch.uint8 if self.of < 256 else torch.int32
        ranks = [torch.full_like(lane, self.of - 1 - i, dtype=number) for i, lane in enumerate(lanes)]
        for i, left in enumerate(lanes):
            for j in range(i + 1, self.of):
                left_first = (left <= lanes[j]).view(torch.uint8)
                ranks[i] -= left_first
                ranks[j] += left_first
        lost = self.of - self.kept
        return torch.stack([keep | (rank >= lost) for rank in ranks], -1).flatten(3)

    def alive(self, kept: Tensor, region: Region) -> Tensor:
        """Groups with more than N kept weights."""
        groups = kept.bool().unflatten(3, (-1, self.of))
        if self.of not in WORDS:
            return groups.sum(-1, dtype=torch.int32) > self.kept
        words = groups.flatten().view(WORDS[self.of]).view(groups.shape[:-1])
        ones = int.from_bytes(bytes([1]) * self.of)  # times bytes of 0 and 1: their sum, in the highest byte
        return words * ones >> 8 * (self.of - 1) > self.kept

    def sizes(self, region: Region) -> int | Tensor:
        """``M - N``."""
        return self.of - self.kept
