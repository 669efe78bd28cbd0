"""A group of weights that is ranked together: one pruner of the configuration."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from pruning_core.budget import Ranked, cut_apart, cut_together, limits, sortable
from pruning_core.masks.weight import MaskedWeight, pack, to_plain, unpack
from pruning_core.options import PrunerOptions
from pruning_core.selection import Spared
from pruning_core.sharding import agree, common_group


class MaskGroup:
    """Scores, ranks and cuts the weights of one pruner; ``updated_at`` is the last due step that was carried out."""

    def __init__(self, where: str, options: PrunerOptions, weights: list[MaskedWeight], spared: list[Spared]) -> None:
        self.where, self.options, self.weights, self.spared = where, options, weights, spared
        self.ranks = common_group(where, {weight.target.name: weight.place for weight in weights})
        self.table = options.timetable
        self.updated_at = -1
        self.changed = False  # masks changed since the last optimizer step
        self.check_limits()

    @property
    def total(self) -> int:
        return sum(weight.weights for weight in self.weights)

    @property
    def done(self) -> bool:
        """The target is reached; from here on masks are only applied."""
        return self.updated_at >= self.table.end

    def check_limits(self) -> None:
        """ValueError when the target cannot be reached within the limits of the layers."""
        try:
            limits(self._layers(), self.table.target, self._least, self._most)
        except ValueError as error:
            raise ValueError(f"{self.where}.{error}") from None

    @property
    def _least(self) -> float:
        return self.options.min_sparsity_ratio_per_op

    @property
    def _most(self) -> float:
        return self.options.max_sparsity_ratio_per_op

    def next_due(self) -> int | None:
        return self.table.next_due(self.updated_at)

    def is_due(self, now: int) -> bool:
        due = self.next_due()
        return due is not None and due <= now

    def wants_gradients(self, now: int) -> bool:
        """Scores can still matter, and this step's gradient goes into them."""
        if not self.options.criterion.needs_gradient or self.done:
            return False
        return self.options.criterion.accumulates or self.is_due(now + 1)

    def observe(self, params: Collection[int] | None, rate: Tensor | float, bad: Tensor | None) -> bool:
        """Reads the gradients of the weights in ``params`` (ids; None: all); False when there is none at all."""
        mine = [w for w in self.weights if params is None or id(w.target.parameter) in params]
        if not any(weight.target.parameter.grad is not None for weight in mine):
            return not mine
        for weight in mine:
            weight.observe(rate, bad)
        return True

    @property
    def scored(self) -> bool:
        """Every weight has a score that was not used up yet."""
        return all(weight.score is not None for weight in self.weights)

    def ready(self, now: int) -> bool:
        """A change that is due can be carried out: it needs no gradient, or one was seen."""
        return self.scored or not self.options.criterion.needs_gradient or self.share(now) == 0

    def share(self, now: int) -> float:
        """The share of zeros asked for at this step, a pure function of it."""
        due = self.table.last_due(now)
        return 0.0 if due is None else self.table.share(due)

    def update(self, now: int) -> None:
        """Carries out what is due."""
        due = self.table.last_due(now)
        assert due is not None
        share = self.table.share(due)
        if share > 0:
            self.cut_units(share)
        self._passed(due)

    def _passed(self, due: int) -> None:
        self.updated_at, self.changed = due, True
        if self.done or not self.options.criterion.accumulates:
            for weight in self.weights:
                weight.score = None

    def cut_units(self, share: float) -> None:
        """Cuts whole units so that ``share`` of all weights of the group is zero."""
        layers, ranks = self._layers(self._unit_scores()), self.ranks
        if self.options.pruning_scope == "global":
            cuts = cut_together(layers, share, self._least, self._most, ranks)
        else:
            amounts = [limits([layer], share, self._least, self._most)[0] for layer in layers]
            cuts = cut_apart(layers, amounts, ranks)
        for weight, cut in zip(self.weights, self._verdicts(cuts), strict=True):
            weight.cut_units_(cut)

    def _unit_scores(self) -> list[Callable[[], Tensor]]:
        """Per weight a function that gives its unit scores, complete over all ranks."""
        if self.ranks is None:
            return [
                weight.unit_scores if weight.folds_fast else partial(_same, weight.unit_scores())
                for weight in self.weights
            ]
        grids = [weight.unit_scores().clone() for weight in self.weights]
        operation: Literal["sum", "max"] = "max" if self.options.criterion_reduce_type == "max" else "sum"
        agree(grids, [weight.place for weight in self.weights], operation)
        return [partial(_same, grid) for grid in grids]

    def _layers(self, unit_scores: Sequence[Callable[[], Tensor]] = ()) -> list[Ranked]:
        layers = []
        for i, weight in enumerate(self.weights):
            sizes = weight.sizes
            if isinstance(sizes, Tensor):
                sizes = weight.flat(weight.owned(sizes))
            keys = partial(_unit_keys, weight, unit_scores[i] if unit_scores else _no_scores)
            layers.append(Ranked(weight.target.name, keys, sizes, weight.weights, weight.capacity, weight.largest))
        return layers

    def _verdicts(self, cuts: Iterator[Tensor]) -> Iterator[Tensor]:
        """Flat verdicts on a rank's own units -> grids that also hold its neighbours' verdicts on shared units."""
        if self.ranks is None:
            return (weight.unflat(cut, weight.alive()) for weight, cut in zip(self.weights, cuts, strict=True))
        grids = []
        for weight, cut in zip(self.weights, cuts, strict=True):
            grid = weight.alive().to(torch.int8).zero_()
            mine = weight.owned(grid)
            mine.copy_(weight.unflat(cut, mine))
            grids.append(grid)
        agree(grids, [weight.place for weight in self.weights], "sum")
        return (grid != 0 for grid in grids)

    def apply_(self, params: Collection[int] | None = None) -> None:
        for weight in self.weights:
            if params is None or id(weight.target.parameter) in params:
                weight.apply_()

    def state_dict(self) -> dict[str, Any]:
        return {
            "updated_at": self.updated_at,
            "changed": self.changed,
            "spared": [[each.layer, each.kind, each.reason] for each in self.spared],
            "weights": {weight.target.name: self._weight_state(weight) for weight in self.weights},
        }

    def _weight_state(self, weight: MaskedWeight) -> dict[str, Any]:
        return {"keep": pack(weight.keep), "score": to_plain(weight.score), "shape": list(weight.shape)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updated_at, self.changed = state["updated_at"], state["changed"]
        for weight in self.weights:
            self._load_weight(weight, state["weights"][weight.target.name])

    def _load_weight(self, weight: MaskedWeight, state: dict[str, Any]) -> None:
        weight.keep.copy_(unpack(state["keep"], weight.keep))
        score = state["score"]
        weight.score = None if score is None else score.to(weight.keep.device, copy=True)


def _unit_keys(weight: MaskedWeight, unit_scores: Callable[[], Tensor]) -> Tensor:
    """Of the units that this rank owns; what is cut already comes first, so nothing returns."""
    dead = ~weight.flat(weight.owned(weight.alive()))
    return sortable(weight.flat(weight.owned(unit_scores())), dead)


def _same(grid: Tensor) -> Tensor:
    return grid


def _no_scores() -> Tensor:
    raise AssertionError("limits look at sizes alone")
