"""Chooses what goes: the least important channels, until a budget is met."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from pruning_core.channels.importance import IMPORTANCES, Data, ToLoss, unit_scores
from pruning_core.cost import ratio
from pruning_core.graph import ChannelGraph, GraphError, Plan, slim_
from pruning_core.graph.groups import Group
from pruning_core.graph.tracing import as_inputs

BUDGETS = ("channels", "params", "macs", "latency")
GIVE_BACK = 200
Removed = dict[str, list[int]]


@dataclass(frozen=True)
class Limits:
    """How far a group may be cut, and to which sizes."""

    round_to: int = 1
    max_share: float = 0.95
    layers: Mapping[str, float] = field(default_factory=dict)

    def most(self, group: Group) -> int:
        """How many channels of a group may go. Patterns match any of its tensors; the last that matches counts."""
        share = self.max_share
        for pattern, value in self.layers.items():
            if any(fnmatch.fnmatch(axis.tensor, pattern) for axis in group.axes):
                share = value
        return min(int(len(group) * share), len(group) - 1)

    def rounded(self, group: Group, count: int) -> int:
        """The largest number not above ``count`` that leaves a multiple of ``round_to``, in rows of the first axis."""
        rows = len(group.slices[0][group.axes[0]])
        count = min(count, self.most(group))
        while count and ((len(group) - count) * rows) % self.round_to:
            count -= 1
        return count


def plan_channels(
    graph: ChannelGraph,
    budget: Mapping[str, float],
    *,
    importance: str = "magnitude",
    scope: str = "global",
    round_to: int = 1,
    max_share: float = 0.95,
    layers: Mapping[str, float] | None = None,
    batches: Iterable[Any] = (),
    to_loss: ToLoss | None = None,
    example_inputs: Any = None,
    seed: int = 0,
) -> Plan:
    """A plan that leaves at most this share of one cost: ``{"macs": 0.5}``, ``params``, ``latency`` or ``channels``.

    ``scope="global"`` ranks all channels together, ``"local"`` takes the same share of every group. ``layers`` maps
    patterns of parameter names to the largest share of their channels that may go (0 keeps them whole). ``latency`` is
    measured on ``example_inputs``, beside the dense model.
    """
    limits = Limits(round_to, max_share, layers or {})
    _check(graph, budget, scope, limits)
    scores = unit_scores(graph, IMPORTANCES[importance](seed), Data(batches, to_loss))
    order = ordered(graph, scores, scope)
    ((kind, share),) = budget.items()
    cost = _cost_of(graph, kind, example_inputs)
    return graph.plan(_Search(graph, limits, scores, order, cost, kind, share).run())


def _check(graph: ChannelGraph, budget: Mapping[str, float], scope: str, limits: Limits) -> None:
    if len(budget) != 1 or next(iter(budget)) not in BUDGETS:
        raise GraphError(f"budget: is one of {', '.join(BUDGETS)}, got {dict(budget)}; for example {{'macs': 0.5}}")
    share = next(iter(budget.values()))
    if not 0 < share <= 1:
        raise GraphError(f"budget: is the share that is left, above 0 and at most 1, got {share}; for example 0.5")
    if scope not in ("global", "local"):
        raise GraphError(f"scope: is global or local, got {scope!r}; choose one")
    if limits.round_to < 1 or not 0 <= limits.max_share <= 1:
        raise GraphError(
            f"round_to, max_share: must be at least 1 and within 0 and 1, got {limits.round_to} and {limits.max_share}"
        )
    names = [axis.tensor for group in graph.groups.values() for axis in group.axes]
    for pattern, value in limits.layers.items():
        if not any(fnmatch.fnmatch(name, pattern) for name in names):
            raise GraphError(
                f"layers: matches no parameter with channels that can go, got {pattern!r}; see graph.groups"
            )
        if not 0 <= value <= 1:
            raise GraphError(f"layers: {pattern} takes a share from 0 to 1, got {value}")


def ordered(graph: ChannelGraph, scores: Mapping[int, float], scope: str) -> list[int]:
    """Units, the first to go first. Ties go by their place in their group, so that a plan is the same every time and
    equal scores are spread over the model."""
    place: dict[int, float] = {}
    for group in graph.groups.values():
        members = sorted((unit for unit in group.members if unit in scores), key=lambda unit: (scores[unit], unit))
        place.update({unit: (i + 0.5) / len(members) for i, unit in enumerate(members)})
    if scope == "global":
        return sorted(scores, key=lambda unit: (scores[unit], place[unit], unit))
    return sorted(place, key=lambda unit: (place[unit], unit))


def _cost_of(graph: ChannelGraph, kind: str, example_inputs: Any) -> Callable[[Removed], float]:
    """The share of a cost that is left."""
    if kind == "params":
        return lambda removed: graph.params(removed) / graph.params()
    if kind == "macs":
        return lambda removed: graph.macs(removed) / graph.macs()
    if kind == "channels":
        total = sum(len(group) for group in graph.groups.values())
        return lambda removed: 1 - sum(map(len, removed.values())) / max(total, 1)
    if example_inputs is None:
        raise GraphError("example_inputs: a latency is measured on them, got none; give what model(...) takes")
    return lambda removed: latency(graph, removed, example_inputs)


def latency(graph: ChannelGraph, removed: Removed, example_inputs: Any) -> float:
    """The time of one forward pass of a cut copy, beside the dense model's."""
    dense, slim = graph.model, copy.deepcopy(graph.model).eval()
    slim_(slim, graph.plan(removed), example_inputs=example_inputs)
    args, kwargs = as_inputs(example_inputs)
    mode = dense.training
    dense.eval()
    try:
        with torch.inference_mode():
            return ratio(lambda: slim(*args, **kwargs), lambda: dense(*args, **kwargs))
    finally:
        dense.train(mode)


