"""Runs a cut model and compares it with the masked one, operation by operation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pruning_core.graph.cut.difference import accept
from pruning_core.graph.cut.reference import MaskedRun
from pruning_core.graph.errors import GraphError
from pruning_core.graph.inputs import Inputs, leaves, untouched
from pruning_core.graph.trace import draws
from pruning_core.graph.trace.labels import holds_any, left
from pruning_core.graph.trace.operations import SIZED, UNSTEADY
from pruning_core.graph.trace.ranges import RANGES, along_range, positions
from pruning_core.graph.trace.recorder import Call, ModulePath, Numbers, Operation, arguments_of, number_in, shapes_of
from pruning_core.graph.trace.upcast import Upcast


@dataclass(frozen=True)
class CutModel:
    """A cut model, and the run of the masked one with its outputs, which it must give to a relative ``tolerance`` (any
    outputs without). It computes in float64 if that one did."""

    model: nn.Module
    trace: MaskedRun
    example: Inputs
    reference: list[Tensor] | None
    tolerance: float

    def accept(self, output: Any) -> float:
        """The relative difference of an output; GraphError where it is above the tolerance."""
        return 0.0 if self.reference is None else accept(self.reference, leaves(output), self.tolerance)

    def run(self) -> Outcome:
        """Runs the cut model up to the first divergence."""
        args, kwargs = self.example
        before = self.trace.upcast
        upcast = Upcast(self.model, before.scales) if before else None
        path, compare = ModulePath(self.model), Comparing(self.trace, upcast)
        try:
            with untouched(self.model), torch.inference_mode(), compare:
                output = self.model(*args, **kwargs)
            short = (
                Diverged("it ends where the dense model goes on") if compare.at < len(self.trace.operations) else None
            )
            return Outcome(compare.at, "", short, output)
        except Exception as error:
            return Outcome(compare.at, path.now, error, None)
        finally:
            path.remove()

    def holds(self) -> bool:
        """Whether the model runs through and its output is accepted."""
        run = self.run()
        try:
            return run.error is None and self.accept(run.output) >= 0
        except GraphError:
            return False


@dataclass(frozen=True)
class Outcome:
    """How far a cut model followed the masked one: ``at`` operations, then ``error`` in ``where``, or ``output``."""

    at: int
    where: str
    error: Exception | None
    output: Any


class Diverged(Exception):  # noqa: N818 - it ends a run, it is no error by itself
    """The cut model computes something other than the masked one."""


class Comparing(TorchDispatchMode):
    """Dispatch mode that compares every shape of a cut model with the expected one."""

    def __init__(self, trace: MaskedRun, upcast: Upcast | None) -> None:
        super().__init__()
        self.trace, self.upcast, self.at = trace, upcast, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = Call(func, arguments_of(func, args, kwargs or {}), "")
        name = call.name
        if name in UNSTEADY:
            return self._run(func, args, kwargs or {})
        if self.at >= len(self.trace.operations):
            raise Diverged("it goes on where the dense model ended")
        operation = self.trace.operations[self.at]
        if name != operation.name:
            raise Diverged(f"it runs {name} where the dense model runs {operation.name}")
        pointwise = torch.Tag.pointwise in func.tags
        if name not in SIZED and not _numbers_fit(operation, call.numbers(), self.trace.dead, pointwise):
            raise Diverged(f"{name} gets other numbers than the dense model's")
        if operation.constants and not _constants_fit(operation, call.tensors()):
            raise Diverged(f"{name} computes with another number than the dense model does")
        if name in RANGES and not _same_range(operation, call, self.trace.dead):
            raise Diverged(f"{name} takes other channels than the dense model's")
        result = self._run(func, args, kwargs or {})
        want = expected(operation, self.trace.dead)
        for have, should in zip(shapes_of(result), want, strict=True):
            if should is not None and have != should:
                raise Diverged(f"{name} gives {list(have)} instead of {list(should)}")
        self.at += 1
        return result

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        return self.upcast.run(func, args, kwargs) if self.upcast else draws.run(func, args, kwargs)


def _numbers_fit(operation: Operation, numbers: Numbers, dead: Tensor, pointwise: bool) -> bool:
    """Whether number arguments agree: sizes may change as the cut demands, other numbers may not."""
    if len(numbers) != len(operation.numbers) or numbers == operation.numbers:
        return numbers == operation.numbers
    changes = {} if pointwise else demands(operation, dead)
    pairs = zip(operation.numbers, numbers, strict=True)
    return all(_near(was, now) or (type(was) is int and now == changes.get(was)) for was, now in pairs)


def _same_range(operation: Operation, call: Call, dead: Tensor) -> bool:
    """Whether a range of channels by number is what is left of the dense model's range."""
    line = along_range(operation)
    if line is None:
        return True
    kept = (~dead[line.long()]).nonzero()[:, 0].tolist()
    if call["self"].shape[call["dim"]] != len(kept):
        return True  # the shapes say more
    before = set(positions(operation, operation.numbers, len(line)))
    return [kept[at] for at in positions(operation, call.numbers(), len(kept))] == [at for at in kept if at in before]


def _constants_fit(operation: Operation, tensors: list[Tensor]) -> bool:
    pairs = [(was, number_in(tensors[i])) for i, was in operation.constants if i < len(tensors)]
    return all(now is None or _near(was, now) for was, now in pairs)


def _near(was: float, now: float) -> bool:
    """Fractions may have been computed from a tensor, and are rounded then."""
    return was == now or (type(was) is float and (math.isclose(was, now, rel_tol=1e-5) or math.isnan(was)))


def expected(operation: Operation, dead: Tensor) -> list[tuple[int, ...] | None]:
    """The shapes after the cut; None where unknown."""
    shadows = (
        operation.shadow if isinstance(operation.shadow, (tuple, list)) else [operation.shadow] * len(operation.shapes)
    )
    if len(shadows) != len(operation.shapes):
        return [None] * len(operation.shapes)
    return [left(each, dead) if isinstance(each, Tensor) and holds_any(each) else None for each in shadows]


def demands(operation: Operation, dead: Tensor) -> dict[int, int]:
    """(old, new) sizes that must change, those among the operation's own arguments first."""
    changes: dict[int, int] = {}
    for shape, shadow in operation.tensors:
        now = left(shadow, dead) if isinstance(shadow, Tensor) else None
        if now is not None:
            changes.update({old: new for old, new in zip(shape, now, strict=True) if old != new})
    return dict(sorted(changes.items(), key=lambda each: each[0] not in operation.numbers))
