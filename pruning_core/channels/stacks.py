"""Stacks of blocks that keep one width: those that a model's configuration can say, or blocks of one name."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
from torch import nn

from pruning_core.graph import ChannelGraph, ChannelGroup, GraphError, Plan, slim_
from pruning_core.graph.cut.configuration import (
    Built,
    Effect,
    Place,
    Sizes,
    Widths,
    configuration,
    configure,
    reload_apart,
)
from pruning_core.graph.cut.copies import cut_copy, enliven, shared_copy
from pruning_core.graph.trace.labels import Axis

MOST_SETTINGS = 16
"""So many numbers of a configuration may say one width together."""
FEW = 128
"""Each of so many steps may be tried, on the meta device."""
Removed = dict[str, list[int]]
Groups = dict[str, ChannelGroup]


@dataclass(frozen=True)
class Stack:
    """Groups that lose the same share: of each, one of ``steps`` equal parts after another.

    ``settings``: the numbers of the configuration that go down with them. ``against``: those that go up, so that what
    they set relative to these keeps its width.
    """

    groups: tuple[str, ...]
    steps: int
    settings: tuple[str, ...] = ()
    against: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " with ".join(self.settings)


class Stacks:
    """The stacks of a model. ``held``: the groups that no stack has, and why they stay as they are."""

    def __init__(self, graph: ChannelGraph) -> None:
        self.graph = graph
        self.every: list[Stack] = []
        self.held: dict[str, str] = {}
        self.widths = None if configuration(graph.model) is None else Widths(graph.model)
        if self.widths is None:
            self.every = _by_name(graph)
        else:
            self._find(self.widths)

    def configuration(self, removed: Removed) -> dict[str, float]:
        """The configuration that says these removals; GraphError where it is refused."""
        if self.widths is None:
            return {}
        gone = {}
        for stack in self.every:
            first = self.graph.groups[stack.groups[0]]
            gone[stack] = len(removed.get(first.name, ())) * stack.steps // len(first)
        return self._changes(self.widths, gone, removed)

    def notes(self) -> list[str]:
        """One line for each reason, with the groups that stay for it."""
        found: dict[str, list[str]] = {}
        for name, why in self.held.items():
            found.setdefault(why, []).append(name)
        return [f"uniform: {len(some)} groups keep their width, {some[0]} first: {why}" for why, some in found.items()]

    def _changes(self, widths: Widths, gone: Mapping[Stack, int], removed: Removed) -> dict[str, float]:
        shares = dict.fromkeys((name for stack in gone for name in (*stack.settings, *stack.against)), Fraction(1))
        for stack, steps in gone.items():
            left = Fraction(stack.steps - steps, stack.steps)
            shares.update({name: shares[name] * left for name in stack.settings})
            shares.update({name: shares[name] / left for name in stack.against})
        changes: dict[str, float] = {}
        for name, share in shares.items():
            value = widths.settings[name]
            exact = Fraction(value) * share
            if isinstance(value, int) and exact.denominator > 1:
                raise GraphError(f"uniform: {name} is a whole number, got {float(exact):.3f}; give another budget")
            changes[name] = int(exact) if isinstance(value, int) else float(exact)
        return widths.exact(changes, self._sizes(widths, removed))

    def _sizes(self, widths: Widths, removed: Removed) -> Sizes:
        gone = {axis: len(at) for axis, at in self.graph.removed_indices(removed).items()}
        return {axis: size - gone.get(axis, 0) for axis, size in widths.base.sizes.items()}

    # ---- which settings of a configuration set which groups ---------------------------------------------------------

    def _find(self, widths: Widths) -> None:
        """What is set alone comes first; what is set with much else may keep that as it is."""
        setters = {name: _setters(widths, group.axes, len(group)) for name, group in self.graph.groups.items()}
        ways: dict[str, tuple[Stack, Groups]] = {}
        refused: dict[str, str] = {}
        for first in dict.fromkeys(name for names in setters.values() for name in names):
            found = self._together(widths, first)
            if isinstance(found, str):
                refused[first] = found
            else:
                ways[first] = found
        taken: dict[str, Stack] = {}
        for first, (stack, groups) in sorted(ways.items(), key=lambda way: len(way[1][1])):
            if groups.keys() <= taken.keys():
                continue
            each = self._beside(widths, stack, groups, taken)
            each = self._confirmed(widths, each) if isinstance(each, Stack) else each
            if isinstance(each, Stack):
                self.every.append(each)
                taken.update(dict.fromkeys(each.groups, each))
            else:
                refused[first] = each
        unsaid = f"no number of {type(widths.config).__name__} sets it"
        for name in (name for name in self.graph.groups if name not in taken):
            self.held[name] = next((refused[first] for first in setters[name] if first in refused), unsaid)

    def _together(self, widths: Widths, first: str) -> tuple[Stack, Groups] | str:
        """The settings that must go down with one, and the groups that they narrow; or why it cannot."""
        names = [first]
        for _ in range(MOST_SETTINGS):
            effect, said = widths.effect(names), " with ".join(names)
            if isinstance(effect, str):
                return f"{said} cannot change alone ({effect})"
            groups = self._reached(effect, said)
            if isinstance(groups, str):
                return groups
            missing = _missing(widths, groups.values(), effect)
            if missing is None:
                others = f"other tensors come or go with {said}"
                return others if effect.others else (_stack_of(widths, groups.values(), names), groups)
            axis, count = missing
            more = [name for name in _setters(widths, [axis], count) if name not in names]
            if not more:
                return f"{said} does not set {axis} in proportion, which goes with it"
            names.append(more[0])
        return f"{names[0]} sets no width without many other numbers"

    def _reached(self, effect: Effect, said: str) -> Groups | str:
        """The groups on the axes that settings change; why not, where they change others too."""
        groups: Groups = {}
        for axis in sorted(effect.axes, key=str):
            if axis not in self.graph.labels.axes:
                return f"{said} also sets {axis}, which the example does not use"
            for unit in np.unique(self.graph.components.of_label[self.graph.labels.axes[axis].numpy()]).tolist():
                if unit not in self.graph.where:
                    return f"{said} also sets {axis}, which stays: {self.graph.reason(unit) or 'it is not used'}"
                name = self.graph.where[unit][0]
                groups[name] = self.graph.groups[name]
        return groups

    def _beside(self, widths: Widths, stack: Stack, groups: Groups, taken: Mapping[str, Stack]) -> Stack | str:
        """The stack without groups that others have: their settings go up, where these are relative to its own."""
        others = dict.fromkeys(taken[name] for name in groups if name in taken)
        if not others:
            return stack
        against = [name for other in others for name in other.settings if name not in stack.settings]
        free = {name: group for name, group in groups.items() if name not in taken}
        effect = widths.effect(stack.settings, against)
        if (
            isinstance(effect, Effect)
            and not effect.others
            and self._reached(effect, str(stack)) == free
            and _missing(widths, free.values(), effect) is None
        ):
            return replace(_stack_of(widths, free.values(), stack.settings), against=tuple(against))
        return f"{stack} also sets {min(groups.keys() & taken.keys())}, which another number sets alone"

    # ---- a trial ----------------------------------------------------------------------------------------------------

    def _confirmed(self, widths: Widths, stack: Stack) -> Stack | str:
        """The stack, with the numbers that must change though they set no width."""
        refused = self._refused(widths, stack)
        if not refused:
            return stack
        more = self._counts(widths, stack)
        groups = [self.graph.groups[name] for name in stack.groups]
        wider = replace(_stack_of(widths, groups, [*stack.settings, *more]), against=stack.against)
        return refused if not more or self._refused(widths, wider) else wider

    def _refused(self, widths: Widths, stack: Stack) -> str:
        """Cuts a part of a stack from a copy, which loads itself from its configuration; why it cannot, if so."""
        if stack.steps < 2:
            return f"{stack} cannot become smaller by a whole share of all that it sets"
        refused = ""
        for gone in _trials(stack.steps):
            try:
                removed = self._some(stack, gone)
                changes = self._changes(widths, {stack: gone}, removed)
            except GraphError as error:  # of other heads the width may be a multiple
                refused = refused or str(error)
                continue
            try:
                cut = self._cut(self.graph.plan(removed))
                configure(cut, changes)
                apart = reload_apart(cut, self.graph.small[0])
                if not apart:
                    return ""
                refused = f"the configuration says another model, {apart}"
            except GraphError as error:
                refused = str(error)
            break
        return f"{stack}: {refused.removeprefix('uniform: ').partition('; everything was put back')[0]}"

    def _counts(self, widths: Widths, stack: Stack) -> list[str]:
        """Settings that set no width: how many heads there are. They set numbers that go down in a cut model, or keep
        those (the width of a head) that stay there."""
        try:
            gone = _trials(stack.steps)[0]
            cut = Built.of(self._cut(self.graph.plan(self._some(stack, gone))))
        except GraphError:  # was said before
            return []
        effects = [widths.alone[name] for name in stack.settings]
        said = frozenset[Place]().union(*(each.larger for each in effects))
        follows = widths.scaled(cut, stack.steps - gone, stack.steps)
        pure = [(name, each) for name, each in widths.alone.items() if not each.axes and name not in stack.settings]
        return [name for name, each in pure if each.larger & (follows - said) or each.smaller & (said - follows)]

    def _some(self, stack: Stack, gone: int) -> Removed:
        """What so many steps of a stack remove: any channels."""
        some = random.Random(0)
        sizes = {name: len(self.graph.groups[name]) for name in stack.groups}
        removed = {name: sorted(some.sample(range(n), gone * n // stack.steps)) for name, n in sizes.items()}
        if self.graph.restored(removed) != removed:
            raise GraphError("it sets pieces of a chunk or split that are balanced with others")
        return removed

    def _cut(self, plan: Plan) -> nn.Module:
        example, recorded = self.graph.small
        try:
            return cut_copy(self.graph.model, plan, example, recorded)
        except GraphError:  # shapes that depend on numbers: which experts are chosen
            copy = shared_copy(self.graph.model)
            enliven(copy)
            slim_(copy, plan)
            del configuration(copy).quantization_config  # how it was cut: numbers must say it alone
            return copy


def _missing(widths: Widths, groups: Iterable[ChannelGroup], effect: Effect) -> tuple[Axis, int] | None:
    """An axis that must change in proportion with the others and does not, and how many channels its group has."""
    for group in groups:
        for axis in group.axes:
            if axis in widths.base.sizes and (axis not in effect.axes or axis in effect.uneven):
                return axis, len(group)
    return None


def _setters(widths: Widths, axes: Sequence[Axis], count: int) -> list[str]:
    """Settings that set one of these axes: first those whose number counts the channels, then those that set least."""
    near = [name for name, effect in widths.alone.items() if effect.axes & set(axes)]
    return sorted(near, key=lambda name: (widths.settings[name] % count != 0, len(widths.alone[name].axes)))


def _trials(steps: int) -> list[int]:
    """A quarter of the steps, a half, three quarters; of few steps all numbers."""
    quarters = [max(1, steps * share // 4) for share in (1, 2, 3)]
    return list(dict.fromkeys([*quarters, *(range(1, steps) if steps <= FEW else ())]))


def _stack_of(widths: Widths, groups: Iterable[ChannelGroup], names: Sequence[str]) -> Stack:
    whole = [value for name in names if isinstance(value := widths.settings[name], int)]
    groups = list(groups)
    return Stack(tuple(each.name for each in groups), math.gcd(*map(len, groups), *whole), tuple(names))


def _by_name(graph: ChannelGraph) -> list[Stack]:
    """Groups of one size whose names differ in numbers alone."""
    alike: dict[tuple[str, int], list[str]] = {}
    for name, group in graph.groups.items():
        alike.setdefault((re.sub(r"\d+", "*", name), len(group)), []).append(name)
    return [Stack(tuple(names), size) for (_, size), names in alike.items()]
