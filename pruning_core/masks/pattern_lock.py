"""Pattern lock: the zeros that are there when training begins stay; everything else trains."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from pruning_core.masks.groups import MaskGroup
from pruning_core.masks.options import PrunerOptions
from pruning_core.masks.weight import MaskedWeight
from pruning_core.selection import Skipped


class LockedGroup(MaskGroup):
    """``keep = (w != 0)``, element by element, whatever the pattern; the masks never change."""

    def __init__(self, where: str, options: PrunerOptions, weights: list[MaskedWeight], skipped: list[Skipped]) -> None:
        super().__init__(where, options, weights, skipped)
        self.updated_at = self.table.end
        for weight in weights:
            here = weight.weight()
            for rows in weight.rows:
                weight.keep.keep_only_(rows.of(here) != 0, weight.span(rows)[0])
        if not any(bool(weight.keep.count_cut()) for weight in weights) and self.ranks is None:
            warnings.warn(f"{where}: pattern_lock found no zero weight; nothing is locked", stacklevel=2)

    def check_limits(self) -> None:
        """Nothing is cut, so every limit holds."""

    def sparsity(self, now: int) -> float:
        """The share of locked zeros, over all ranks, at any step."""
        zeros = torch.tensor(sum(int(weight.keep.count_cut()) for weight in self.weights))
        if self.ranks is not None:
            self.ranks.sum_(zeros := zeros.to(self.weights[0].keep.device))
        return int(zeros) / max(self.total, 1)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the saved masks and applies them to the weights."""
        super().load_state_dict(state)
        self.apply_()
