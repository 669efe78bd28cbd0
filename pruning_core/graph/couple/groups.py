"""Groups units: which channels can be removed, each with everything that is tied to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from pruning_core.graph.couple.balances import Balances
from pruning_core.graph.couple.components import Components, rectangles
from pruning_core.graph.trace.labels import Axis, Labels
from pruning_core.graph.trace.recorder import Recorder

Removed = Mapping[str, Iterable[int]]
"""Group name -> the channels of it that go."""


@dataclass(frozen=True)
class ChannelGroup:
    """Channels on the same axes, which can replace each other.

    ``members``: their units. ``units``: by axis the unit of each index.
    """

    name: str
    axes: tuple[Axis, ...]
    members: tuple[int, ...]
    units: Mapping[Axis, np.ndarray] = field(repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.members)

    @cached_property
    def numbers(self) -> np.ndarray:
        """``members`` as an array."""
        return np.array(self.members)

    def rows(self, axis: Axis) -> int:
        """How many indices of an axis one channel has."""
        return int((self.units[axis] == self.members[0]).sum())

    @cached_property
    def slices(self) -> tuple[dict[Axis, tuple[int, ...]], ...]:
        """The indices of each channel, by axis."""
        found: tuple[dict[Axis, tuple[int, ...]], ...] = tuple({} for _ in self.members)
        for axis in self.axes:
            units = self.units[axis]
            order = np.argsort(units, kind="stable")
            bounds = [np.searchsorted(units[order], self.numbers, side=side) for side in ("left", "right")]
            for of_channel, start, stop in zip(found, *bounds, strict=True):
                of_channel[axis] = tuple(order[start:stop].tolist())
        return found


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
        gone = np.zeros(self.components.count, dtype=bool)
        for name, channels in removed.items():
            gone[self.groups[name].numbers[list(channels)]] = True
        return gone[self.components.of_label]

    def restored(self, removed: Removed, score: Mapping[int, float] | None = None) -> dict[str, list[int]]:
        """The part of ``removed`` that leaves pieces of a ``chunk`` or ``split`` equal.

        ``score``, by unit: the highest are restored first.
        """
        chosen = {name: sorted(set(channels)) for name, channels in removed.items()}
        units = self.units(chosen) & self.balances.of_unit.keys()
        back = {self.where[unit] for unit in units - self.balances.restored(units, score)}
        left = {name: [i for i in channels if (name, i) not in back] for name, channels in chosen.items()}
        return {name: channels for name, channels in left.items() if channels}

    def removed_indices(self, removed: Removed) -> dict[Axis, tuple[int, ...]]:
        """Per axis: the indices that are removed with these channels."""
        dead = self.dead(removed)
        axes = dict.fromkeys(axis for name, channels in removed.items() if channels for axis in self.groups[name].axes)
        return {axis: tuple(np.flatnonzero(dead[self.labels.axes[axis].numpy()]).tolist()) for axis in axes}


def groups_of(labels: Labels, components: Components) -> list[ChannelGroup]:
    """Units on the same axes form a group, named after its first axis; units are in the order of their first label."""
    units = {axis: components.of_label[vector.numpy()] for axis, vector in labels.axes.items()}
    random = np.random.default_rng(0).integers(1, 2**63, len(units), dtype=np.uint64)
    alike = np.zeros(components.count, dtype=np.uint64)  # a sum of random numbers stands for a set of axes
    for number, of_axis in zip(random, units.values(), strict=True):
        alike[np.unique(of_axis)] += number
    found, first = np.unique(components.of_label, return_index=True)
    free = [unit for unit in found[np.argsort(first)].tolist() if alike[unit] and not components.fixed(unit)]
    members: dict[int, list[int]] = {}
    for unit in free:
        members.setdefault(int(alike[unit]), []).append(unit)
    axes: dict[int, list[Axis]] = {}
    for axis, of_axis in units.items():
        for kind in np.unique(alike[of_axis]).tolist():
            axes.setdefault(kind, []).append(axis)
    named: dict[str, int] = {}
    groups = []
    for kind, each in members.items():
        if len(each) < 2:
            continue
        name = str(axes[kind][0])
        named[name] = named.get(name, 0) + 1
        if named[name] > 1:
            name = f"{name}#{named[name]}"
        groups.append(ChannelGroup(name, tuple(axes[kind]), tuple(each), units))
    return groups
