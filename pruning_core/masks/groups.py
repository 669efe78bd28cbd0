"""The weights of one pruner, ranked together."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from pruning_core.masks.budget import Ranked, cut_apart, cut_within, limits, sortable
from pruning_core.masks.options import PrunerOptions
from pruning_core.masks.sharding import agree, common_group
from pruning_core.masks.strips import Strip
from pruning_core.masks.weight import MaskedWeight, to_plain
from pruning_core.selection import Skipped


class MaskGroup:
    """Scores, ranks and cuts the weights of one pruner.

    ``updated_at``: the last due step that was carried out. ``left_out``: the weights without a gradient in that update.
    """

    def __init__(self, where: str, options: PrunerOptions, weights: list[MaskedWeight], skipped: list[Skipped]) -> None:
        self.where, self.options, self.weights, self.skipped = where, options, weights, skipped
        self.ranks = common_group(where, {weight.target.name: weight.place for weight in weights})
        self.table = options.timetable
        self.updated_at = -1
        self.left_out: list[MaskedWeight] = []
        self.changed = False  # masks changed since the last optimizer step
        self.check_limits()

    @property
    def total(self) -> int:
        """Number of weights that take part, over all ranks."""
        return sum(weight.weights for weight in self.taking_part)

    @property
    def taking_part(self) -> list[MaskedWeight]:
        """The weights but those that were left out of the last update."""
        return [weight for weight in self.weights if weight not in self.left_out]

    @property
    def done(self) -> bool:
        """Whether the target is reached; from then on masks are only applied."""
        return self.updated_at >= self.table.end

    def check_limits(self) -> None:
        """ValueError when the limits of the layers do not allow the target."""
        try:
            self.options.layer_limits.check_names("limits", [weight.target.layer for weight in self.weights])
            self._room(self.weights, self._layers(self.weights), self.table.target)
        except ValueError as error:
            raise ValueError(f"{self.where}.{error}") from None

    def _room(
        self, weights: Sequence[MaskedWeight], layers: Sequence[Ranked], share: float
    ) -> list[tuple[int, list[int], list[int]]]:
        """``budget.limits`` of all layers together (global scope) or of each (local scope)."""
        pairs = [self.options.layer_limits.of([weight.target.layer]) for weight in weights]
        if self.options.pruning_scope == "global":
            return [limits(layers, share, [least for least, _ in pairs], [most for _, most in pairs])]
        return [limits([layer], share, *pair) for layer, pair in zip(layers, pairs, strict=True)]

    def next_due(self) -> int | None:
        """The next due step, None after the last."""
        return self.table.next_due(self.updated_at)

    def is_due(self, now: int) -> bool:
        """Whether an update is due at step ``now`` or before."""
        due = self.next_due()
        return due is not None and due <= now

    def wants_gradients(self, now: int) -> bool:
        """Whether this step's gradient goes into a score that can still matter."""
        if not self.options.criterion.needs_gradient or self.done:
            return False
        return self.options.criterion.accumulates or self.is_due(now + 1)

    def observe(self, params: Collection[int] | None, rate: Tensor | float, bad: Tensor | None) -> bool:
        """Scores the gradients of the weights in ``params`` (ids; None: all); False when there is none at all."""
        mine = [w for w in self.weights if params is None or id(w.target.parameter) in params]
        if not any(weight.target.parameter.grad is not None for weight in mine):
            return not mine
        for weight in mine:
            weight.observe(rate, bad)
        return True

    @property
    def scored(self) -> bool:
        """Whether each weight has a score or was looked at without finding a gradient, since the last update."""
        seen = all(weight.score is not None or weight.observed for weight in self.weights)
        return seen and any(weight.score is not None for weight in self.weights)

    def ready(self, now: int) -> bool:
        """Whether the due update can be carried out: it needs no gradient, or one was seen."""
        return self.scored or not self.options.criterion.needs_gradient or self.sparsity(now) == 0

    def sparsity(self, now: int) -> float:
        """The sparsity asked for at this step; a pure function of the step."""
        due = self.table.last_due(now)
        return 0.0 if due is None else self.table.sparsity(due)

    def update(self, now: int) -> None:
        """Carries out the update that is due."""
        due = self.table.last_due(now)
        assert due is not None
        share = self.table.sparsity(due)
        if share > 0:
            self.cut_units(share)
        self._passed(due)

    def _passed(self, due: int) -> None:
        self.updated_at, self.changed = due, True
        if self.done and self.left_out:
            names = ", ".join(weight.target.name for weight in self.left_out)
            what = "it is left as it is" if len(self.left_out) == 1 else "they are left as they are"
            warnings.warn(f"{self.where}: no gradient came for {names} up to step {due}; {what}", stacklevel=2)
        for weight in self.weights:
            weight.observed = False
            if self.done or not self.options.criterion.accumulates:
                weight.score = None

    def cut_units(self, share: float) -> None:
        """Cuts whole units until ``share`` of all weights of the group is cut that have a score."""
        if self.options.criterion.needs_gradient:
            self.left_out = [weight for weight in self.weights if weight.score is None]
        weights, ranks = self.taking_part, self.ranks
        layers = self._layers(weights, self._unit_scores(weights))
        room = self._room(weights, layers, share)
        if self.options.pruning_scope == "global":
            cuts = cut_within(layers, *room[0], ranks)
        else:
            cuts = cut_apart(layers, [asked for asked, _, _ in room], ranks)
        for weight, cut in zip(weights, self._verdicts(weights, cuts), strict=True):
            weight.cut_units_(cut)

    def _unit_scores(self, weights: Sequence[MaskedWeight]) -> list[Callable[[Strip], Tensor]]:
        """Per weight a function that returns the unit scores of a strip, complete over all ranks."""
        shared = [weight for weight in weights if weight.place.shares_units]
        grids = [weight.join([weight.unit_sums(strip) for strip in weight.strips]) for weight in shared]
        operation: Literal["sum", "max"] = "max" if self.options.criterion_reduce_type == "max" else "sum"
        agree(grids, [weight.place for weight in shared], operation)
        complete = {id(weight): weight.finish_units(grid) for weight, grid in zip(shared, grids, strict=True)}
        return [partial(_unit_scores, weight, complete.get(id(weight))) for weight in weights]

    def _layers(
        self, weights: Sequence[MaskedWeight], unit_scores: Sequence[Callable[[Strip], Tensor]] = ()
    ) -> list[Ranked]:
        layers = []
        for i, weight in enumerate(weights):
            sizes = weight.sizes
            if isinstance(sizes, Tensor):
                sizes = weight.flat(weight.owned(sizes))
            keys = partial(_unit_keys, weight, unit_scores[i] if unit_scores else _no_scores)
            layers.append(Ranked(weight.target.name, keys, sizes, weight.weights, weight.capacity, weight.largest))
        return layers

    def _verdicts(self, weights: Sequence[MaskedWeight], cuts: Iterator[Tensor]) -> Iterator[Tensor]:
        """Flat verdicts on a rank's own units -> grids that also hold its neighbours' verdicts on shared units."""
        if not any(weight.place.shares_units for weight in weights):
            return (weight.unflat(cut, weight.grid) for weight, cut in zip(weights, cuts, strict=True))
        grids = []
        for weight, cut in zip(weights, cuts, strict=True):
            grid = torch.zeros(weight.grid, dtype=torch.int8, device=cut.device)
            mine = weight.owned(grid)
            mine.copy_(weight.unflat(cut, mine.shape))
            grids.append(grid)
        agree(grids, [weight.place for weight in weights], "sum")
        return (grid != 0 for grid in grids)

    def count_cut(self) -> int:
        """Number of weights taking part that the masks cut, over all ranks."""
        count = torch.stack([weight.keep.count_cut() for weight in self.taking_part]).sum()
        return int(self.ranks.sum_(count) if self.ranks else count)

    def apply_(self, params: Collection[int] | None = None) -> None:
        """Masks the weights in ``params`` (ids; None: all) in place."""
        for weight in self.weights:
            if params is None or id(weight.target.parameter) in params:
                weight.apply_()

    def state_dict(self) -> dict[str, Any]:
        """Progress, skipped layers, and masks and scores by name: tensors and plain data."""
        return {
            "updated_at": self.updated_at,
            "changed": self.changed,
            "left_out": [weight.target.name for weight in self.left_out],
            "skipped": [[each.layer, each.kind, each.reason] for each in self.skipped],
            "weights": {weight.target.name: self._weight_state(weight) for weight in self.weights},
        }

    def _weight_state(self, weight: MaskedWeight) -> dict[str, Any]:
        score = {"score": to_plain(weight.score), "observed": weight.observed}
        return {"keep": weight.keep.packed.cpu().clone(), **score, "shape": list(weight.shape)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores progress, masks and scores; the weights do not change."""
        self.updated_at, self.changed = state["updated_at"], state["changed"]
        self.left_out = [weight for weight in self.weights if weight.target.name in state["left_out"]]
        for weight in self.weights:
            self._load_weight(weight, state["weights"][weight.target.name])

    def _load_weight(self, weight: MaskedWeight, state: dict[str, Any]) -> None:
        weight.keep.load_(state["keep"])
        score, weight.observed = state["score"], state["observed"]
        weight.score = None if score is None else score.to(weight.keep.device, copy=True)


def _unit_keys(weight: MaskedWeight, unit_scores: Callable[[Strip], Tensor]) -> Iterator[Tensor]:
    """Per strip, keys of the units that this rank owns; those cut already come first, so that nothing grows back."""
    for strip, alive in zip(weight.strips, weight.alive(), strict=True):
        dead = ~weight.flat(weight.owned(alive, strip))
        yield sortable(weight.flat(weight.owned(unit_scores(strip), strip)), dead)


def _unit_scores(weight: MaskedWeight, complete: Tensor | None, strip: Strip) -> Tensor:
    return weight.finish_units(weight.unit_sums(strip)) if complete is None else strip.of_grid(complete)


def _no_scores(strip: Strip) -> Tensor:
    raise AssertionError("limits look at sizes alone")
