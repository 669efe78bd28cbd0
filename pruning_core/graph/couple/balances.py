"""Balances: pieces that must keep equal sizes, such as those of a ``chunk``. Channels are restored until they do."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from pruning_core.graph.couple.components import Components


class Balances:
    """Per pair of pieces and unit: the unit's channels on one side minus those on the other."""

    def __init__(self, components: Components, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self.weights: list[dict[int, int]] = []
        self.of_unit: dict[int, list[int]] = {}
        seen = set()
        for left, right in pairs:
            weights = _weights(components, left, right)
            key = frozenset(weights.items())
            if weights and key not in seen:
                seen.add(key)
                for unit in weights:
                    self.of_unit.setdefault(unit, []).append(len(self.weights))
                self.weights.append(weights)

    def off(self, removed: set[int]) -> list[int]:
        """Per pair: channels lost on one side minus those lost on the other."""
        return [sum(weight for unit, weight in weights.items() if unit in removed) for weights in self.weights]

    def restored(self, removed: set[int], score: Mapping[int, float] | None = None) -> set[int]:
        """What can still be removed with all pairs balanced; the best of the heavier side are restored first."""
        removed = set(removed)
        off = self.off(removed)
        open_pairs = [i for i, each in enumerate(off) if each]
        while open_pairs:
            pair = open_pairs[0]
            sign = np.sign(off[pair])
            candidates = [unit for unit, weight in self.weights[pair].items() if unit in removed and weight * sign > 0]
            for unit in sorted(candidates, key=lambda each: self._rank(each, off, score), reverse=True):
                removed.discard(unit)
                for i in self.of_unit[unit]:
                    off[i] -= self.weights[i][unit]
                if off[pair] * sign <= 0:
                    break
            open_pairs = [i for i, each in enumerate(off) if each]
        return removed

    def _rank(self, unit: int, off: list[int], score: Mapping[int, float] | None) -> tuple[int, float]:
        """Sort key: units that improve all their pairs first, then the highest score."""
        gain = sum(abs(off[i]) - abs(off[i] - self.weights[i][unit]) for i in self.of_unit[unit])
        return gain, (score or {}).get(unit, 0.0)


def _weights(components: Components, left: Tensor, right: Tensor) -> dict[int, int]:
    weights: dict[int, int] = {}
    for vector, sign in ((left, 1), (right, -1)):
        units, counts = np.unique(components.of(vector).numpy(), return_counts=True)
        for unit, count in zip(units.tolist(), counts.tolist(), strict=True):
            if unit >= 0:
                weights[unit] = weights.get(unit, 0) + sign * count
    return {unit: weight for unit, weight in weights.items() if weight}
