"""Groups units: which channels can be removed, each with everything that is tied to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from pruning_core.graph.couple.balances import Balances
from pruning_core.graph.couple.components import Components, rectangles
from pruning_core.graph.trace.labels import Axis, Labels
from pruning_core.graph.trace.recorder import Recorder

Removed = Mapping[str, Iterable[int]]
"""Group name -> the channels of it that go."""


@dataclass(frozen=True)
class ChannelGroup:
    """Channels on the same axes, which can replace each other. ``slices[i]``: the indices of channel i, by axis."""

    name: str
    axes: tuple[Axis, ...]
    members: tuple[int, ...]
    slices: tuple[dict[Axis, tuple[int, ...]], ...]

    def __len__(self) -> int:
        return len(self.members)


class Coupling:
    """The labels of a model, solved: groups of channels, and the balances between them.

    ``where`` maps a unit to its group's name and its place there. ``solve`` is called again after every new tie.
    """

    def __init__(self, labels: Labels, traces: list[Recorder]) -> None:
        self.labels, self.traces = labels, traces
        self.solve()

    def solve(self) -> None:
        """Recomputes components, groups and balances from the labels."""
        self.components = rectangles(self.labels, [each for trace in self.traces for each in trace.operations])
        self.groups = {group.name: group for group in groups_of(self.labels, self.components)}
        self.balances = Balances(self.components, self.labels.balances)
        self.where = {unit: (group.name, i) for group in self.groups.values() for i, unit in enumerate(group.members)}

    def units(self, removed: Removed) -> set[int]:
        """The units of these channels."""
        return {self.groups[name].members[i] for name, channels in removed.items() for i in channels}

    def dead(self, removed: Removed) -> np.ndarray:
        """Bool per label: whether it goes."""
        gone = np.zeros(int(self.components.of_label.max()) + 1, dtype=bool)
        gone[list(self.units(removed))] = True
        return gone[self.components.of_label]

    def restored(self, removed: Removed, score: Mapping[int, float] | None = None) -> dict[str, list[int]]:
        """The part of ``removed`` that leaves pieces of a ``chunk`` or ``split`` equal.

        ``score``, by unit: the highest are restored first.
        """
        found: dict[str, list[int]] = {}
        for unit in sorted(self.balances.restored(self.units(removed), score)):
            name, i = self.where[unit]
            found.setdefault(name, []).append(i)
        return found

    def removed_indices(self, removed: Removed) -> dict[Axis, tuple[int, ...]]:
        """Per axis: the indices that are removed with these channels."""
        gone: dict[Axis, set[int]] = {}
        for name, channels in removed.items():
            for channel in channels:
                for axis, at in self.groups[name].slices[channel].items():
                    gone.setdefault(axis, set()).update(at)
        return {axis: tuple(sorted(at)) for axis, at in gone.items()}


def groups_of(labels: Labels, components: Components) -> list[ChannelGroup]:
    """Units on the same axes form a group, named after its first axis."""
    slices: dict[int, dict[Axis, list[int]]] = {}
    for axis, vector in labels.axes.items():
        units = components.of_label[vector.numpy()]
        for index, unit in enumerate(units.tolist()):
            slices.setdefault(unit, {}).setdefault(axis, []).append(index)
    alike: dict[tuple[Axis, ...], list[int]] = {}
    for unit, found in slices.items():
        if not components.fixed(unit):
            alike.setdefault(tuple(found), []).append(unit)
    named: dict[str, int] = {}
    groups = []
    for axes, members in alike.items():
        if len(members) < 2:
            continue
        name = str(axes[0])
        named[name] = named.get(name, 0) + 1
        if named[name] > 1:
            name = f"{name}#{named[name]}"
        shared = tuple({axis: tuple(at) for axis, at in slices[unit].items()} for unit in members)
        groups.append(ChannelGroup(name, axes, tuple(members), shared))
    return groups
