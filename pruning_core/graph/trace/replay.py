"""Runs a model again with the labels of a recorded run: as long as it does the same, no rule is asked twice."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pruning_core.graph.errors import CannotRunError, OtherOperationsError
from pruning_core.graph.inputs import Inputs, flat, leaves
from pruning_core.graph.trace.labels import Labels, unexpanded
from pruning_core.graph.trace.operations import CHANNELS_FIRST_NORMS, UNSTEADY
from pruning_core.graph.trace.recorder import Call, Recorder, arguments_of, shapes_of
from pruning_core.graph.trace.run import record
from pruning_core.graph.trace.shadows import AxisLabels, Shadow, StoredTensors


class Replay(Recorder):
    """``recorded``: a run on inputs of the same shapes. OtherOperationsError where this one is another; None records
    anew."""

    def __init__(self, labels: Labels, stored: StoredTensors, recorded: Recorder | None = None) -> None:
        super().__init__(labels, stored)
        self.recorded, self.watches = recorded, recorded is None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.recorded is None:
            return super().__torch_dispatch__(func, types, args, kwargs)
        call = Call(func, arguments_of(func, args, kwargs or {}), self.path.now)
        if call.name in UNSTEADY:
            return self.execute(call, args, kwargs or {})
        at, tensors = len(self.operations), call.tensors()
        known = self.recorded.operations[at] if at < len(self.recorded.operations) else None
        if known is None or not known.is_like(call, tensors):
            raise OtherOperationsError
        call.shadows = {id(each): shadow for each, (_, shadow) in zip(tensors, known.tensors, strict=False)}
        result = self.execute(call, args, kwargs or {})
        if shapes_of(result) != known.shapes:
            raise OtherOperationsError
        self.dtypes.update(leaf.dtype for leaf in flat(result) if isinstance(leaf, Tensor))
        numbers, constants = call.numbers(), tuple((i, float(tensors[i].item())) for i, _ in known.constants)
        same = numbers == known.numbers and constants == known.constants
        self.operations.append(known if same else replace(known, numbers=numbers, constants=constants))
        return result

    def end(self, output: Any, outputs_may_shrink: bool) -> None:
        if self.recorded is None:
            super().end(output, outputs_may_shrink)
        elif len(self.operations) != len(self.recorded.operations):
            raise OtherOperationsError
        else:
            self.output, self.outputs = output, self.recorded.outputs


class _Training(Replay):
    def execute(self, call: Call, args: Any, kwargs: Any) -> Any:
        if call.name in CHANNELS_FIRST_NORMS and (call["training"] or call["use_input_stats"]):
            raise OtherOperationsError  # its statistics are over other dimensions than when it evaluates
        return super().execute(call, args, kwargs)


ALIKE = frozenset(f"torch.nn.modules.{name}" for name in ("activation", "batchnorm", "dropout", "rnn", "transformer"))
"""PyTorch's own code that does the same in both modes, but for dropout and statistics over the batch: these are no
matter of channels."""


class AskedForMode:
    """A context that collects the Python modules whose code reads ``training``; those that are ``ALIKE`` may."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def __enter__(self) -> None:
        def read(module: nn.Module) -> bool:
            asks = str(sys._getframe(1).f_globals.get("__name__"))
            if asks not in ALIKE:
                self.names.add(asks)
            if "training" not in module.__dict__:
                raise AttributeError("training")
            return bool(module.__dict__["training"])

        def write(module: nn.Module, value: bool) -> None:
            module.__dict__["training"] = value

        nn.Module.training = property(read, write)  # type: ignore[assignment]  # each instance has its own otherwise

    def __exit__(self, *error: object) -> None:
        del nn.Module.training


def trains_alike(model: nn.Module, example: Inputs, recorded: Recorder) -> bool:
    """Whether the model does the same in training mode as in the recorded run in evaluation mode."""
    try:
        record(_Training(recorded.labels, recorded.stored, recorded), model, example, training=True)
    except (OtherOperationsError, CannotRunError):
        return False
    return True


