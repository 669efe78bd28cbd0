"""Sizes that a module keeps as attributes, found by running the cut model beside what the dense one did."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pruning_core.graph.labels import holds_any, stored, words
from pruning_core.graph.masked import MaskedRun
from pruning_core.graph.modules import widths
from pruning_core.graph.recorder import UNSTEADY, Numbers, Step, Where, numbers_of, shapes_of
from pruning_core.graph.tracing import GraphError, Inputs, untouched

SIZED = frozenset(
    words(
        "view _unsafe_view reshape expand unflatten slice narrow split split_with_sizes select index repeat zeros "
        "ones empty full new_zeros new_ones new_empty new_full arange full_like tensor_split item _local_scalar_dense "
        "fill_ layer_norm group_norm as_strided"
    )
)


class Attributes:
    """What was changed, by module; only plain numbers, so that it can be saved and done again."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.changed: dict[str, dict[str, Any]] = {}

    def set(self, path: str, name: str, value: Any) -> None:
        setattr(self.modules[path], name, value)
        self.changed.setdefault(path, {})[name] = value

    def follow_parameters(self) -> None:
        """PyTorch's own modules say their widths."""
        for path, module in self.modules.items():
            for name, value in widths(module).items():
                if getattr(module, name) != value:
                    self.set(path, name, value)

    def holders(self, where: str, old: int, upwards: bool) -> Iterator[tuple[str, str]]:
        """Attributes that hold this number: in the module where it is needed, then in those around it."""
        for path in _upwards(where) if upwards else [where]:
            names = [name for name, value in vars(self.modules[path]).items() if _holds(value, old)]
            for name in sorted(names, key=_unlikely):
                yield path, name

    @contextlib.contextmanager
    def trying(self, path: str, name: str, value: Any) -> Iterator[Callable[[], None]]:
        """Sets an attribute and takes it back, unless the function that is given says to keep it."""
        before, changed = getattr(self.modules[path], name), copy.deepcopy(self.changed)
        keep: list[bool] = []
        self.set(path, name, value)
        yield lambda: keep.append(True)
        if not keep:
            setattr(self.modules[path], name, before)
            self.changed = changed

    def apply_to(self, model: nn.Module) -> None:
        modules = dict(model.named_modules())
        for path, values in self.changed.items():
            for name, value in values.items():
                setattr(modules[path], name, value)


def _upwards(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


def _unlikely(name: str) -> bool:
    """Attributes that seldom say how many channels there are come last."""
    seldom = ("window", "shift", "kernel", "stride", "padding", "dilation", "patch", "layer", "depth", "dropout")
    return len(name) == 1 or any(word in name for word in seldom)


def _holds(value: Any, old: int) -> bool:
    if isinstance(value, bool):
        return False
    if isinstance(value, int):
        return value == old
    return (
        isinstance(value, (tuple, list)) and bool(value) and all(type(each) is int for each in value) and old in value
    )


def _replaced(value: Any, old: int, changes: Mapping[int, int]) -> list[Any]:
    """What an attribute may have to be; of several numbers all that change, or this one alone."""
    if isinstance(value, int):
        return [changes[old]]
    several = (changes, {old: changes[old]})
    return [type(value)(each.get(number, number) for number in value) for each in several]


class CannotFollowError(GraphError):
    """The model's code does not follow a cut at this step."""

    def __init__(self, step: Step, message: str) -> None:
        super().__init__(message)
        self.step = step


class Parted(Exception):  # noqa: N818 - it ends a run, it is no error by itself
    """The cut model does something else than the dense one did."""


class Beside(TorchDispatchMode):
    """Runs a cut model and compares every shape with what is left of the dense model's."""

    def __init__(self, trace: MaskedRun) -> None:
        super().__init__()
        self.trace, self.at = trace, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket.__name__)
        if name in UNSTEADY:
            return func(*args, **(kwargs or {}))
        if self.at >= len(self.trace.steps):
            raise Parted("it goes on where the dense model ended")
        step = self.trace.steps[self.at]
        if name != step.name:
            raise Parted(f"it runs {name} where the dense model runs {step.name}")
        numbers = numbers_of(func, args, kwargs or {})
        if name not in SIZED and not _numbers_fit(step, numbers, self.trace.dead, torch.Tag.pointwise in func.tags):
            raise Parted(f"{name} gets other numbers than the dense model's")
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


def fit(model: nn.Module, attributes: Attributes, trace: MaskedRun, example: Inputs) -> Any:
    """Runs the cut model; while it stumbles over a size, changes the attribute that says it. Its output."""
    run = Run.of(model, trace, example)
    while run.error is not None:
        step = trace.steps[min(run.at, len(trace.steps) - 1)]
        better = _mended(model, attributes, trace, example, step, run)
        if better is None:
            raise CannotFollowError(
                step,
                f"{step.where or 'the model'}: cannot follow the cut at its {step.name} "
                f"({str(run.error).partition(chr(10))[0][:200]}); everything was put back as it was",
            ) from run.error
        run = better
    return run.output


@dataclass(frozen=True)
class Run:
    """How far a cut model came beside the dense one."""

    at: int
    where: str
    error: Exception | None
    output: Any

    @classmethod
    def of(cls, model: nn.Module, trace: MaskedRun, example: Inputs) -> Run:
        args, kwargs = example
        where, beside = Where(model), Beside(trace)
        try:
            with untouched(model), torch.inference_mode(), beside:
                output = model(*args, **kwargs)
            return cls(beside.at, "", None, output)
        except Exception as error:
            return cls(beside.at, where.now, error, None)
        finally:
            where.remove()


def _mended(
    model: nn.Module, attributes: Attributes, trace: MaskedRun, example: Inputs, step: Step, run: Run
) -> Run | None:
    """The first attribute that lets the model come further; a number among the operation's arguments may stand in any
    module around it, another only in its own."""
    changes = demands(step, trace.dead)
    for old in changes:
        for place in dict.fromkeys((step.where, run.where)):
            for path, name in attributes.holders(place, old, upwards=old in step.numbers):
                for value in _replaced(getattr(attributes.modules[path], name), old, changes):
                    with attributes.trying(path, name, value) as keep:
                        now = Run.of(model, trace, example)
                        if now.error is None or now.at > run.at:
                            keep()
                            return now
    return None


def demands(step: Step, dead: Tensor) -> dict[int, int]:
    """Which sizes must become which; first those among the operation's own arguments."""
    changes: dict[int, int] = {}
    for shape, shadow in step.tensors:
        now = left(shadow, dead) if isinstance(shadow, Tensor) else None
        if now is not None:
            changes.update({old: new for old, new in zip(shape, now, strict=True) if old != new})
    return dict(sorted(changes.items(), key=lambda each: each[0] not in step.numbers))
