"""A trial cut of a copy: groups that the model's code cannot follow are tied, balanced or frozen before planning."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import cycle

import torch
from torch import Tensor, nn

from pruning_core.graph.couple.groups import Coupling, Removed
from pruning_core.graph.errors import CannotFollowError, GraphError
from pruning_core.graph.trace.labels import compact, holds_any, unexpanded, varies, varying
from pruning_core.graph.trace.operations import SIZED
from pruning_core.graph.trace.ranges import RANGES, along_range, positions
from pruning_core.graph.trace.recorder import Operation, Recorder

ROUNDS = 60
TRIALS = {(1, 2, 3): True, (3, 1, 2): False}
"""Quarters of one group after another: some code follows as long as all lose the same share. One trial of numbers, and
one of shapes alone."""

Kind = tuple[type, str, tuple[int, ...]]
Alike = list[tuple[Recorder, Operation]]


def prove(coupling: Coupling, model: nn.Module, attempt: Callable[[Removed, bool], None]) -> None:
    """Cuts every group, twice, by ``attempt``, which raises where the cut model differs from the masked one.

    Where the code does not follow, one size may serve several tensors: the heads of query, key and value, or what
    comes into a module and what is made of it; these are balanced. Where even that does not help, or where the cut
    model computes something else, the channels are frozen.
    """
    tried: Counter[Kind] = Counter()
    balanced: dict[Kind, list[tuple[Tensor, Tensor]]] = {}
    last, labels = "", coupling.labels
    for _ in range(ROUNDS):
        if not coupling.groups:
            return
        try:
            for quarters, numbers in TRIALS.items():
                attempt(_trial(coupling, quarters), numbers)
            return
        except CannotFollowError as error:
            kind, last = _kind(model, error.operation), str(error)
            alike = [
                (trace, each) for trace in coupling.traces for each in trace.operations if _kind(model, each) == kind
            ]
            useless = {id(pair) for pair in balanced.pop(kind, [])}
            labels.balances = [pair for pair in labels.balances if id(pair) not in useless]
            before = len(labels.balances)
            for remedy in (REMEDIES if labels.narrow_heads else REMEDIES[1:])[tried[kind] :]:
                tried[kind] += 1
                if remedy(coupling, alike, last):
                    break
            else:
                if not _freeze_wrong(coupling, attempt):
                    break
            balanced[kind] = labels.balances[before:]
        except GraphError as error:
            last = str(error)
            if not _freeze_wrong(coupling, attempt):
                break
        coupling.solve()
    raise GraphError(f"example_inputs: no cut of this model can be followed ({last}); leave the model as it is")


def _freeze_wrong(coupling: Coupling, attempt: Callable[[Removed, bool], None]) -> bool:
    """Freezes each group whose cut alone changes the output; whether there was any."""
    found = False
    halves = _trial(coupling, (2,))
    for name in halves:
        try:
            attempt({each: halves[each] for each in _balanced_with(coupling, name)}, True)
        except GraphError as error:
            found = True
            for slices in coupling.groups[name].slices:
                for axis, at in slices.items():
                    why = f"a cut gives other outputs ({str(error).partition(';')[0]})"
                    coupling.labels.freeze(coupling.labels.axes[axis][list(at)], why)
    return found


def _balanced_with(coupling: Coupling, name: str) -> set[str]:
    """A group and the groups balanced with it."""
    pairs = {i for unit in coupling.groups[name].members for i in coupling.balances.of_unit.get(unit, [])}
    return {name, *(coupling.where[unit][0] for i in pairs for unit in coupling.balances.weights[i])}


def _trial(coupling: Coupling, quarters: tuple[int, ...]) -> dict[str, list[int]]:
    """Random channels: ``quarters`` of each group, cycling."""
    some = random.Random(0)
    return {
        name: some.sample(range(len(group)), max(1, len(group) * share // 4))
        for (name, group), share in zip(coupling.groups.items(), cycle(quarters), strict=False)
    }


def _kind(model: nn.Module, operation: Operation) -> Kind:
    """A key shared by the same operation in all modules of one class."""
    module = model.get_submodule(operation.where)
    return type(module), operation.name, tuple(len(shape) for shape in operation.shapes)


def _equal_in_module(coupling: Coupling, alike: Alike, why: str) -> bool:
    """Query, key and value are split into heads of one size."""
    first: dict[tuple[int, str], Tensor] = {}
    found = False
    for trace, operation in alike:
        for labels in _labels(operation)[-1:]:
            made = compact(labels)
            other = first.setdefault((id(trace), operation.where), made)
            if other is not made and other.shape == made.shape and varying(other) and varying(made):
                coupling.labels.balance(*(unexpanded(each)[0].reshape(-1) for each in (other, made)))
                found = True
    return found


def _equal_to_input(coupling: Coupling, alike: Alike, why: str) -> bool:
    """Balances a width with that of the module's input, or a multiple; freezes the channels otherwise."""
    found = False
    for trace, operation in alike:
        source = trace.inputs.get(operation.where)
        pairs = (_width(each, source) for each in _labels(operation)) if source is not None else ()
        pair = next((pair for pair in pairs if pair is not None), None)
        if pair is None:
            _freeze(coupling, operation, why)
        else:
            coupling.labels.balance(*pair)
            found = True
    return found


