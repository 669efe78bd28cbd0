"""The channels of a model: traced, tied and grouped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from torch import nn

from pruning_core.graph.balance import Balances
from pruning_core.graph.groups import Group, groups_of, rectangles, removed_indices
from pruning_core.graph.labels import Axis, Labels
from pruning_core.graph.modules import constrain
from pruning_core.graph.plan import Plan, digest
from pruning_core.graph.proof import prove
from pruning_core.graph.recorder import Cost, Recorder
from pruning_core.graph.shadows import Stored
from pruning_core.graph.tracing import GraphError, as_inputs, record
from pruning_core.graph.values import mean_values


class ChannelGraph:
    """Which channels of a model can be removed, and what goes with each.

    ``ChannelGraph.trace(model, example_inputs)`` runs the model once in evaluation and once in training mode (norms
    keep their statistics) and leaves it as it was. Nothing has to be ignored by hand: outputs, and whatever an
    operation without a rule touches, stay; ``frozen()`` says why.
    """

    def __init__(
        self,
        model: nn.Module,
        labels: Labels,
        stored: Stored,
        traces: list[Recorder],
        notes: list[str],
        outputs_may_shrink: bool = False,
    ) -> None:
        self.model, self.labels, self.stored = model, labels, stored
        self.outputs_may_shrink = outputs_may_shrink
        self.notes = notes
        self.parameters = frozenset(name for name, _ in model.named_parameters())
        self.consumers = frozenset(axis for trace in traces for axis in trace.consumers)
        self.norms = frozenset(where for trace in traces for where in trace.norms)
        self._costs = traces[0].costs
        self._products = [each for trace in traces for each in trace.products]
        self.solve(traces)

    def solve(self, traces: list[Recorder]) -> None:
        """Ties become groups."""
        self.components = rectangles(self.labels, [step for trace in traces for step in trace.steps])
        self.groups: dict[str, Group] = {group.name: group for group in groups_of(self.labels, self.components)}
        self.balances = Balances(self.components, self.labels.balances)
        self.where = {unit: (group.name, i) for group in self.groups.values() for i, unit in enumerate(group.members)}

    @classmethod
    def trace(
        cls,
        model: nn.Module,
        example_inputs: Any,
        train_inputs: Any = None,
        *,
        outputs_may_shrink: bool = False,
        narrow_heads: bool = False,
    ) -> ChannelGraph:
        """With ``outputs_may_shrink`` channels of outputs are not frozen; ``slim_`` must be told the same. With
        ``narrow_heads`` attention keeps its heads and loses channels of each."""
        shrink = outputs_may_shrink
        labels = Labels(narrow_heads)
        stored = Stored(labels, model)
        traces = [record(model, as_inputs(example_inputs), labels, stored, False, Recorder, shrink)]
        notes: list[str] = []
        try:
            inputs = as_inputs(example_inputs if train_inputs is None else train_inputs)
            traces.append(record(model, inputs, labels, stored, True, Recorder, shrink))
        except GraphError as error:
            if train_inputs is not None:
                raise
            notes.append(f"traced in evaluation mode only: {error}")
        constrain(model, labels)
        graph = cls(model, labels, stored, traces, notes, shrink)
        prove(graph, traces, as_inputs(example_inputs))
        return graph

    # ---- what there is ----------------------------------------------------------------------------------------------

    def frozen(self) -> list[tuple[Axis, int, str]]:
        """Axes with channels that stay, how many, and why."""
        found = []
        for axis, vector in self.labels.axes.items():
            units = self.components.of_label[vector.numpy()]
            why = Counter(reason for unit in units if (reason := self._reason(int(unit))))
            found += [(axis, count, reason) for reason, count in why.items()]
        return found

    def _reason(self, unit: int) -> str | None:
        if unit in self.components.reasons or unit in self.where or self.components.fixed(unit):
            return self.components.reasons.get(unit)
        return "no other channel has the same axes, and one must stay"

    def untraced(self) -> list[str]:
        """Parameters that no operation has used on these inputs."""
        return [
            name
            for name in self.stored.names
            if all(self._alone(Axis(name, dim)) for dim in range(self.stored.names[name].dim()))
        ]

    def _alone(self, axis: Axis) -> bool:
        units = self.components.of_label[self.labels.axes[axis].numpy()]
        return all(self.components.fixed(int(unit)) and int(unit) not in self.components.reasons for unit in units)

    def read_values(self, run: Callable[[nn.Module], Any]) -> np.ndarray:
        """The mean absolute value that layers read of each label while ``run(model)`` works."""
        return mean_values(self.model, run, self.labels.narrow_heads)

    # ---- what is left when channels go ------------------------------------------------------------------------------

    def dead(self, removed: Mapping[str, Iterable[int]]) -> np.ndarray:
        """Of each label whether it goes."""
        units = list(self._units(removed))
        gone = np.zeros(int(self.components.of_label.max()) + 1, dtype=bool)
        gone[units] = True
        return gone[self.components.of_label]

    def params(self, removed: Mapping[str, Iterable[int]] | None = None) -> int:
        """Parameters of the whole model."""
        dead = self.dead(removed or {})
        total = 0
        for name, tensor in self.model.named_parameters():
            kept = [
                int((~dead[self.labels.axes[Axis(name, dim)].numpy()]).sum()) if name in self.stored.names else size
                for dim, size in enumerate(tensor.shape)
            ]
            total += int(np.prod(kept))
        return total

    def macs(self, removed: Mapping[str, Iterable[int]] | None = None) -> int:
        """Multiply-adds of weighted layers and attention for one forward pass on the example inputs."""
        dead = self.dead(removed or {})
        return sum(_cost(cost, dead) for cost in self._costs)

    def restored(
        self, removed: Mapping[str, Iterable[int]], score: Mapping[int, float] | None = None
    ) -> dict[str, list[int]]:
        """The part of it that leaves pieces of a ``chunk`` or ``split`` equal; ``score`` says what to keep, by unit."""
        units = self._units(removed)
        found: dict[str, list[int]] = {}
        for unit in sorted(self.balances.restored(units, score)):
            name, i = self.where[unit]
            found.setdefault(name, []).append(i)
        return found

    def _units(self, removed: Mapping[str, Iterable[int]]) -> set[int]:
        return {self.groups[name].members[i] for name, channels in removed.items() for i in channels}

    def plan(self, removed: Mapping[str, Iterable[int]]) -> Plan:
        """The plan that removes these channels of these groups."""
        chosen = {name: tuple(sorted({int(i) for i in channels})) for name, channels in removed.items()}
        for name, channels in chosen.items():
            self._check(name, channels)
        if any(self.balances.off(self._units(chosen))):
            raise GraphError("plan: the pieces of a chunk or split would differ in size; make it with a planner")
        gone = self.dead(chosen)
        axes = {axis: tuple(at.tolist()) for axis, at in removed_indices(self.groups, chosen).items()}  # type: ignore[arg-type]
        return Plan(
            {axis: len(self.labels.axes[axis]) for axis in axes},
            axes,
            {name: channels for name, channels in chosen.items() if channels},
            self.consumers & axes.keys(),
            self.norms,
            digest(self.model),
            self.labels.narrow_heads,
            frozenset(where for where, vector in self._products if bool(gone[vector.numpy()].any())),
        )

    def _check(self, name: str, channels: tuple[int, ...]) -> None:
        if name not in self.groups:
            raise GraphError(f"plan: there is no such group, got {name!r}; see graph.groups")
        count = len(self.groups[name])
        if any(not 0 <= i < count for i in channels) or len(channels) >= count:
            raise GraphError(
                f"plan: {name} has {count} channels of which one must stay, got {list(channels)[:8]}; remove others"
            )


def _cost(cost: Cost, dead: np.ndarray) -> int:
    total = cost.rows
    for vector in cost.vectors:
        total *= int((~dead[vector.numpy()]).sum())
    return total
