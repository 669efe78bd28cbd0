"""How many units are cut, and which: exact counts, limits per layer, ties by index, in O(n).

Amounts are counted in *weights*, not in units, so that layers with units of different sizes compete fairly. A cut is
the longest prefix of the ranking that fits: reached is never above asked, and less than one unit below.

Selection is a radix descent over the bits of the float32 scores: three histograms (12 + 10 + 10 bits) per layer locate
the exact score at which the running count meets the amount. Nothing is sorted and no score is gathered from another
rank: with ``ranks`` only the histograms are summed, so the bytes sent do not depend on the size of the model.

Masks are yielded layer by layer. Everything is decided before the first, so the caller may cut while iterating.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Bound = float | Sequence[float]
"""One share for all layers, or one for each."""

LEVELS = ((20, 12), (10, 10), (0, 10))
"""(shift, bits) of the three digits of a 32 bit key."""
HELD = 4
"""Keys of up to 1/16 of a layer's weights are kept from the second digit to the third; beyond, they are read again."""


class Ranks(Protocol):
    """The collectives that selection over several ranks needs. Rank order is index order."""

    def sum_(self, x: Tensor) -> Tensor:
        """The sum of ``x`` over all ranks; may overwrite ``x``."""

    def before(self, x: Tensor) -> Tensor:
        """The sum of ``x`` over the ranks before this one."""
        ...


@dataclass(frozen=True)
class Ranked:
    """One layer as the ranking sees it.

    - ``keys``: yields ``sortable`` scores of the units that this rank owns, flat, in index order, cut units first, in
      one or more parts. Called once per digit, so that only one part's scores are in memory at a time.
    - ``sizes``: weights per unit, one number or a flat int64 tensor beside the scores.
    - ``weights``: number of weights of the layer, over all ranks.
    - ``capacity``: number of its weights that are in units, over all ranks.
    - ``largest``: the size of a whole unit, when another rank may hold larger ones than this.
    """

    name: str
    keys: Callable[[], Iterable[Tensor]]
    sizes: int | Tensor
    weights: int
    capacity: int
    largest: int = 0

    @property
    def unit(self) -> int:
        """The size of a whole unit."""
        if isinstance(self.sizes, int):
            return self.sizes
        return self.largest or (int(self.sizes.max()) if self.sizes.numel() else 1)

    def parts(self) -> Iterator[tuple[Tensor, int | Tensor]]:
        """``keys`` with the sizes beside them."""
        at = 0
        for keys in self.keys():
            yield keys, self.sizes if isinstance(self.sizes, int) else self.sizes[at : at + len(keys)]
            at += len(keys)


def sortable(scores: Tensor, at_end: Tensor | None = None, first: bool = True) -> Tensor:
    """float32 scores -> int32 keys in the same order; where ``at_end``, the lowest key (``first``) or the highest.

    Integer arithmetic on whole vectors: a ``where`` over millions of entries costs ten times as much.
    """
    bits = scores.float().contiguous().view(torch.int32)
    keys = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)
    if at_end is None:
        return keys
    there = at_end.to(torch.int32)
    keys.bitwise_and_(there - 1)  # 0 where at_end
    return keys.bitwise_or_(there * (-0x80000000 if first else 0x7FFFFFFF))


def share_of(ratio: float, weights: int) -> int:
    """``ratio * weights`` to the nearest integer, so that 0.1 of 10 is 1 whatever the binary rounding of 0.1."""
    return math.floor(ratio * weights + 0.5)


def cut_together(
    layers: Sequence[Ranked], share: float, least: Bound, most: Bound, ranks: Ranks | None = None
) -> Iterator[Tensor]:
    """Global scope: cuts the lowest units of all layers together; bool per layer and unit, True = cut.

    Each layer ends between ``min(least, share)`` and ``most``, to one unit; the total is exact.
    """
    return cut_within(layers, *limits(layers, share, least, most), ranks)


