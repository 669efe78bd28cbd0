"""A trial cut on a copy: what the model's code does not follow becomes a rule of its groups, before anybody plans."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Mapping
from itertools import cycle
from typing import Protocol

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pruning_core.graph.fitting import CannotFollowError
from pruning_core.graph.groups import Group
from pruning_core.graph.labels import Labels, varies
from pruning_core.graph.plan import Plan
from pruning_core.graph.recorder import Recorder, Step
from pruning_core.graph.surgery import slim_
from pruning_core.graph.tracing import GraphError, Inputs

ROUNDS = 12
TRIALS = ((1, 2, 3), (3, 1, 2))


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
    """Cuts every group of a copy, twice. Where the copy's code gets a width from its input's, both widths are kept
    equal; where even that does not help, or where it computes something else, the channels stay."""
    tried: set[tuple[type, str, tuple[int, ...]]] = set()
    last = ""
    for _ in range(ROUNDS):
        try:
            for quarters in TRIALS:
                _cut(graph, _trial(graph, quarters), example)
            return
        except CannotFollowError as error:
            kind, last = _kind(graph, error.step), str(error)
            again = kind in tried
            tried.add(kind)
            for trace in traces:
                for step in trace.steps:
                    if _kind(graph, step) == kind:
                        _bind(graph, trace, step, again, last)
        except GraphError as error:
            last = str(error)
            if not _keep_wrong(graph, example):
                break
        graph.solve(traces)
    raise GraphError(f"example_inputs: no cut of this model can be followed ({last}); leave the model as it is")


def _cut(graph: Provable, removed: Mapping[str, Iterable[int]], example: Inputs) -> None:
    plan = graph.plan(graph.restored(removed))
    slim_(_copied(graph.model), plan, example_inputs=example, outputs_may_shrink=graph.outputs_may_shrink)


def _keep_wrong(graph: Provable, example: Inputs) -> bool:
    """Freezes the groups that alone make the model compute something else; whether there are any."""
    found = False
    for name, removed in _trial(graph, TRIALS[0]).items():
        try:
            _cut(graph, {name: removed}, example)
        except GraphError as error:
            found = True
            graph.labels.here = ""
            for slices in graph.groups[name].slices:
                for axis, at in slices.items():
                    why = f"a cut gives other outputs ({str(error).partition(';')[0]})"
                    graph.labels.freeze(graph.labels.axes[axis][list(at)], why)
    return found


def _copied(model: nn.Module) -> nn.Module:
    """A deep copy. Activations that a module keeps from its last step cannot be copied: the copy gets their values."""
    kept = [leaf for module in model.modules() for leaf in pytree.tree_leaves(list(vars(module).values()))]
    memo = {id(leaf): leaf.detach() for leaf in kept if isinstance(leaf, Tensor) and not leaf.is_leaf}
    return copy.deepcopy(model, memo)


def _trial(graph: Provable, quarters: tuple[int, ...]) -> dict[str, list[int]]:
    """So many quarters of one group after another: some code follows as long as all lose the same share."""
    some = random.Random(0)
    return {
        name: some.sample(range(len(group)), max(1, len(group) * share // 4))
        for (name, group), share in zip(graph.groups.items(), cycle(quarters), strict=False)
    }


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