def removed_of(graph: ChannelGraph, limits: Limits, scores: Mapping[int, float], units: Iterable[int]) -> Removed:
    """What goes when these units may: within the limits, rounded, and balanced."""
    by_group: Removed = {}
    for unit in units:
        name, channel = graph.where[unit]
        by_group.setdefault(name, []).append(channel)
    for name, channels in by_group.items():
        group = graph.groups[name]
        by_group[name] = channels[: limits.rounded(group, len(channels))]
    return graph.restored(by_group, scores)


@dataclass
class _Search:
    """Bisection over how many units go, then some are given back while the budget allows it."""

    graph: ChannelGraph
    limits: Limits
    scores: Mapping[int, float]
    order: list[int]
    cost: Callable[[Removed], float]
    kind: str
    share: float

    def run(self) -> Removed:
        least = self.cost(self.removed(len(self.order)))
        if least > self.share:
            raise GraphError(
                f"budget: cannot be met, got {self.kind} {self.share}; from {least:.3f} to 1 can be reached with these "
                "limits"
            )
        low, high = 0, len(self.order)
        while high - low > max(1, len(self.order) // 64 if self.kind == "latency" else 1):
            middle = (low + high) // 2
            low, high = (low, middle) if self.cost(self.removed(middle)) <= self.share else (middle, high)
        found = self.removed(high)
        return found if self.kind == "latency" or self.limits.round_to > 1 else self.given_back(found)

    def removed(self, count: int) -> Removed:
        return removed_of(self.graph, self.limits, self.scores, self.order[:count])

    def given_back(self, removed: Removed) -> Removed:
        """The most important of what went, one by one, while the budget is kept."""
        units = {self.graph.groups[name].members[i] for name, channels in removed.items() for i in channels}
        balanced = self.graph.balances.of_unit
        for unit in sorted(units - balanced.keys(), key=lambda each: -self.scores[each])[:GIVE_BACK]:
            name, channel = self.graph.where[unit]
            less = {**removed, name: [i for i in removed[name] if i != channel]}
            if self.cost(less) <= self.share:
                removed = less
        return {name: channels for name, channels in removed.items() if channels}
