"""Records every operation of one run on real tensors, with a shadow of labels beside each.

In inference mode PyTorch hands whole operations (``linear``, ``batch_norm``, ``lstm``, ``einsum``) to a dispatch mode.
So whatever the model can run can be traced: no exporter, no symbolic shapes, data-dependent code included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from pruning_core.graph.inputs import flat, leaves
from pruning_core.graph.trace.fresh import FreshTensors
from pruning_core.graph.trace.labels import Axis, Labels, holds_any, unexpanded, varying
from pruning_core.graph.trace.operations import FRESH, UNSTEADY
from pruning_core.graph.trace.shadows import AxisLabels, Shadow, StoredTensors, as_activation

Numbers = tuple[int | float, ...]


@dataclass
class Call:
    """One operation: its arguments by name, what it returned, the module it ran in."""

    func: Any
    arguments: dict[str, Any]
    where: str
    shadows: dict[int, Shadow] = field(default_factory=dict)
    result: Any = None
    _tensors: list[Tensor] | None = None

    @property
    def name(self) -> str:
        """The operation, as ``conv2d``."""
        return str(self.func.overloadpacket.__name__)

    def __getitem__(self, argument: str) -> Any:
        return self.arguments.get(argument)

    def __contains__(self, argument: str) -> bool:
        return argument in self.arguments

    def shadow(self, argument: str) -> Shadow:
        """The shadow of a tensor argument."""
        return self.shadows.get(id(self.arguments.get(argument)))

    def numbers(self) -> Numbers:
        """All int and float arguments, in order."""
        return tuple(each for each in flat(self.arguments) if type(each) in (int, float))

    def tensors(self) -> list[Tensor]:
        """All tensor arguments, in order."""
        if self._tensors is None:
            self._tensors = [leaf for leaf in flat(self.arguments) if isinstance(leaf, Tensor)]
        return self._tensors


def arguments_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by their names in the schema, defaults included."""
    names, defaults = _schema_of(func)
    return {**defaults, **dict(zip(names, args, strict=False)), **kwargs}


@cache
def _schema_of(func: Any) -> tuple[list[str], dict[str, Any]]:
    schema = func._schema.arguments
    defaults = {argument.name: argument.default_value for argument in schema if argument.has_default_value()}
    return [argument.name for argument in schema], defaults


