"""Plans removals: the lowest-scored channels, until a budget is met."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from pruning_core.channels.options import GroupLimits, read_options
from pruning_core.channels.scores import Data, ToLoss, unit_scores
from pruning_core.channels.stacks import Removed, Stacks
from pruning_core.channels.uniform import UniformRanking
from pruning_core.criteria import CRITERIA
from pruning_core.graph import ChannelGraph, GraphError, Plan, slim_
from pruning_core.graph.inputs import without_collection
from pruning_core.latency import relative_latency

GIVE_BACK = 50
BUDGETS = ("channels", "params", "macs", "latency")


@without_collection()
def plan_channels(
    graph: ChannelGraph,
    budget: Mapping[str, float],
    *,
    criterion: str | None = None,
    scope: str = "global",
    round_to: int = 1,
    limits: float | Mapping[str, Any] = 0.95,
    op_names: Sequence[str] = (),
    excluded_op_names: Sequence[str] = (),
    pruning_op_types: Sequence[str] = ("Conv", "Linear"),
    batches: Iterable[Any] = (),
    to_loss: ToLoss | None = None,
    seed: int = 0,
    uniform: bool = False,
) -> Plan:
    """The plan that leaves at most a share of one cost: ``{"macs": 0.5}``, ``params``, ``channels`` or ``latency``.

    ``criterion``: a name from ``CRITERIA``; those with gradients or activations need ``batches`` and
    ``to_loss(model, batch)``. By default ``taylor`` where these are given; else ``l2``, which is much weaker.
    ``scope="global"`` ranks all channels together, ``"local"`` takes the same share of every group. ``round_to``: what
    is left of a group is a multiple of it. ``limits``: the share of a group that may go, for all (0.95), or by name
    (``re.search``) as most or [least, most]: ``{"stem": 0, "head": [0.2, 0.5]}``. ``op_names``,
    ``excluded_op_names``, ``pruning_op_types``: layers, as in ``WeightPruningConfig``. ``latency`` is measured on the
    graph's example, beside the dense model.

    ``uniform``: all blocks of a stack keep one width, and of a Transformers model only those widths change that its
    configuration can say: ``slim_`` writes them there, and plain ``from_pretrained`` loads what ``save_pretrained``
    saves. What no number of the configuration says keeps its width; the report says why.
    """
    data = Data(batches, to_loss)
    options = read_options(
        criterion=data.criterion() if criterion is None else criterion,
        scope=scope,
        round_to=round_to,
        limits=limits,
        op_names=op_names,
        excluded_op_names=excluded_op_names,
        pruning_op_types=pruning_op_types,
        seed=seed,
        uniform=uniform,
    )
    kind, left = read_budget(budget)
    graph.check()
    room = GroupLimits(graph, options)
    scores = unit_scores(graph, CRITERIA[options.criterion](options.seed), data)
    cost = _cost_of(graph, kind)
    if options.uniform:
        ranking = UniformRanking(room, scores, Stacks(graph), options.scope)
        search = _Search(graph, room, ranking, cost, kind, left)
        removed, changes = ranking.chosen(search.fewest, lambda removed: cost(removed) <= left)
        plan = replace(graph.plan(removed), configuration=changes, notes=tuple(ranking.stacks.notes()))
    else:
        single = Ranking(room, scores, ordered(graph, scores, options.scope))
        search = _Search(graph, room, single, cost, kind, left)
        found = single.removed(search.fewest())
        plan = graph.plan(found if kind == "latency" or options.round_to > 1 else search.given_back(found, scores))
    return replace(plan, criterion=options.criterion)


def read_budget(budget: Mapping[str, float]) -> tuple[str, float]:
    """(kind, the share that is left), checked."""
    if not isinstance(budget, Mapping) or len(budget) != 1 or next(iter(budget)) not in BUDGETS:
        got = dict(budget) if isinstance(budget, Mapping) else budget
        raise GraphError(f"budget: is one of {', '.join(BUDGETS)}, got {got!r}; for example {{'macs': 0.5}}")
    ((kind, left),) = budget.items()
    if isinstance(left, bool) or not isinstance(left, int | float) or not 0 < left <= 1:
        raise GraphError(f"budget: is the share that is left, above 0 and at most 1, got {left!r}; for example 0.5")
    return kind, left


def ordered(graph: ChannelGraph, scores: Mapping[int, float], scope: str) -> list[int]:
    """Units in order of removal. Ties go by rank within the group: plans are deterministic, and equal scores are spread
    over the model."""
    place: dict[int, float] = {}
    for group in graph.groups.values():
        members = sorted((unit for unit in group.members if unit in scores), key=lambda unit: (scores[unit], unit))
        place.update({unit: (i + 0.5) / len(members) for i, unit in enumerate(members)})
    if scope == "global":
        return sorted(scores, key=lambda unit: (scores[unit], place[unit], unit))
    return sorted(place, key=lambda unit: (place[unit], unit))


def _cost_of(graph: ChannelGraph, kind: str) -> Callable[[Removed], float]:
    """The share of a cost that is left."""
    if kind in ("params", "macs"):
        count = graph.params if kind == "params" else graph.macs
        whole = count()
        if not whole:
            raise GraphError(f"budget: the model has no {kind} on its example, got {kind}; give another budget")
        return lambda removed: count(removed) / whole
    if kind == "channels":
        total = sum(len(group) for group in graph.groups.values())
        return lambda removed: 1 - sum(map(len, removed.values())) / max(total, 1)
    return lambda removed: latency(graph, removed)


def latency(graph: ChannelGraph, removed: Removed) -> float:
    """The time of one forward pass of a cut copy on the graph's example, relative to the dense model's."""
    dense, slim = graph.model, copy.deepcopy(graph.model).eval()
    slim_(slim, graph.plan(removed))
    args, kwargs = graph.example
    mode = dense.training
    dense.eval()
    try:
        with torch.inference_mode():
            return relative_latency(lambda: slim(*args, **kwargs), lambda: dense(*args, **kwargs))
    finally:
        dense.train(mode)


class Ranking:
    """Units in order of removal, and what the first of them come to within limits."""

    def __init__(self, room: GroupLimits, scores: Mapping[int, float], order: Sequence[int]) -> None:
        self.room, self.scores, self.order = room, scores, order
        self._channels: dict[str, list[int]] = {}
        for name, channel in map(room.graph.where.__getitem__, order):
            self._channels.setdefault(name, []).append(channel)
        numbers = {name: i for i, name in enumerate(self._channels)}
        self._groups = np.array([numbers[room.graph.where[unit][0]] for unit in order], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.order)

    def removed(self, count: int) -> Removed:
        """The removals among the first ``count``: rounded, balanced.

        A group that must lose more than its share of them loses its own next channels.
        """
        graph, counts = self.room.graph, np.bincount(self._groups[:count], minlength=len(self._channels)).tolist()
        each = zip(self._channels.items(), counts, strict=True)
        removed = {name: some[: self.room.rounded(graph.groups[name], n)] for (name, some), n in each}
        return graph.restored(removed, self.scores)

    def why(self) -> str:
        """What else an error should say."""
        return ""


@dataclass
class _Search:
    """Bisects how many of a ranking go; single units are restored while the budget allows."""

    graph: ChannelGraph
    room: GroupLimits
    ranking: Ranking | UniformRanking
    cost: Callable[[Removed], float]
    kind: str
    left: float

    def fewest(self) -> int:
        """How many of the ranking must go; GraphError where even all do not meet the budget."""
        least = self.cost(self.ranking.removed(len(self.ranking)))
        if least > self.left:
            raise GraphError(
                f"budget: cannot be met, got {self.kind} {self.left}; from {least:.3f} to 1 can be reached with these "
                f"limits{self._frozen()}{self.ranking.why()}"
            )
        low, high = 0, len(self.ranking)
        while high - low > max(1, high // 64 if self.kind == "latency" else 1):
            middle = (low + high) // 2
            low, high = (low, middle) if self.cost(self.ranking.removed(middle)) <= self.left else (middle, high)
        return high

    def _frozen(self) -> str:
        if not self.graph.groups:
            why = Counter(reason for _, _, reason in self.graph.frozen() if reason != "is an output")
            return f", for no channel can be removed: {why.most_common(1)[0][0]}" if why else ""
        found = [weights for group in self.graph.groups.values() if (weights := self.room.frozen(group))]
        first = ", ".join(sorted({name for each in found for name in each})[:3])
        do = "call requires_grad_(True), or name their layers in op_names"
        return f", and {len(found)} groups stay because {first} require no gradient; {do}" if found else ""

    def given_back(self, removed: Removed, scores: Mapping[int, float]) -> Removed:
        """Restores the highest-scored removals one by one while the budget holds; channels of one group cost the
        same."""
        units = self.graph.units(removed) - self.graph.balances.of_unit.keys()
        dear: set[str] = set()
        for unit in sorted(units, key=lambda each: -scores[each])[:GIVE_BACK]:
            name, channel = self.graph.where[unit]
            if name in dear:
                continue
            less = {**removed, name: [i for i in removed[name] if i != channel]}
            enough = len(less[name]) >= self.room.bounds(self.graph.groups[name])[0]
            if enough and self.cost(less) <= self.left:
                removed = less
            else:
                dear.add(name)
        return {name: channels for name, channels in removed.items() if channels}
