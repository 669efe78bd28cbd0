"""Runs a model again with the labels of a recorded run: as long as it does the same, no rule is asked twice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pruning_core.graph.errors import CannotRunError, OtherOperationsError
from pruning_core.graph.inputs import Inputs
from pruning_core.graph.trace.labels import Labels
from pruning_core.graph.trace.operations import CHANNELS_FIRST_NORMS, UNSTEADY
from pruning_core.graph.trace.recorder import Call, Recorder, arguments_of, shapes_of
from pruning_core.graph.trace.run import record
from pruning_core.graph.trace.shadows import StoredTensors


class Replay(Recorder):
    """``recorded``: a run on inputs of the same shapes. OtherOperationsError where this one is another; None records
    anew."""

    def __init__(self, labels: Labels, stored: StoredTensors, recorded: Recorder | None = None) -> None:
        super().__init__(labels, stored)
        self.recorded = recorded

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
        self.dtypes.update(leaf.dtype for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor))
        numbers, constants = call.numbers(), tuple((i, float(tensors[i].item())) for i, _ in known.constants)
        same = numbers == known.numbers and constants == known.constants
        self.operations.append(known if same else replace(known, numbers=numbers, constants=constants))
        return result

    def entered(self, path: str, tensors: list[Tensor]) -> None:
        if self.recorded is None:
            super().entered(path, tensors)

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


def trains_alike(model: nn.Module, example: Inputs, recorded: Recorder) -> bool:
    """Whether the model does the same in training mode as in the recorded run in evaluation mode."""
    try:
        record(_Training(recorded.labels, recorded.stored, recorded), model, example, training=True)
    except (OtherOperationsError, CannotRunError):
        return False
    return True


def smaller(model: nn.Module, example: Inputs, recorded: Recorder) -> tuple[Inputs, Recorder] | None:
    """Smaller inputs on which the model does all that it did in the recorded run, and that run; None without any."""
    small = pytree.tree_map_only(Tensor, _smaller, example)
    pairs = zip(pytree.tree_leaves(example), pytree.tree_leaves(small), strict=True)
    if all(before is after for before, after in pairs):
        return None
    labels = Labels(recorded.labels.narrow_heads)
    try:
        found = record(Recorder(labels, StoredTensors(labels, model)), model, small, training=False)
    except CannotRunError:
        return None
    ran = iter([(each.name, each.where) for each in found.operations])  # more where the size is new (anchors)
    return (small, found) if all((each.name, each.where) in ran for each in recorded.operations) else None


def _smaller(tensor: Tensor) -> Tensor:
    """A corner of an image, of a side that strides of 32 divide; the first half of a row of words."""
    if tensor.dim() == 4 and min(tensor.shape[-2:]) >= 128:
        height, width = (_side(size) for size in tensor.shape[-2:])
        return tensor[..., :height, :width]
    if tensor.dim() == 2 and not tensor.is_floating_point() and tensor.shape[1] >= 64:
        return tensor[:, : tensor.shape[1] // 2]
    return tensor


def _side(size: int) -> int:
    """A quarter where that leaves 128 pixels, else a half."""
    quarter = size // 128 * 32
    return quarter if quarter >= 128 else size // 64 * 32
