"""Runs a cut model beside what the dense one did, and changes the sizes that its modules keep as attributes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._python_dispatch import TorchDispatchMode

from pruning_core.graph.attributes import Attributes, upwards_from
from pruning_core.graph.labels import holds_any, stored, words
from pruning_core.graph.masked import MaskedRun
from pruning_core.graph.plan import Plan
from pruning_core.graph.recorder import UNSTEADY, Call, Numbers, Step, Where, arguments_of, number_in, shapes_of
from pruning_core.graph.tracing import GraphError, Inputs, untouched
from pruning_core.graph.usual_names import usual

SIZED = frozenset(
    words(
        "view _unsafe_view reshape expand unflatten slice narrow split split_with_sizes select index repeat zeros "
        "ones empty full new_zeros new_ones new_empty new_full arange full_like tensor_split item _local_scalar_dense "
        "fill_ layer_norm group_norm as_strided"
    )
)

Change = tuple[str, str, Any]


class CannotFollowError(GraphError):
    """The model's code does not follow a cut at this step."""

    def __init__(self, step: Step, message: str) -> None:
        super().__init__(message)
        self.step = step


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
            return Run(compare.at, "", None, output)
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


def fit(attributes: Attributes, beside: Beside) -> float:
    """Runs the cut model; while it stumbles over a size, changes the attribute that says it. How far its output is
    from the one that is wanted."""
    _follow_inputs(attributes, beside.trace)
    mark = attributes.mark()
    quick = Fit(attributes, beside, alike=True)
    try:
        return beside.accept(quick.run())
    except GraphError:
        if not quick.guessed:
            raise
    attributes.back_to(mark)
    return beside.accept(Fit(attributes, beside, alike=False).run())


def _follow_inputs(attributes: Attributes, trace: MaskedRun) -> None:
    """An instance norm without weights has nothing else to say how wide it is."""
    for step in trace.steps:
        module = attributes.modules[step.where]
        if step.name != "instance_norm" or not isinstance(module, _InstanceNorm) or list(module.buffers()):
            continue
        _, shadow = step.tensors[0]
        shape = left(shadow, trace.dead) if isinstance(shadow, Tensor) and module.weight is None else None
        if shape is not None and module.num_features == step.tensors[0][0][1]:
            attributes.set(step.where, "num_features", shape[1])


def follow_names(attributes: Attributes, beside: Beside, plan: Plan) -> None:
    """Sets sizes that no code reads. Where some does after all, and fails or gives something else, they stay."""
    wanted = list(usual(beside.model, plan, attributes.changed))
    every = {name for _, name, _ in wanted}
    for names in ([every] if wanted else []) + [{name} for name in sorted(every)]:
        mark = attributes.mark()
        for path, name, value in wanted:
            if name in names:
                attributes.set(path, name, value)
        if beside.holds():
            if names == every:
                return
        else:
            attributes.back_to(mark)


class Fit:
    """With ``alike``, what helps in one module is done at the same place of all others of its class too: a model of
    many equal blocks is run a few times and not once for each of them."""

    def __init__(self, attributes: Attributes, beside: Beside, *, alike: bool) -> None:
        self.attributes, self.beside, self.trace = attributes, beside, beside.trace
        self.guessed = False
        self._places: dict[int, tuple[Any, ...]] = {}
        self._at: dict[tuple[Any, ...], list[Step]] = defaultdict(list)
        counts: dict[str, int] = defaultdict(int)
        for step in self.trace.steps if alike else []:
            place = (type(attributes.modules[step.where]), counts[step.where], step.name)
            counts[step.where] += 1
            self._places[id(step)] = place
            self._at[place].append(step)

    def run(self) -> Any:
        run = self.beside.run()
        while run.error is not None:
            step = self.trace.steps[min(run.at, len(self.trace.steps) - 1)]
            better = self._mended(step, run)
            if better is None:
                raise CannotFollowError(
                    step,
                    f"{step.where or 'the model'}: cannot follow the cut at its {step.name} "
                    f"({str(run.error).partition(chr(10))[0][:200]}); everything was put back as it was",
                ) from run.error
            run = better
        return run.output

    def _mended(self, step: Step, run: Run) -> Run | None:
        """The first change that lets the model come further."""
        for changes in self._changes(step, run.where):
            mark = self.attributes.mark()
            for path, name, value in changes:
                self.attributes.set(path, name, value)
            now = self.beside.run()
            if now.error is None or now.at > run.at:
                return now
            self.attributes.back_to(mark)
        return None

    def _changes(self, step: Step, stopped: str) -> Iterator[list[Change]]:
        """A number among the operation's arguments may stand in any module around it, another only in its own."""
        sizes = demands(step, self.trace.dead)
        for old in sizes:
            for place in dict.fromkeys((step.where, stopped)):
                for path, name in self.attributes.holders(place, old, upwards=old in step.numbers):
                    for which, value in enumerate(self.attributes.candidates(path, name, old, sizes)):
                        alike = self._alike(step, path, name, which)
                        if alike:
                            self.guessed = True
                            yield [(path, name, value), *alike]
                        yield [(path, name, value)]

    def _alike(self, step: Step, path: str, name: str, which: int) -> list[Change]:
        """The same attribute beside the same steps of other modules, where it holds a size that changes."""
        if path not in upwards_from(step.where):
            return []
        height = list(upwards_from(step.where)).index(path)
        found: dict[str, Change] = {}
        for other in self._at.get(self._places.get(id(step), ()), []):
            there = [*upwards_from(other.where), path][height]
            sizes = demands(other, self.trace.dead) if there != path and there not in found else {}
            for old in sizes:
                if self.attributes.hold(there, name, old) and (not height or old in other.numbers):
                    found[there] = (there, name, self.attributes.candidates(there, name, old, sizes)[which])
                    break
        return list(found.values())


def demands(step: Step, dead: Tensor) -> dict[int, int]:
    """Which sizes must become which; first those among the operation's own arguments."""
    changes: dict[int, int] = {}
    for shape, shadow in step.tensors:
        now = left(shadow, dead) if isinstance(shadow, Tensor) else None
        if now is not None:
            changes.update({old: new for old, new in zip(shape, now, strict=True) if old != new})
    return dict(sorted(changes.items(), key=lambda each: each[0] not in step.numbers))
