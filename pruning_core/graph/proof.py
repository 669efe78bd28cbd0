"""A trial cut on a copy: what the model's code does not follow becomes a rule of its groups, before anybody plans."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Protocol

from torch import Tensor, nn

from pruning_core.graph.attributes import CannotFollowError
from pruning_core.graph.groups import Group
from pruning_core.graph.labels import Labels, varies
from pruning_core.graph.plan import Plan
from pruning_core.graph.recorder import Recorder, Step
from pruning_core.graph.surgery import slim_
from pruning_core.graph.tracing import GraphError, Inputs

ROUNDS = 12


class Provable(Protocol):
    """What a trial needs of a graph."""

    model: nn.Module
    labels: Labels
    groups: dict[str, Group]
    outputs_may_shrink: bool

    def solve(self, traces: list[Recorder]) -> None: ...
    def restored(self, removed: Mapping[str, Iterable[int]]) -> dict[str, list[int]]: ...
    def plan(self, removed: Mapping[str, Iterable[int]]) -> Plan: ...


def prove(graph: Provable, traces: list[Recorder], example: Inputs) -> None:
    """Halves every group of a copy. Where the copy's code gets a width from its input's, both widths are kept equal;
    where even that does not help, the channels stay."""
    tried: set[tuple[type, str, tuple[int, ...]]] = set()
    for _ in range(ROUNDS):
        plan = graph.plan(graph.restored({name: range(len(group) // 2) for name, group in graph.groups.items()}))
        try:
            shrink = graph.outputs_may_shrink
            slim_(copy.deepcopy(graph.model), plan, example_inputs=example, outputs_may_shrink=shrink)
            return
        except CannotFollowError as error:
            kind = _kind(graph, error.step)
            again = kind in tried
            tried.add(kind)
            for trace in traces:
                for step in trace.steps:
                    if _kind(graph, step) == kind:
                        _bind(graph, trace, step, again, str(error))
            graph.solve(traces)
    raise GraphError("example_inputs: no cut of this model can be followed; see the last error above")


def _kind(graph: Provable, step: Step) -> tuple[type, str, tuple[int, ...]]:
    """The same operation in modules of the same class."""
    module = graph.model.get_submodule(step.where)
    return type(module), step.name, tuple(len(shape) for shape in step.shapes)


def _bind(graph: Provable, trace: Recorder, step: Step, again: bool, why: str) -> None:
    labels = [shadow for _, shadow in step.tensors if isinstance(shadow, Tensor)]
    source = trace.inputs.get(step.where)
    pairs = [_width(each, source) for each in labels] if source is not None and not again else []
    found = [pair for pair in pairs if pair is not None]
    for inner, outer in found[:1]:
        graph.labels.balance(inner, outer)
    if not found:
        graph.labels.here = step.where or "the model"
        for each in labels:
            graph.labels.freeze(each, f"its code does not follow ({why[:120]})")


def _width(labels: Tensor, source: Tensor) -> tuple[Tensor, Tensor] | None:
    """Dimensions that lie together and are as wide as the module's input (or twice, or three times), the last ones
    first; and as often the channels of that input."""
    outer = _line(source)
    if outer is None:
        return None
    for times in (1, 2, 3):
        for last in reversed(range(labels.dim())):
            for first in reversed(range(last + 1)):
                inner = labels
                for dim in range(labels.dim()):
                    if not first <= dim <= last:
                        inner = inner.narrow(dim, 0, 1)
                if inner.numel() == times * len(outer) and any(varies(inner, dim) for dim in range(first, last + 1)):
                    return inner.reshape(-1), outer.repeat(times)
    return None


def _line(labels: Tensor) -> Tensor | None:
    dims = [dim for dim in range(labels.dim()) if varies(labels, dim)]
    return labels.movedim(dims[-1], -1).reshape(-1, labels.shape[dims[-1]])[0] if dims else None