class ModulePath:
    """The path of the module that runs, kept by hooks; after an exception, of the one that raised it.

    ``watch(path, tensors)`` is called with the tensor arguments of each module that begins.
    """

    def __init__(self, model: nn.Module, watch: Callable[[str, list[Tensor]], None] | None = None) -> None:
        self.stack: list[str] = [""]
        self.watch = watch
        self._hooks = []
        for name, module in model.named_modules():
            self._hooks.append(module.register_forward_pre_hook(self._entering(name), prepend=True, with_kwargs=True))
            self._hooks.append(module.register_forward_hook(self._leaving))

    @property
    def now(self) -> str:
        """The module that runs."""
        return self.stack[-1]

    def _entering(self, name: str) -> Any:
        def enter(module: nn.Module, inputs: Any, keywords: Any) -> None:
            self.stack.append(name)
            if self.watch is not None:
                self.watch(name, [each for each in pytree.tree_leaves((inputs, keywords)) if isinstance(each, Tensor)])

        return enter

    def _leaving(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.stack.pop()

    def remove(self) -> None:
        """Removes the hooks from the model."""
        for hook in self._hooks:
            hook.remove()


class Recorder(TorchDispatchMode):
    """Follows the labels through one forward pass.

    ``operations``: all that ran. ``outputs``: the shadows of what it gave. ``consumers``: axes of weights that read
    channels. ``statistics``: those over channels. ``costs``: multiply-adds. ``products``: sums of channels times
    channels. ``inputs``: the labels that each module was first called with.
    """

    watches = True
    """Whether ``entered`` is to be called."""
    path: ModulePath
    rule_of: Callable[[Call], Any]

    def __init__(self, labels: Labels, stored: StoredTensors) -> None:
        super().__init__()
        self.labels, self.stored = labels, stored
        self.shadows = WeakTensorKeyDictionary()
        self.squares = WeakTensorKeyDictionary()
        self._changed = WeakTensorKeyDictionary()
        self._made = WeakTensorKeyDictionary()
        self._quiet = False
        self.fresh = FreshTensors()
        self.operations: list[Operation] = []
        self.costs: list[Cost] = []
        self.products: list[tuple[str, Tensor]] = []
        self.consumers: set[Axis] = set()
        self.statistics: list[Statistic] = []
        self.dtypes: set[torch.dtype] = set()
        self.inputs: dict[str, Tensor] = {}
        self.output: Any = None
        self.outputs: list[Shadow] = []

    def begin(self, rule_of: Callable[[Call], Any], path: ModulePath) -> None:
        """Starts a run; ``rule_of`` maps a call to its rule."""
        self.rule_of, self.path = rule_of, path

    def shadow_of(self, tensor: Tensor) -> Shadow:
        """The shadow of a tensor: its own labels, or those of the parameter whose memory it shares."""
        if tensor in self.shadows:
            return self.shadows[tensor]
        return self.stored.shadow(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._quiet:
            return func(*args, **(kwargs or {}))
        call = Call(func, arguments_of(func, args, kwargs or {}), self.path.now)
        with self.labels.at(f"{call.name} in {call.where or 'the model'}"):
            call.shadows = {id(each): self.shadow_of(each) for each in call.tensors()}
            constants = self._constants(call)
            call.result = result = self.execute(call, args, kwargs or {})
            shadow = self._labels_of(call)
            self._inherit(call)
        self._remember(result, shadow)
        for leaf in flat(result):
            if isinstance(leaf, Tensor):
                self.dtypes.add(leaf.dtype)
                if (leaf.numel() == 1 or not leaf.is_floating_point()) and call.name not in FRESH:
                    self._made[leaf] = True
        if call.name not in UNSTEADY:
            self.operations.append(Operation.of(call, result, shadow, constants))
        return result

    def _labels_of(self, call: Call) -> Any:
        """What the rule says; a call that its rule does not expect freezes what it reads."""
        try:
            shadow = self.rule_of(call)(self, call)
            known = _fits(call.result, shadow)
        except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            known = False
        if known:
            return shadow
        for each in call.shadows.values():
            self.freeze(each, "an operation whose rule does not know these arguments")
        return None

    def changes(self, result: Any, labels: Tensor, because: str) -> None:
        """The result is another number once any of these channels goes: they freeze if an output depends on it."""
        for leaf in flat(result):
            if isinstance(leaf, Tensor):
                self._changed[leaf] = [(labels, f"{because}, at {self.labels.place}")]

    def _inherit(self, call: Call) -> None:
        """What is computed from numbers that change does so as well. What is written elsewhere freezes at once."""
        found = [each for tensor in call.tensors() for each in self._changed.get(tensor, ())] if self._changed else []
        results = [leaf for leaf in flat(call.result) if isinstance(leaf, Tensor)]
        writes = any(each.alias_info is not None and each.alias_info.is_write for each in call.func._schema.arguments)
        if found and (writes or not results):
            self._freeze_changed(found)
            return
        for leaf in results if found else ():
            self._changed[leaf] = [*self._changed.get(leaf, ()), *found]

    def _freeze_changed(self, found: list[tuple[Tensor, str]]) -> None:
        with self.labels.at(""):  # the reason names the place where it began
            for labels, because in found:
                self.labels.freeze(labels, because)

    def end(self, output: Any, outputs_may_shrink: bool) -> None:
        """Outputs keep their shape, so all channels in them are frozen, and so is what they depend on and may not."""
        self.output = output
        for leaf in leaves(output):
            self._freeze_changed(self._changed.get(leaf, []))
            shadow = self.shadow_of(leaf)
            self.outputs.append(shadow)
            if outputs_may_shrink and isinstance(shadow, Tensor):  # a parameter as an output is always frozen
                self.labels.mark_removable(shadow)
            else:
                self.freeze(shadow, "is an output")

    def _constants(self, call: Call) -> tuple[tuple[int, float], ...]:
        """Numbers that came as tensors which no operation has made: what the code computed beside the model."""
        found = [(i, number_in(each)) for i, each in enumerate(call.tensors()) if each not in self._made]
        return tuple((i, number) for i, number in found if number is not None)

    def is_constant(self, tensor: Tensor) -> bool:
        """Whether the code holds the tensor as it is: no input, and not computed."""
        return tensor not in self._made

    def given(self, example: Any) -> None:
        """Inputs are no constants."""
        for leaf in pytree.tree_leaves(example):
            if isinstance(leaf, Tensor) and not leaf.is_floating_point():
                self._made[leaf] = True

    def entered(self, path: str, tensors: list[Tensor]) -> None:
        """Called when a module begins: remembers the labels of its first labelled input."""
        self._quiet = True
        shadows = [self.shadow_of(each) for each in tensors]
        known = next((each for each in shadows if isinstance(each, Tensor) and holds_any(each)), None)
        if known is not None:
            self.inputs.setdefault(path, known)
        self._quiet = False

    def execute(self, call: Call, args: Any, kwargs: Any) -> Any:
        """Executes the operation; overridden where the result must change."""
        return call.func(*args, **kwargs)

    def consume(self, source: Tensor, taken: Tensor) -> None:
        """Ties an axis of a weight to the channels it consumes; freezes them where the weight has a fixed size."""
        self.consumers.update(axis for axis in self.labels.owners(taken) if axis)
        self.labels.tie(source, taken, "meets an input of fixed size")

    def statistic(self, call: Call, labels: Tensor) -> None:
        """Remembers that the module takes a statistic over these channels, and where its input has them."""
        found = self.inputs.get(call.where)
        dims = [] if found is None else varying(found)
        dim = dims[0] if len(dims) == 1 else None
        if found is not None and dim == found.dim() - 1:
            dim = -1
        self.statistics.append(Statistic(call.where, dim, unexpanded(labels)[0].unique()))

    def cost(self, vectors: Sequence[Tensor], rows: int) -> None:
        """Adds the multiply-adds of an operation: ``rows`` per combination of these channels."""
        self.costs.append(Cost(rows, tuple(vectors)))

    def known(self, tensor: Tensor) -> Tensor | None:
        """The labels of an activation, None without a shadow."""
        shadow = self.shadow_of(tensor)
        return shadow if isinstance(shadow, Tensor) else None

    def adopt(self, tensor: Tensor, labels: Tensor) -> None:
        """Gives labels to a tensor without any, from labelled ones it meets."""
        self.shadows[tensor] = labels

    def activation(self, call: Call, argument: str) -> Tensor:
        """The shadow of a tensor argument as a label tensor."""
        tensor = call[argument]
        return as_activation(self.labels, call.shadow(argument), tuple(tensor.shape))

    def freeze(self, shadow: Shadow, because: str) -> None:
        """Freezes all labels of a shadow."""
        if isinstance(shadow, Tensor):
            self.labels.freeze(shadow, because)
        elif isinstance(shadow, AxisLabels):
            for vector in shadow.axes:
                if vector is not None:
                    self.labels.freeze(vector, because)

    def _remember(self, result: Any, shadow: Any) -> None:
        if isinstance(result, Tensor):
            if shadow is not None:
                self.shadows[result] = shadow
        elif isinstance(result, (list, tuple)) and isinstance(shadow, (list, tuple)):
            for each, of_it in zip(result, shadow, strict=True):
                self._remember(each, of_it)


@dataclass(frozen=True)
class Cost:
    """Multiply-adds: ``rows`` for each combination of the channels in ``vectors``."""

    rows: int
    vectors: tuple[Tensor, ...]


@dataclass(frozen=True)
class Statistic:
    """A module computes one number (a mean, a norm) of these channels, which are dimension ``dim`` of its input; None
    where they are not one dimension of it."""

    where: str
    dim: int | None
    labels: Tensor


@dataclass(frozen=True)
class Operation:
    """Arguments, result shapes and shadows of one operation, for comparison with a cut model."""

    name: str
    where: str
    numbers: Numbers
    shapes: tuple[tuple[int, ...], ...]
    shadow: Any
    tensors: tuple[tuple[tuple[int, ...], Shadow], ...]
    constants: tuple[tuple[int, float], ...]
    """Which of its tensors were numbers, and what they were."""
    given: int
    """How many of ``tensors`` it took; the others it gave."""

    def is_like(self, call: Call, tensors: list[Tensor]) -> bool:
        """Whether a call is this one, with tensors of the same shapes."""
        if call.name != self.name or call.where != self.where or len(tensors) != self.given:
            return False
        return all(tuple(each.shape) == shape for each, (shape, _) in zip(tensors, self.tensors, strict=False))

    @classmethod
    def of(cls, call: Call, result: Any, shadow: Any, constants: tuple[tuple[int, float], ...]) -> Operation:
        """The record of a call."""
        given = shadow if isinstance(shadow, (tuple, list)) else [shadow]
        results = [leaf for leaf in flat(result) if isinstance(leaf, Tensor)]
        known = [(tuple(each.shape), call.shadows[id(each)]) for each in call.tensors()]
        count = len(known)
        if len(given) == len(results):
            known += [(tuple(each.shape), of_it) for each, of_it in zip(results, given, strict=True)]
        return cls(call.name, call.where, call.numbers(), shapes_of(result), shadow, tuple(known), constants, count)


def _fits(result: Any, shadow: Any) -> bool:
    """Whether labels have the shape of what they are labels of."""
    if isinstance(shadow, (tuple, list)):
        many = isinstance(result, (tuple, list)) and len(result) == len(shadow)
        return many and all(_fits(*each) for each in zip(result, shadow, strict=True))
    if shadow is None or not isinstance(result, Tensor):
        return True
    return tuple(shadow.shape) == tuple(result.shape)


def number_in(tensor: Tensor) -> float | None:
    """The number in a tensor of one element, None for others."""
    if tensor.numel() != 1 or tensor.is_complex() or tensor.dtype == torch.bool:
        return None
    return float(tensor.detach().item())


def shapes_of(result: Any) -> tuple[tuple[int, ...], ...]:
    """The shapes of all tensors of a result."""
    return tuple(tuple(leaf.shape) for leaf in flat(result) if isinstance(leaf, Tensor))
