"""Which numbers of a Transformers configuration set which widths: each is doubled, the model built on the meta device,
and shapes are compared. No family is listed here."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from pruning_core.graph.cut.difference import ROUNDING, relative_difference
from pruning_core.graph.errors import GraphError
from pruning_core.graph.inputs import Inputs, leaves, untouched
from pruning_core.graph.plan import named_tensors
from pruning_core.graph.trace.labels import Axis
from pruning_core.graph.trace.upcast import in_double, stored_in_double

Sizes = dict[Axis, int]
Settings = Mapping[str, float]
"""Dotted name -> number: ``hidden_size``, ``text_config.intermediate_size``, ``num_heads.0`` of a list."""
Place = tuple[str, str]
"""A module and an attribute of it."""

TIMES = (2, 4)
"""How much larger a setting is made: the second where tensors come or go with the first (a projection between widths
that happen to differ, or to be equal)."""
PROBES = (48, 64)
"""What a setting without a value is given, to see which value it stands for: the second where that is the first."""


def configuration(model: nn.Module) -> Any:
    """The configuration that ``save_pretrained`` writes; None for a model without one."""
    config = getattr(model, "config", None)
    known = callable(getattr(config, "save_pretrained", None)) and callable(getattr(model, "from_pretrained", None))
    return config if known else None


@dataclass(frozen=True)
class Built:
    """A model on the meta device: sizes of its tensors, and numbers that its modules keep."""

    sizes: Sizes
    numbers: dict[Place, float]

    @classmethod
    def of(cls, model: nn.Module) -> Built:
        """Of any model."""
        numbers = {
            (path, name): value
            for path, module in model.named_modules()
            for name, value in vars(module).items()
            if _is_number(value)
        }
        tensors = _saved_tensors(model)
        return cls({Axis(name, dim): n for name, each in tensors.items() for dim, n in enumerate(each.shape)}, numbers)


@dataclass(frozen=True)
class Effect:
    """What larger settings do: axes that are larger, those of them that are not in proportion, numbers that are larger
    in proportion, numbers that are smaller, and whether other tensors come or go."""

    axes: frozenset[Axis]
    uneven: frozenset[Axis]
    larger: frozenset[Place]
    smaller: frozenset[Place]
    others: bool


class Widths:
    """What the configuration of a model can say. ``settings``: its numbers; those that it lacks, and the code computes
    from others (the width of heads), with the value that they stand for."""

    def __init__(self, model: nn.Module) -> None:
        self.kind, self.config = type(model), copy.deepcopy(configuration(model))
        self._memo: dict[tuple[tuple[str, float], ...], Built | str] = {}
        self.written = dict(_numbers(self.config))
        base, mine = self.build({}), Built.of(model).sizes
        if isinstance(base, str):
            raise GraphError(f"uniform: {self.kind.__name__} cannot be built from its configuration, got {base}")
        other = next((axis for axis in mine if base.sizes.get(axis) != mine[axis]), None) or next(
            iter(base.sizes.keys() - mine.keys()), None
        )
        if other is not None:
            raise GraphError(
                f"uniform: {other.tensor} is not as its configuration builds it, got {mine.get(other, 'none')} where "
                f"{type(self.config).__name__} gives {base.sizes.get(other, 'none')}; plan without uniform"
            )
        self.base = base
        self.implied = {name: value for name in self._absent() if (value := self._value_of(name)) is not None}
        self.settings = {**self.written, **self.implied}

    def build(self, changes: Settings) -> Built | str:
        """The model with other settings; what the constructor says where it refuses them."""
        key = tuple(sorted(changes.items()))
        if key not in self._memo:
            try:
                config = changed(self.config, changes)
                with quiet(), torch.device("meta"):
                    type(config).from_dict(config.to_dict())  # as it is read from a file: checked as a whole
                    self._memo[key] = Built.of(self.kind(config))
            except Exception as error:  # any: the constructor is not ours
                self._memo[key] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return self._memo[key]

    def effect(self, names: Iterable[str], against: Sequence[str] = ()) -> Effect | str:
        """Of these settings, larger together, with others as much smaller; what nobody wrote keeps the value it stands
        for."""
        found: Effect | str = ""
        for times in TIMES:
            larger = {name: times * self.settings[name] for name in names}
            smaller = {name: _divided(self.settings[name], times) for name in against}
            built = self.build({**self.implied, **larger, **smaller})
            if isinstance(built, str):
                found = found or built
                continue
            axes = frozenset(self._touched(built))
            uneven = frozenset(axis for axis in axes if built.sizes[axis] != times * self.base.sizes[axis])
            numbers = self.scaled(built, times, 1), self.scaled(built, 1, times)
            found = Effect(axes, uneven, *numbers, built.sizes.keys() != self.base.sizes.keys())
            if not found.others:
                break
        return found

    @cached_property
    def alone(self) -> dict[str, Effect]:
        """What each setting does by itself, for those that change a width or a number."""
        found = {name: self.effect([name]) for name in self.settings}
        effects = {name: each for name, each in found.items() if isinstance(each, Effect)}
        return {name: each for name, each in effects.items() if each.axes or each.larger or each.smaller}

    def scaled(self, other: Built, left: int, steps: int) -> frozenset[Place]:
        """The numbers of modules of which ``left / steps`` is left."""
        pairs = ((place, was, other.numbers.get(place)) for place, was in self.base.numbers.items())
        return frozenset(place for place, was, now in pairs if now is not None and now != was == now * steps / left)

    def _touched(self, other: Built) -> set[Axis]:
        return {axis for axis, size in other.sizes.items() if self.base.sizes.get(axis, size) != size}

    def exact(self, changes: Settings, want: Sizes) -> dict[str, float]:
        """The changes that build these sizes, without those that change nothing; GraphError where none do."""
        changes = {**self.implied, **changes}
        nudged = {name: value * (1 + 1e-9) if isinstance(value, float) else value for name, value in changes.items()}
        got: Any = None
        for each in (changes, nudged):  # a share of a width is cut off below the next whole number
            got = self.build(each)
            if isinstance(got, Built) and got.sizes == want:
                return self._needed(each, want)
        if isinstance(got, str):
            raise GraphError(f"uniform: {type(self.config).__name__} refuses {_text(changes)}, got {got}")
        axis = next(axis for axis in want if got.sizes.get(axis) != want[axis])
        raise GraphError(
            f"uniform: {axis} would have {want[axis]} channels, got {got.sizes.get(axis, 'none')} from {_text(changes)}"
        )

    def _needed(self, changes: Settings, want: Sizes) -> dict[str, float]:
        left = {name: value for name, value in changes.items() if value != self.written.get(name)}
        for name in self.implied.keys() & left.keys():
            less = {other: value for other, value in left.items() if other != name}
            got = self.build(less)
            if isinstance(got, Built) and got == self.build(left):
                left = less
        return dict(sorted(left.items()))

    def _absent(self) -> list[str]:
        """Settings that hold nothing, or that the constructor asks for and the configuration lacks."""
        asked: set[str] = set()

        class Asked(type(self.config)):  # type: ignore[misc]
            """Notes what is asked for in vain."""

            def __getattribute__(self, name: str) -> Any:
                try:
                    return super().__getattribute__(name)
                except AttributeError:
                    asked.add(name)
                    raise

        config = copy.deepcopy(self.config)
        config.__class__ = Asked
        with contextlib.suppress(Exception), quiet(), torch.device("meta"):
            self.kind(config)
        return sorted(name for name in {*asked, *_nothing(self.config)} if not name.rpartition(".")[2].startswith("_"))

    def _value_of(self, name: str) -> int | None:
        """The value at which an absent setting changes nothing; None for one that sets no width."""
        values = set()
        for probe in PROBES:
            probed = self.build({name: probe})
            if isinstance(probed, Built):
                values |= {probe * self.base.sizes[axis] / probed.sizes[axis] for axis in self._touched(probed)}
        value = values.pop() if len(values) == 1 else 0.5
        again = self.build({name: int(value)}) if value == int(value) else ""
        return int(value) if isinstance(again, Built) and again.sizes == self.base.sizes else None


def configure(model: nn.Module, changes: Settings) -> None:
    """Gives the model, and all in it that keeps the same configuration, a changed copy: others may share the old."""
    memo: dict[int, Any] = {}
    old = configuration(model)
    new = copy.deepcopy(old, memo)
    _put(new, changes)
    for module in model.modules():
        for name, value in vars(module).items():
            if id(value) in memo and (value is old or hasattr(value, "to_dict")):
                module.__dict__[name] = memo[id(value)]


def changed(config: Any, changes: Settings) -> Any:
    """A changed copy."""
    found = copy.deepcopy(config)
    _put(found, changes)
    return found


def reload_apart(model: nn.Module, example: Inputs) -> str:
    """How the model that plain ``from_pretrained`` makes of configuration and weights differs from this one; empty
    where it computes the same. GraphError where it cannot be loaded. The weights are shared."""
    kind: Any = type(model)
    try:
        with quiet(), untouched(model):
            state = dict(model.state_dict())
            config = copy.deepcopy(configuration(model))
            fresh = kind.from_pretrained(None, config=config, state_dict=state, dtype=getattr(model, "dtype", None))
            fresh = fresh.to(next(model.parameters()).device)
            mine = dict(model.named_buffers())
            for name, buffer in fresh.named_buffers():  # ``model.to(bfloat16)`` rounds those that are not saved, too
                buffer.data = buffer.to(mine[name].dtype) if name in mine else buffer.data
    except Exception as error:  # any: the loader is not ours
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise GraphError(f"uniform: {kind.__name__} cannot be loaded, got {why}; plan without uniform") from error
    if _same(model, fresh, example):
        return ""
    have, other = Built.of(model).numbers, Built.of(fresh).numbers
    scale = next((at for at, was in have.items() if isinstance(was, float) and other.get(at, was) != was), None)
    if scale is not None:
        return f"{'.'.join(scale)} is {have[scale]:.4g} and would be {other[scale]:.4g}"
    return "the model would compute something else"


def _same(model: nn.Module, fresh: nn.Module, example: Inputs) -> bool:
    """Whether both give the same bits; or, where memory that is aligned in another way may change the last ones, nearly
    the same numbers in float64: in half precision rounding could hide another model."""
    pairs = [_outputs(each, example) for each in (model, fresh)]
    if [each.shape for each in pairs[0]] != [each.shape for each in pairs[1]]:
        return False
    if all(torch.equal(*pair) for pair in zip(*pairs, strict=True)):
        return True
    with contextlib.suppress(RuntimeError, TypeError):  # code that wants a dtype of its own
        pairs = [_outputs(each, in_double(example), stored_in_double) for each in (model, fresh)]
    close = (relative_difference(*pair) <= ROUNDING for pair in zip(*pairs, strict=True))
    return all(close)


def _outputs(model: nn.Module, example: Inputs, stored: Callable[..., Any] = contextlib.nullcontext) -> list[Tensor]:
    args, kwargs = example
    with untouched(model), torch.inference_mode(), stored(named_tensors(model).values()):
        return leaves(model(*args, **kwargs))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what transformers says about each model that it builds."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and the buffers that are saved, tied ones once; the others are computed when the model is built."""
    saved = model.state_dict(keep_vars=True)
    every = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor for name, tensor in every.items() if name in saved}


