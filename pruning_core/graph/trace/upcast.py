"""Runs the operations of a model in float64, whatever it is stored in.

In float32 a wrong cut of a quiet branch and plain rounding are of one size, in float64 they are far apart.
No copy of the model is made: parameters are converted operation by operation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from pruning_core.graph.inputs import Inputs, flat, mapped, put
from pruning_core.graph.trace import draws

DOUBLE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}
WEIGHTED = frozenset(
    (
        "linear addmm mm matmul baddbmm einsum embedding conv1d conv2d conv3d convolution conv_transpose1d "
        "conv_transpose2d conv_transpose3d"
    ).split()
)
LOUD = (0.1, 10.0)
"""The spread that a weighted operation's result may have in a trial; beyond it the weight is rescaled."""
ENOUGH = 200
"""So many positions and channels say how far a result varies."""
SILENT = 1e-6
"""Less may be rounding alone (of what a norm made of a constant), which must not be amplified."""


class Upcast:
    """Runs operations in float64.

    ``scales``: factors of weights, by name. Without them they are found on the way: a weight whose result hardly
    varies, or varies far too much, is rescaled so that it varies by about 1. Then what happens deep inside a model
    reaches its outputs, also where default weights let every layer shrink the signal.
    ``rounded``: whether something was written into a tensor of lower precision.
    """

    def __init__(self, model: nn.Module, scales: dict[str, float] | None = None) -> None:
        self.finding = scales is None
        self.scales: dict[str, float] = {} if scales is None else scales
        self.rounded = False
        self._names = _names_by_memory(model)
        self._same = WeakTensorKeyDictionary()
        self._used: set[str] = set()

    def stands_for(self, tensor: Tensor, stored: Tensor) -> None:
        """``tensor`` is a changed copy of ``stored`` and has its scale."""
        name = self._name(stored)
        if name is not None:
            self._same[tensor] = name

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of one operation, in float64 if it is floating-point."""
        schema = func._schema
        by_position = [(argument, value) for argument, value in zip(schema.arguments, args, strict=False)]
        by_name = {argument.name: argument for argument in schema.arguments}
        given = [*by_position, *((by_name[name], value) for name, value in kwargs.items())]
        low = next((value for argument, value in given if _written(argument) and _low(value)), None)
        if low is not None:
            self.rounded = True
        weights = self._first_used(given) if self.finding else []

        def again() -> Any:
            values = [self._converted(argument, value, low) for argument, value in given]
            named = dict(zip(kwargs, values[len(args) :], strict=True))
            result = draws.run(func, tuple(values[: len(args)]), named)
            views = any(each.alias_info is not None for each in schema.returns)
            return result if views else mapped(_double, result)

        result = again()
        name = func.overloadpacket.__name__
        if len(weights) == 1 and name in WEIGHTED:
            spread = _spread(result, name)
            if spread > SILENT and not LOUD[0] <= spread <= LOUD[1]:
                self.scales[weights[0]] = 1 / spread
                result = _rescaled(result, name, {argument.name: value for argument, value in given}, 1 / spread)
        return result

    def _converted(self, argument: Any, value: Any, low: Tensor | None) -> Any:
        if argument.alias_info is not None:  # a view must see the memory of its base
            return value

        def convert(each: Any) -> Any:
            if isinstance(each, torch.dtype):
                return DOUBLE.get(each, each)
            if not isinstance(each, Tensor):
                return each
            if low is not None:
                return each.to(low.dtype) if each.is_floating_point() else each
            name = self._name(each) if self.scales else None
            return _double(each) * self.scales[name] if name in self.scales else _double(each)

        return mapped(convert, value)

    def _name(self, tensor: Tensor) -> str | None:
        if tensor in self._same:
            return str(self._same[tensor])
        return self._names.get(_memory(tensor)) if tensor.layout == torch.strided else None

    def _first_used(self, given: list[tuple[Any, Any]]) -> list[str]:
        """Matrices that no operation has read before."""
        tensors = [
            leaf
            for argument, value in given
            if argument.alias_info is None
            for leaf in flat(value)
            if isinstance(leaf, Tensor)
        ]
        found = {name: each for each in tensors if (name := self._name(each)) is not None}
        fresh = [name for name, each in found.items() if name not in self._used and each.dim() > 1]
        self._used.update(found)
        return fresh


def in_double(example: Inputs) -> Inputs:
    """The same inputs in float64."""
    args, kwargs = pytree.tree_map_only(Tensor, _double, example)
    return args, kwargs


@contextlib.contextmanager
def stored_in_double(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Stores parameters in float64 for a while, for code that compares their dtype with its input's (``nn.LSTM``)."""
    before = [(tensor, tensor.data) for tensor in tensors if tensor.dtype in DOUBLE]
    try:
        for tensor, data in before:
            put(tensor, _double(data))
        yield
    finally:
        for tensor, data in before:
            put(tensor, data)


def _double(value: Any) -> Any:
    low = isinstance(value, Tensor) and value.dtype in DOUBLE
    return value.to(DOUBLE[value.dtype]) if low else value


def _low(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in DOUBLE


def _written(argument: Any) -> bool:
    return argument.alias_info is not None and bool(argument.alias_info.is_write)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _names_by_memory(model: nn.Module) -> dict[int, str]:
    """Names of parameters that have their memory for themselves."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters():
        names.setdefault(_memory(parameter), []).append(name)
    return {memory: found[0] for memory, found in names.items() if len(found) == 1}


def _rescaled(result: Tensor, operation: str, given: dict[str, Any], scale: float) -> Tensor:
    """What a scaled weight gives: the operation is linear in it, but for what it adds."""
    added = given.get("self" if operation in ("addmm", "baddbmm") else "bias")
    if not isinstance(added, Tensor):
        return result * scale
    if "conv" in operation:
        added = added.view(-1, *[1] * (given["weight"].dim() - 2))
    added = _double(added).to(result.dtype) * given.get("beta", 1)
    return (result - added) * scale + added


def _spread(result: Any, operation: str) -> float:
    """The standard deviation of each channel over positions; of all numbers where there are few positions."""
    if not isinstance(result, Tensor) or not result.is_floating_point() or result.numel() < 2:
        return 0.0
    channels = 1 if "conv" in operation and result.dim() > 2 else -1
    lines = result.movedim(channels, -1).reshape(-1, result.shape[channels])
    lines = lines[:: max(1, len(lines) // ENOUGH), :: max(1, lines.shape[1] // ENOUGH)]
    spread = lines.var(0).mean().sqrt() if len(lines) >= 4 else result.std()
    return float(spread) if bool(spread.isfinite()) else 0.0
