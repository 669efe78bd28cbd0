"""Runs a cut model beside what the dense one did, operation by operation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pruning_core.graph.labels import holds_any, stored, words
from pruning_core.graph.masked import MaskedRun
from pruning_core.graph.recorder import UNSTEADY, Call, Numbers, Step, Where, arguments_of, number_in, shapes_of
from pruning_core.graph.tracing import GraphError, Inputs, untouched

SIZED = frozenset(
    words(
        "view _unsafe_view reshape expand unflatten slice narrow split split_with_sizes select index repeat zeros "
        "ones empty full new_zeros new_ones new_empty new_full arange full_like tensor_split item _local_scalar_dense "
        "fill_ layer_norm group_norm as_strided"
    )
)


@dataclass(frozen=True)
class Beside:
    """A cut model, what the dense one did, and ``accept``: how far an output is from the one that is wanted; raises
    where it is too far."""

    model: nn.Module
    trace: MaskedRun
    example: Inputs
    accept: Callable[[Any], float]

    def run(self) -> Run:
        args, kwargs = self.example
        where, compare = Where(self.model), Compare(self.trace)
        try:
            with untouched(self.model), torch.inference_mode(), compare:
                output = self.model(*args, **kwargs)
            short = Parted("it ends where the dense model goes on") if compare.at < len(self.trace.steps) else None
            return Run(compare.at, "", short, output)
        except Exception as error:
            return Run(compare.at, where.now, error, None)
        finally:
            where.remove()

    def holds(self) -> bool:
        run = self.run()
        try:
            return run.error is None and self.accept(run.output) >= 0
        except GraphError:
            return False


@dataclass(frozen=True)
class Run:
    """How far a cut model came beside the dense one."""

    at: int
    where: str
    error: Exception | None
    output: Any


class Parted(Exception):  # noqa: N818 - it ends a run, it is no error by itself
    """The cut model does something else than the dense one did."""


class Compare(TorchDispatchMode):
    """Compares every shape of a cut model with what is left of the dense model's."""

    def __init__(self, trace: MaskedRun) -> None:
        super().__init__()
        self.trace, self.at = trace, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = Call(func, arguments_of(func, args, kwargs or {}), "")
        name = call.name
        if name in UNSTEADY:
            return func(*args, **(kwargs or {}))
        if self.at >= len(self.trace.steps):
            raise Parted("it goes on where the dense model ended")
        step = self.trace.steps[self.at]
        if name != step.name:
            raise Parted(f"it runs {name} where the dense model runs {step.name}")
        pointwise = torch.Tag.pointwise in func.tags
        if name not in SIZED and not _numbers_fit(step, call.numbers(), self.trace.dead, pointwise):
            raise Parted(f"{name} gets other numbers than the dense model's")
        if step.constants and not _constants_fit(step, call.tensors()):
            raise Parted(f"{name} computes with another number than the dense model does")
        result = func(*args, **(kwargs or {}))
        want = expected(step, self.trace.dead)
        for have, should in zip(shapes_of(result), want, strict=True):
            if should is not None and have != should:
                raise Parted(f"{name} gives {list(have)} instead of {list(should)}")
        self.at += 1
        return result


def _numbers_fit(step: Step, numbers: Numbers, dead: Tensor, pointwise: bool) -> bool:
    """Sizes may change as the cut demands; what is computed with may not."""
    if len(numbers) != len(step.numbers) or numbers == step.numbers:
        return numbers == step.numbers
    changes = {} if pointwise else demands(step, dead)
    pairs = zip(step.numbers, numbers, strict=True)
    return all(_near(was, now) or (type(was) is int and now == changes.get(was)) for was, now in pairs)


def _constants_fit(step: Step, tensors: list[Tensor]) -> bool:
    pairs = [(was, number_in(tensors[i])) for i, was in step.constants if i < len(tensors)]
    return all(now is None or _near(was, now) for was, now in pairs)


def _near(was: float, now: float) -> bool:
    """Fractions may have been computed from a tensor, and are rounded then."""
    return was == now or (type(was) is float and (math.isclose(was, now, rel_tol=1e-5) or math.isnan(was)))


def expected(step: Step, dead: Tensor) -> list[tuple[int, ...] | None]:
    """The shapes that are left; None where nothing is known."""
    shadows = step.shadow if isinstance(step.shadow, (tuple, list)) else [step.shadow] * len(step.shapes)
    if len(shadows) != len(step.shapes):
        return [None] * len(step.shapes)
    return [left(each, dead) if isinstance(each, Tensor) and holds_any(each) else None for each in shadows]


def left(labels: Tensor, dead: Tensor) -> tuple[int, ...] | None:
    """The shape of a label tensor when its dead labels are taken out; None where that is no rectangle."""
    core = stored(labels)[0]
    alive = ~dead[core.long()]
    shape = []
    for dim, size in enumerate(labels.shape):
        if alive.shape[dim] != size:
            shape.append(size)
        else:
            shape.append(int(alive.movedim(dim, 0).reshape(size, -1).any(1).sum()) if size else 0)
    known = [n for dim, n in enumerate(shape) if alive.shape[dim] == labels.shape[dim]]
    return tuple(shape) if int(alive.sum()) == int(torch.tensor(known or [1]).prod()) else None


def demands(step: Step, dead: Tensor) -> dict[int, int]:
    """Which sizes must become which; first those among the operation's own arguments."""
    changes: dict[int, int] = {}
    for shape, shadow in step.tensors:
        now = left(shadow, dead) if isinstance(shadow, Tensor) else None
        if now is not None:
            changes.update({old: new for old, new in zip(shape, now, strict=True) if old != new})
    return dict(sorted(changes.items(), key=lambda each: each[0] not in step.numbers))
