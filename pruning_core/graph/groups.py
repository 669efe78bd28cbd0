"""From labels to groups: which channels can be removed, each with everything that goes with it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from pruning_core.graph.labels import Axis, Components, Labels, varying
from pruning_core.graph.recorder import Step


@dataclass(frozen=True)
class Group:
    """Channels that look alike: the same axes hold them. ``slices[i]`` lists the indices of channel i on each axis."""

    name: str
    axes: tuple[Axis, ...]
    members: tuple[int, ...]
    slices: tuple[dict[Axis, tuple[int, ...]], ...]

    def __len__(self) -> int:
        return len(self.members)


def rectangles(labels: Labels, steps: Iterable[Step]) -> Components:
    """Ties until whatever is removed leaves every tensor a rectangle: a view of heads or groups loses whole lines."""
    several = [each for step in steps for each in _label_tensors(step.shadow) if len(varying(each)) > 1]
    while True:
        components = labels.solve()
        tied: set[int] = set()
        for each in several:
            _tie_lines(labels, components, each, tied)
        if not tied:
            return components


def _label_tensors(shadow: Any) -> list[Tensor]:
    if isinstance(shadow, Tensor):
        return [shadow]
    return [each for item in shadow for each in _label_tensors(item)] if isinstance(shadow, (tuple, list)) else []


def _tie_lines(labels: Labels, components: Components, found: Tensor, tied: set[int]) -> None:
    """Where the units differ along two dimensions, the outer one's lines are tied. Units that were just tied wait for
    the next round: what they are then may be a rectangle already."""
    core = found
    for dim in range(found.dim()):
        if core.stride(dim) == 0:
            core = core.narrow(dim, 0, 1)
    units = components.of(core)
    dims = [dim for dim in range(units.dim()) if bool((units != units.narrow(dim, 0, 1)).any())]
    here = set(units.unique().tolist()) - {-1}
    if len(dims) < 2 or here & tied:
        return
    labels.here = "a view with two axes of channels"
    labels.tie(core, core.narrow(dims[0], 0, 1).expand(core.shape))
    tied |= here


def groups_of(labels: Labels, components: Components) -> list[Group]:
    """Units with one and the same list of axes form a group, named after its first axis."""
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
        groups.append(Group(name, axes, tuple(members), shared))
    return groups


def removed_indices(groups: dict[str, Group], removed: dict[str, list[int]]) -> dict[Axis, np.ndarray]:
    """Of each axis what goes when these channels of these groups go."""
    gone: dict[Axis, set[int]] = {}
    for name, channels in removed.items():
        for channel in channels:
            for axis, at in groups[name].slices[channel].items():
                gone.setdefault(axis, set()).update(at)
    return {axis: np.array(sorted(at)) for axis, at in gone.items()}
