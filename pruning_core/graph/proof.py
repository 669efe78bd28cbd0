"""A trial cut on a copy: what the model's code does not follow becomes a rule of its groups, before anybody plans."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import cycle
from typing import Protocol

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pruning_core.graph.balance import Balances
from pruning_core.graph.fitting import CannotFollowError
from pruning_core.graph.groups import Group
from pruning_core.graph.labels import Labels, compact, holds_any, stored, varies, varying
from pruning_core.graph.plan import Plan
from pruning_core.graph.recorder import Recorder, Step
from pruning_core.graph.surgery import slim_
from pruning_core.graph.tracing import GraphError, Inputs

ROUNDS = 60
Kind = tuple[type, str, tuple[int, ...]]
Alike = list[tuple[Recorder, Step]]
TRIALS = ((1, 2, 3), (3, 1, 2))


class Provable(Protocol):
    """What a trial needs of a graph."""

    model: nn.Module
    labels: Labels
    groups: dict[str, Group]
    outputs_may_shrink: bool
    balances: Balances
    where: dict[int, tuple[str, int]]

    def solve(self, traces: list[Recorder]) -> None: ...
    def restored(self, removed: Mapping[str, Iterable[int]]) -> dict[str, list[int]]: ...
    def plan(self, removed: Mapping[str, Iterable[int]]) -> Plan: ...


def prove(graph: Provable, traces: list[Recorder], example: Inputs) -> None:
    """Cuts every group of a copy, twice. Where the copy's code does not follow, one size may serve several tensors: the
    heads of query, key and value, or what comes into a module and what is made of it; they are kept equal. Where even
    that does not help, or where the copy computes something else, the channels stay."""
    tried: Counter[Kind] = Counter()
    balanced: dict[Kind, list[tuple[Tensor, Tensor]]] = {}
    last = ""
    for _ in range(ROUNDS):
        try:
            for quarters in TRIALS:
                _cut(graph, _trial(graph, quarters), example)
            return
        except CannotFollowError as error:
            kind, last = _kind(graph, error.step), str(error)
            alike = [(trace, step) for trace in traces for step in trace.steps if _kind(graph, step) == kind]
            useless = {id(pair) for pair in balanced.pop(kind, [])}
            graph.labels.balances = [pair for pair in graph.labels.balances if id(pair) not in useless]
            before = len(graph.labels.balances)
            for remedy in (REMEDIES if graph.labels.narrow_heads else REMEDIES[1:])[tried[kind] :]:
                tried[kind] += 1
                if remedy(graph, alike, last):
                    break
            else:
                if not _keep_wrong(graph, example):
                    break
            balanced[kind] = graph.labels.balances[before:]
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
    halves = _trial(graph, (2,))
    for name in halves:
        try:
            _cut(graph, {each: halves[each] for each in _balanced_with(graph, name)}, example)
        except GraphError as error:
            found = True
            graph.labels.here = ""
            for slices in graph.groups[name].slices:
                for axis, at in slices.items():
                    why = f"a cut gives other outputs ({str(error).partition(';')[0]})"
                    graph.labels.freeze(graph.labels.axes[axis][list(at)], why)
    return found


def _balanced_with(graph: Provable, name: str) -> set[str]:
    """A group, and those that must lose as many channels."""
    pairs = {i for unit in graph.groups[name].members for i in graph.balances.of_unit.get(unit, [])}
    return {name, *(graph.where[unit][0] for i in pairs for unit in graph.balances.weights[i])}


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


def _kind(graph: Provable, step: Step) -> Kind:
    """The same operation in modules of the same class."""
    module = graph.model.get_submodule(step.where)
    return type(module), step.name, tuple(len(shape) for shape in step.shapes)


def _equal_in_module(graph: Provable, alike: Alike, why: str) -> bool:
    """Query, key and value are split into heads of one size."""
    first: dict[tuple[int, str], Tensor] = {}
    found = False
    for trace, step in alike:
        for labels in _labels(step)[-1:]:
            made = compact(labels)
            other = first.setdefault((id(trace), step.where), made)
            if other is not made and other.shape == made.shape and varying(other) and varying(made):
                graph.labels.balance(*(stored(each)[0].reshape(-1) for each in (other, made)))
                found = True
    return found


def _equal_to_input(graph: Provable, alike: Alike, why: str) -> bool:
    """A width is that of the module's input, or a multiple of it. Elsewhere the channels stay."""
    found = False
    for trace, step in alike:
        source = trace.inputs.get(step.where)
        pairs = (_width(each, source) for each in _labels(step)) if source is not None else ()
        pair = next((pair for pair in pairs if pair is not None), None)
        if pair is None:
            _keep(graph, step, why)
        else:
            graph.labels.balance(*pair)
            found = True
    return found


def _keep_all(graph: Provable, alike: Alike, why: str) -> bool:
    for _, step in alike:
        _keep(graph, step, why)
    return any(holds_any(each) for _, step in alike for each in _labels(step))


def _keep(graph: Provable, step: Step, why: str) -> None:
    graph.labels.here = step.where or "the model"
    for each in _labels(step):
        graph.labels.freeze(each, f"its code does not follow ({why[:120]})")


def _labels(step: Step) -> list[Tensor]:
    return [shadow for _, shadow in step.tensors if isinstance(shadow, Tensor)]


REMEDIES = (_equal_in_module, _equal_to_input, _keep_all)


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