class _Resized(Replay):
    """On smaller inputs: labels of the recorded run that do not differ along what became smaller."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = Call(func, arguments_of(func, args, kwargs or {}), self.path.now)
        if call.name in UNSTEADY:
            return self.execute(call, args, kwargs or {})
        assert self.recorded is not None
        at, tensors = len(self.operations), call.tensors()
        known = self.recorded.operations[at] if at < len(self.recorded.operations) else None
        if known is None or (call.name, call.where, len(tensors)) != (known.name, known.where, known.given):
            raise OtherOperationsError
        result = self.execute(call, args, kwargs or {})
        made = [leaf for leaf in flat(result) if isinstance(leaf, Tensor)]
        if len(made) != len(known.shapes):
            raise OtherOperationsError
        pairs = zip([*tensors, *made][: len(known.tensors)], known.tensors, strict=True)
        resized = tuple((tuple(leaf.shape), self._resized(shadow, leaf)) for leaf, (_, shadow) in pairs)
        several = isinstance(known.shadow, (tuple, list))
        given = known.shadow if several else [known.shadow]
        if several and len(given) != len(made):
            raise OtherOperationsError
        shadows = [self._resized(*each) for each in zip(given, made, strict=False)] or given
        constants = tuple((i, float(tensors[i].item())) for i, _ in known.constants)
        self.dtypes.update(leaf.dtype for leaf in made)
        self.operations.append(
            replace(
                known,
                numbers=call.numbers(),
                shapes=shapes_of(result),
                shadow=shadows if several else shadows[0],
                tensors=resized,
                constants=constants,
            )
        )
        return result

    def end(self, output: Any, outputs_may_shrink: bool) -> None:
        assert self.recorded is not None
        if len(self.operations) != len(self.recorded.operations):
            raise OtherOperationsError
        self.output = output
        self.outputs = [self._resized(*each) for each in zip(self.recorded.outputs, leaves(output), strict=True)]

    def _resized(self, shadow: Shadow, tensor: Tensor) -> Shadow:
        if shadow is None or tuple(shadow.shape) == tuple(tensor.shape):
            return shadow
        if isinstance(shadow, AxisLabels):  # a part of a table of positions
            return self.stored.shadow(tensor)
        core = unexpanded(shadow)[0]
        sizes = zip(core.shape, tensor.shape, strict=False)
        if core.dim() != tensor.dim() or any(size not in (1, now) for size, now in sizes):
            raise OtherOperationsError
        return core.expand(tensor.shape)


def smaller(model: nn.Module, example: Inputs, recorded: Recorder) -> tuple[Inputs, Recorder] | None:
    """Smaller inputs on which the model does all that it did in the recorded run, and that run; None without any."""
    for parts in (4, 2):
        small = pytree.tree_map_only(Tensor, partial(_smaller, parts=parts), example)
        pairs = zip(pytree.tree_leaves(example), pytree.tree_leaves(small), strict=True)
        if all(before is after for before, after in pairs):
            return None
        with contextlib.suppress(CannotRunError):
            found = _recorded_on(model, small, recorded)
            if found is not None:
                return small, found
    return None


def _recorded_on(model: nn.Module, small: Inputs, recorded: Recorder) -> Recorder | None:
    with contextlib.suppress(OtherOperationsError):
        return record(_Resized(recorded.labels, recorded.stored, recorded), model, small, training=False)
    labels = Labels(recorded.labels.narrow_heads)
    found = record(Recorder(labels, StoredTensors(labels, model)), model, small, training=False)
    ran = iter([(each.name, each.where) for each in found.operations])  # more where the size is new (anchors)
    return found if all((each.name, each.where) in ran for each in recorded.operations) else None


def _smaller(tensor: Tensor, parts: int) -> Tensor:
    """A corner of an image, of a side that strides of 32 divide, at least 64 pixels; the first part of a row of words,
    if there are 64."""
    if tensor.dim() == 4 and min(tensor.shape[-2:]) >= 128:
        height, width = (max(64, size // (32 * parts) * 32) for size in tensor.shape[-2:])
        return tensor[..., :height, :width]
    if tensor.dim() == 2 and not tensor.is_floating_point() and tensor.shape[1] >= 64:
        return tensor[:, : tensor.shape[1] // parts]
    return tensor