def cut_within(
    layers: Sequence[Ranked], asked: int, lows: Sequence[int], highs: Sequence[int], ranks: Ranks | None = None
) -> Iterator[Tensor]:
    """Cuts the lowest units of all layers that fit into ``asked`` weights, ``lows[i]`` to ``highs[i]`` of layer i."""
    low, high = (torch.tensor(list(each), dtype=torch.int64).unsqueeze(1) for each in (lows, highs))

    def meets(upto: Tensor) -> Tensor:
        return _first(upto.clamp(low, high).sum(0) >= asked).expand(len(layers))

    cutoffs = _descend(layers, meets, ranks)
    amounts = [min(max(cutoff.below, lo), hi) for cutoff, lo, hi in zip(cutoffs, lows, highs, strict=True)]
    left = asked - sum(amounts)
    for i, layer in enumerate(layers):  # the ties at the common cutoff, in layer order
        step = layer.sizes if isinstance(layer.sizes, int) else 1
        more = max(0, min(min(cutoffs[i].upto, highs[i]) - amounts[i], left) // step * step)
        amounts[i] += more
        left -= more
    held = [i for i, c in enumerate(cutoffs) if not c.below <= amounts[i] <= c.upto]  # layers held at their own limit
    for i, cutoff in zip(
        held, _descend_apart([layers[i] for i in held], [amounts[i] for i in held], ranks), strict=True
    ):
        cutoffs[i] = cutoff
    return _cut_at(layers, amounts, cutoffs, ranks)


def cut_apart(layers: Sequence[Ranked], amounts: Sequence[int], ranks: Ranks | None = None) -> Iterator[Tensor]:
    """Local scope: cuts in each layer the lowest units that fit into its amount of weights; bool, True = cut."""
    return _cut_at(layers, amounts, _descend_apart(layers, amounts, ranks), ranks)


def limits(layers: Sequence[Ranked], share: float, least: Bound, most: Bound) -> tuple[int, list[int], list[int]]:
    """``(asked, lows, highs)``: the number of weights to cut in all, and the least and most of each layer.

    Limits are rounded down to whole units. Where that leaves too little room for the total (``most`` at or just above
    the share), layers in order cut one unit more, but never their last one. ValueError where it is still too little.
    """
    total = sum(layer.weights for layer in layers)
    asked = share_of(share, total)
    lows, highs = [], []
    leasts, mosts = ([each] * len(layers) if isinstance(each, float | int) else each for each in (least, most))
    for layer, low, high in zip(layers, leasts, mosts, strict=True):
        lows.append(_whole_units(min(low, share), layer))
        highs.append(min(_whole_units(high, layer), layer.capacity))
    missing = asked - sum(highs)
    for i, layer in enumerate(layers):
        if missing >= layer.unit and highs[i] + layer.unit < layer.capacity:
            highs[i] += layer.unit
            missing -= layer.unit
    largest = max((layer.unit for layer in layers), default=1)
    if share * total - sum(highs) >= largest:
        bounds = sorted(set(mosts))
        of = (
            f"{bounds[0]} of every layer" if len(bounds) == 1 else f"{bounds[0]} to {bounds[-1]}, with limits by layer,"
        )
        raise ValueError(
            f"max_sparsity_ratio_per_op: {of} leaves room for {sum(highs)} zeros, got a target that "
            f"needs {asked}; raise it, use smaller units or lower target_sparsity"
        )
    return min(asked, sum(highs)), lows, highs


def _whole_units(ratio: float, layer: Ranked) -> int:
    """Number of weights that a ratio allows, in whole units where all units have one size."""
    step = layer.sizes if isinstance(layer.sizes, int) else 1
    # 1e-6 of a unit absorbs the binary rounding of ratios such as 0.29.
    return math.floor(ratio * layer.weights / step + 1e-6) * step


class _Cutoff(NamedTuple):
    """The key at which a layer's count meets the amount, and the counts below it and up to it."""

    key: int
    below: int
    upto: int


def _descend_apart(layers: Sequence[Ranked], amounts: Sequence[int], ranks: Ranks | None) -> list[_Cutoff]:
    asked = torch.tensor(list(amounts), dtype=torch.int64).unsqueeze(1)
    return _descend(layers, lambda upto: _first(upto >= asked), ranks)


def _descend(layers: Sequence[Ranked], meets: Callable[[Tensor], Tensor], ranks: Ranks | None) -> list[_Cutoff]:
    """Finds the keys digit by digit. ``meets``: counts (layers, digits) up to each digit -> one digit per layer."""
    if not layers:
        return []
    candidates = [_Candidates(layer) for layer in layers]
    key, below, upto = (torch.zeros(len(layers), dtype=torch.int64) for _ in range(3))
    for level, (_, bits) in enumerate(LEVELS):
        counts = torch.stack([each.histogram(int(key[i]), level) for i, each in enumerate(candidates)])
        counts = (ranks.sum_(counts) if ranks else counts).cpu()
        running = below.unsqueeze(1) + counts.cumsum(1)
        digit = meets(running).unsqueeze(1)
        upto = running.gather(1, digit).squeeze(1)
        below = upto - counts.gather(1, digit).squeeze(1)
        key = (key << bits) | digit.squeeze(1)
    return [_Cutoff(*row) for row in torch.stack([key, below, upto], 1).tolist()]


def _first(met: Tensor) -> Tensor:
    """Index of the first True along the last axis, the last index when there is none."""
    met = met.clone()
    met[..., -1] = 1
    return met.to(torch.uint8).argmax(-1)


class _Candidates:
    """The units of a layer among which the cutoff is: all at first; those with its leading digits, while few."""

    def __init__(self, layer: Ranked) -> None:
        self._layer = layer
        self._few: list[tuple[Tensor, int | Tensor]] | None = None

    def histogram(self, prefix: int, level: int) -> Tensor:
        """int64: weights per digit at this level, among the units whose higher digits are ``prefix``."""
        parts = self._narrowed(prefix, level) if level else self._layer.parts()
        return reduce(torch.add, (_counts(keys, sizes, level) for keys, sizes in parts))

    def _narrowed(self, prefix: int, level: int) -> Iterator[tuple[Tensor, int | Tensor]]:
        """The parts of the units whose higher digits are ``prefix``; held from then on, if they are few."""
        held, count = None, 0
        for keys, sizes in self._layer.parts() if self._few is None else self._few:
            chosen = (keys >> LEVELS[level - 1][0]) == _signed(prefix, level - 1)
            keys, sizes = keys[chosen], sizes[chosen] if isinstance(sizes, Tensor) else sizes
            yield keys, sizes
            if held is None:  # one block, since many small ones would hold the pages around them
                held = keys.new_empty((1 if isinstance(sizes, int) else 2, self._layer.weights >> HELD))
            room = held[:, count : count + len(keys)]
            count += len(keys)
            if room.shape[1] == len(keys):
                room[0], room[1:] = keys, sizes
        if held is not None and count <= held.shape[1]:
            self._few = [(held[0, :count], held[1, :count] if len(held) == 2 else self._layer.sizes)]


def _counts(keys: Tensor, sizes: int | Tensor, level: int) -> Tensor:
    """int64: weights per digit at this level."""
    shift, bits = LEVELS[level]
    digits = (keys >> shift) & ((1 << bits) - 1) if level else (keys >> shift) + (1 << (bits - 1))
    if isinstance(sizes, Tensor):
        return torch.bincount(digits, weights=sizes, minlength=1 << bits).round().long()
    return torch.bincount(digits, minlength=1 << bits) * sizes


def _signed(prefix: int, level: int) -> int:
    """The signed key digits of a prefix, whose first digit counts from 0."""
    taken = sum(bits for _, bits in LEVELS[: level + 1])
    return prefix - (1 << (taken - 1))


def _cut_at(
    layers: Sequence[Ranked], amounts: Sequence[int], cutoffs: Sequence[_Cutoff], ranks: Ranks | None
) -> Iterator[Tensor]:
    """Cuts everything below each cutoff and, of the ties, as many as fit into the amount, in index order."""
    rooms = [amount - cutoff.below for amount, cutoff in zip(amounts, cutoffs, strict=True)]
    if ranks is not None and layers:
        ties = [_ties(layer, cutoff.key) for layer, cutoff in zip(layers, cutoffs, strict=True)]
        device = next(iter(layers[0].keys())).device
        earlier = ranks.before(torch.tensor(ties, device=device)).tolist()
        rooms = [room - before for room, before in zip(rooms, earlier, strict=True)]
    return map(_cut, layers, [cutoff.key for cutoff in cutoffs], rooms)


def _ties(layer: Ranked, key: int) -> int:
    """Number of this rank's weights exactly at the cutoff."""
    exact = _signed(key, len(LEVELS) - 1)
    return sum(int(((keys == exact) * sizes).sum()) for keys, sizes in layer.parts())


def _cut(layer: Ranked, key: int, room: int) -> Tensor:
    exact = _signed(key, len(LEVELS) - 1)
    cuts = []
    for keys, sizes in layer.parts():
        cut = keys < exact
        if room > 0:
            tied = (keys == exact).nonzero().squeeze(1)
            taken = (sizes[tied] if isinstance(sizes, Tensor) else torch.full_like(tied, sizes)).cumsum(0)
            cut[tied[taken <= room]] = True
            room -= int(taken[-1]) if len(taken) else 0  # below 0 where one did not fit: none after it is cut
        cuts.append(cut)
    return torch.cat(cuts)