def _numbers(config: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Numbers above zero, those of lists and of configurations inside one by one."""
    for name, value in vars(config).items():
        if name.startswith("_"):
            continue
        if _is_config(value):
            yield from _numbers(value, f"{prefix}{name}.")
        several = enumerate(value) if isinstance(value, list | tuple) else [(None, value)]
        for i, each in several:
            if _is_number(each) and each > 0:
                yield f"{prefix}{name}" + (f".{i}" if i is not None else ""), each


def _nothing(config: Any, prefix: str = "") -> Iterator[str]:
    for name, value in vars(config).items():
        if value is None:
            yield f"{prefix}{name}"
        elif _is_config(value):
            yield from _nothing(value, f"{prefix}{name}.")


def _is_config(value: Any) -> bool:
    return hasattr(value, "to_dict") and hasattr(value, "save_pretrained")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _put(config: Any, changes: Settings) -> None:
    for dotted, value in changes.items():
        *path, name = dotted.split(".")
        holder, above = config, None
        for step in path:
            above, holder = holder, getattr(holder, step)
        if isinstance(holder, list | tuple):
            several = [value if i == int(name) else each for i, each in enumerate(holder)]
            setattr(above, path[-1], type(holder)(several))
        else:
            setattr(holder, name, value)


def _divided(value: float, by: int) -> float:
    return value // by if isinstance(value, int) and value % by == 0 else value / by


def _text(changes: Settings) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in changes.items())