def _equal_halves(coupling: Coupling, alike: Alike, why: str) -> bool:
    """``x[:, : n // 2]`` takes a half as long as both lose as many channels."""
    found = False
    for _, line, taken in _ranges(alike):
        half = len(line) // 2
        if len(line) == 2 * half and taken in (range(half), range(half, 2 * half)):
            coupling.labels.balance(line[:half], line[half:])
            found = True
    return found


def _freeze_range(coupling: Coupling, alike: Alike, why: str) -> bool:
    """A range by number is the same one as long as all between its bounds and the end they are counted from stay."""
    found = False
    for operation, line, taken in _ranges(alike):
        bounds = [int(each) for each in operation.numbers[1:3]] if operation.name == "slice" else [taken.stop]
        kept = [line[:bound] if bound >= 0 else line[bound:] for bound in bounds if bound < len(line)]
        by_number = torch.cat([line[:0], *kept]).unique()
        if 0 < len(by_number) < len(line):
            with coupling.labels.at(f"{operation.name} in {operation.where or 'the model'}"):
                coupling.labels.freeze(by_number, "is taken by a number that is no attribute and no share of the shape")
            found = True
    return found


def _ranges(alike: Alike) -> Iterator[tuple[Operation, Tensor, range]]:
    for _, operation in alike:
        line = along_range(operation) if operation.name in RANGES else None
        if line is not None:
            yield operation, line, positions(operation, operation.numbers, len(line))


def _one_number(coupling: Coupling, alike: Alike, why: str) -> bool:
    """One size in the code, such as ``self.width``, may serve operations of several kinds in one module."""
    found = False
    for trace, operation in alike:
        mine = _sized_lines(operation)
        others = [each for each in trace.operations if each.where == operation.where and each is not operation]
        for size, line in mine.items():
            for other in (lines[size] for each in others if size in (lines := _sized_lines(each))):
                coupling.labels.balance(line, other)
                found = True
    return found


def _sized_lines(operation: Operation) -> dict[int, Tensor]:
    """By size: the labels along a dimension of what an operation gave, if that size is among its arguments."""
    if operation.name not in SIZED or not isinstance(operation.shadow, Tensor):
        return {}
    made = operation.shadow
    return {
        made.shape[dim]: made.movedim(dim, -1).reshape(-1, made.shape[dim])[0]
        for dim in varying(made)
        if made.shape[dim] in operation.numbers
    }


def _freeze_all(coupling: Coupling, alike: Alike, why: str) -> bool:
    for _, operation in alike:
        _freeze(coupling, operation, why)
    return any(holds_any(each) for _, operation in alike for each in _labels(operation))


def _freeze(coupling: Coupling, operation: Operation, why: str) -> None:
    with coupling.labels.at(operation.where or "the model"):
        for each in _labels(operation):
            coupling.labels.freeze(each, f"its code does not follow ({why[:120]})")


def _labels(operation: Operation) -> list[Tensor]:
    return [shadow for _, shadow in operation.tensors if isinstance(shadow, Tensor)]


REMEDIES = (_equal_in_module, _equal_halves, _one_number, _freeze_range, _equal_to_input, _freeze_all)


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
