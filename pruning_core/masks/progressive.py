"""Progressive pruning: between two structured updates, newly doomed units lose their weights in portions.

Each update decides the structured mask (``whole_units``) as basic pruning does. Its new zeros are then cut in
``progressive_steps`` portions spread evenly over the time to the next update, lowest score first (or by position in
the unit: ``linear``). At ``end_step`` the structured mask is applied whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pruning_core.masks.bits import Bits
from pruning_core.masks.budget import Ranked, cut_apart, cut_within, share_of, sortable
from pruning_core.masks.groups import MaskGroup
from pruning_core.masks.options import PrunerOptions
from pruning_core.masks.strips import Strip
from pruning_core.masks.weight import MaskedWeight
from pruning_core.selection import Skipped


class ProgressiveGroup(MaskGroup):
    """A ``MaskGroup`` whose newly cut units lose their weights in ``progressive_steps`` portions."""

    def __init__(self, where: str, options: PrunerOptions, weights: list[MaskedWeight], skipped: list[Skipped]) -> None:
        super().__init__(where, options, weights, skipped)
        self.structured_at = -1  # the structured update whose units are being cut
        self.doomed = [0] * len(weights)  # elements that it doomed, per target, over all ranks
        for weight in weights:
            weight.whole_units = weight.keep.to(weight.keep.device)

    def _portion_steps(self) -> list[int]:
        """The steps at which the portions of the current structured update are due."""
        following = self.table.next_due(self.structured_at)
        if following is None or self.structured_at < self.table.start:
            return []
        span, portions = following - self.structured_at, self.options.progressive_steps
        return [self.structured_at + k * span // portions for k in range(portions)]

    def next_due(self) -> int | None:
        """The next step at which a portion or a structured update is due, None after the last."""
        steps = [step for step in self._portion_steps() if step > self.updated_at]
        structured = self.table.next_due(self.structured_at)
        return min([*steps, *([] if structured is None else [structured])], default=None)

    def update(self, now: int) -> None:
        """Carries out the structured update that is due, if it is new, and the portions due up to ``now``."""
        due = self.table.last_due(now)
        assert due is not None
        if due != self.structured_at:
            self._finish()  # of the update before
            if self.table.sparsity(due) > 0:
                self.cut_units(self.table.sparsity(due))
            self.structured_at = due
            self.doomed = self._count_doomed()
        steps = [step for step in self._portion_steps() if step <= now]
        if due >= self.table.end:
            self._finish()
        elif steps:
            self._cut_portions(len(steps))
        self._passed(max([due, *steps]))

    def _finish(self) -> None:
        """Applies the structured mask whole."""
        for weight in self.weights:
            weight.keep.intersect_(weight.whole_units)

    def _count_doomed(self) -> list[int]:
        """Per weight, over all ranks: how many of its elements are doomed and not cut yet."""
        counts = torch.stack([_remaining(weight).count_kept() for weight in self.weights])
        return (self.ranks.sum_(counts) if self.ranks else counts).tolist()

    def _cut_portions(self, portions: int) -> None:
        """Cuts doomed weights until ``portions`` of the ``progressive_steps`` portions are gone."""
        ranks, left = self.ranks, self._count_doomed()
        if not any(left):
            return
        layers = [
            Ranked(weight.target.name, partial(self._order, weight), 1, weight.weights, remaining)
            for weight, remaining in zip(self.weights, left, strict=True)
        ]
        part = portions / self.options.progressive_steps
        if self.options.pruning_scope == "global":
            amount = share_of(part, sum(self.doomed)) - (sum(self.doomed) - sum(left))
            cuts = cut_within(layers, max(amount, 0), [0] * len(left), left, ranks)
        else:
            gone = [doomed - remaining for doomed, remaining in zip(self.doomed, left, strict=True)]
            cuts = cut_apart(
                layers, [max(share_of(part, d) - g, 0) for d, g in zip(self.doomed, gone, strict=True)], ranks
            )
        for weight, cut in zip(self.weights, cuts, strict=True):
            for rows in weight.rows:
                first, count = weight.span(rows)
                weight.keep.keep_only_(~cut[first : first + count], first)

    def _order(self, weight: MaskedWeight) -> Iterator[Tensor]:
        """Per strip of rows, sort keys that put the remaining doomed weights first, in the order of their cutting."""
        scored = weight.score is not None or not self.options.criterion.needs_gradient
        linear = self.options.progressive_type == "linear" or not scored
        remaining = _remaining(weight)
        for rows in weight.rows:
            order = _positions(rows, weight.keep.device) if linear else rows.layout.view(weight.element_scores(rows))
            yield sortable(weight.flat(order), ~remaining.kept(*weight.span(rows)), first=False)

    def state_dict(self) -> dict[str, Any]:
        """The state of a ``MaskGroup``, with structured masks and the progress of the portions."""
        return {**super().state_dict(), "structured_at": self.structured_at, "doomed": list(self.doomed)}

    def _weight_state(self, weight: MaskedWeight) -> dict[str, Any]:
        return {**super()._weight_state(weight), "whole_units": weight.whole_units.packed.cpu().clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores ``state_dict``."""
        super().load_state_dict(state)
        self.structured_at, self.doomed = state["structured_at"], list(state["doomed"])

    def _load_weight(self, weight: MaskedWeight, state: dict[str, Any]) -> None:
        super()._load_weight(weight, state)
        weight.whole_units.load_(state["whole_units"])


def _remaining(weight: MaskedWeight) -> Bits:
    """The elements that are doomed and not cut yet."""
    return weight.keep.without(weight.whole_units)


def _positions(rows: Strip, device: torch.device) -> Tensor:
    """(G, O, K, I): the position of each weight in its unit, in [0, 1)."""
    region = rows.region
    position = torch.zeros((), device=device)
    for length, start, extent in zip(region.local, region.start, region.extents, strict=True):
        inside = (torch.arange(start, start + length, device=device) % extent).float()
        position = position.unsqueeze(-1) * extent + inside
    size = 1
    for extent in region.extents:
        size *= extent
    return position / size
