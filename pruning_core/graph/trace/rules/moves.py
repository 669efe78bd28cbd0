"""Data movement: view, permute, cat, slice, roll, pad. Executed on the labels themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pruning_core.graph.trace.labels import compact, holds_any, varies, varying
from pruning_core.graph.trace.recorder import Call, Recorder
from pruning_core.graph.trace.rules.elementwise import indexed
from pruning_core.graph.trace.rules.table import rule
from pruning_core.graph.trace.shadows import AxisLabels, as_activation

SAME = (
    "contiguous clone alias alias_copy detach detach_ detach_copy to _to_copy type_as float double half bfloat16 "
    "lift lift_fresh lift_fresh_copy requires_grad_ _conj resolve_conj resolve_neg cpu"
).split()
VIEWS = (
    "view _unsafe_view reshape _reshape_alias flatten unflatten permute transpose transpose_ swapaxes swapdims "
    "movedim moveaxis t numpy_T mT mH matrix_H adjoint unsqueeze unsqueeze_ squeeze squeeze_ narrow expand "
    "expand_as view_as reshape_as broadcast_to flip fliplr flipud repeat tile diagonal unfold "
    "pixel_unshuffle repeat_interleave"
).split()
PIECES = "split unsafe_split split_with_sizes unsafe_split_with_sizes chunk unsafe_chunk tensor_split hsplit".split()


def run(call: Call, main: str, labels: Tensor) -> Any:
    """Executes the operation on labels in place of its tensor."""
    if call.name in ("view", "_unsafe_view", "reshape", "view_as", "reshape_as", "_reshape_alias"):
        return labels.reshape(call.result.shape)
    if call.name in ("expand_as", "broadcast_to"):
        return labels.expand(call.result.shape)
    name = call.name.removesuffix("_") if not call.name.startswith("_") else call.name
    packet = getattr(torch.ops.aten, name)
    overload = getattr(packet, call.func._overloadname, None) or _of_same_arguments(packet, call)
    known = {argument.name for argument in overload._schema.arguments}
    arguments = {key: value for key, value in call.arguments.items() if key in known}
    return overload(**{**arguments, main: labels})


def _of_same_arguments(packet: Any, call: Call) -> Any:
    """The overload for a call in place, where that has another name (``transpose_``, ``transpose.int``)."""
    every = [getattr(packet, name) for name in packet.overloads()]
    return next(each for each in every if {argument.name for argument in each._schema.arguments} == {*call.arguments})


def follow(trace: Recorder, call: Call, main: str = "self") -> Any:
    """Labels move as the values do."""
    shadow = call.shadow(main)
    if isinstance(shadow, AxisLabels):
        in_parameter = isinstance(call.result, Tensor) and trace.stored.shadow(call.result) is not None
        return None if in_parameter else shadow.moved(trace.labels, lambda labels: run(call, main, labels))
    if shadow is None:
        return None
    moved = run(call, main, shadow)
    return moved if trace.fresh.holds(shadow) else compact(moved)


@rule(*SAME)
def same(trace: Recorder, call: Call) -> Any:
    """A copy, or another dtype or memory format."""
    return call.shadow("self") if "self" in call else call.shadow("input")


@rule(*VIEWS)
def view(trace: Recorder, call: Call) -> Any:
    """Another shape or order of the same elements."""
    if isinstance(call["dtype"], torch.dtype):
        for shadow in call.shadows.values():
            trace.freeze(shadow, "its bytes are read as another type")
        return None
    return follow(trace, call)


@rule("select")
def select(trace: Recorder, call: Call) -> Any:
    """Selects one index: channels up to it are frozen, since the number would mean another."""
    shadow, index = call.shadow("self"), call["index"]
    if isinstance(shadow, Tensor) and varying(shadow) == [dim := call["dim"] % shadow.dim()]:
        before = shadow.narrow(dim, 0, index + 1) if index >= 0 else shadow.narrow(dim, index, -index)
        trace.freeze(before, "is picked by number")
    return follow(trace, call)


@rule("slice")
def sliced(trace: Recorder, call: Call) -> Any:
    """A range keeps its labels; with a step, channels up to its end are selected by number and frozen."""
    shadow = call.shadow("self")
    if isinstance(shadow, Tensor) and call["step"] > 1 and varies(shadow, call["dim"]):
        size = shadow.shape[call["dim"]]
        stop = max(range(size)[call["start"] : call["end"] : call["step"]], default=-1) + 1
        trace.freeze(shadow.narrow(call["dim"], 0, stop), "is picked by number")
    return follow(trace, call)


@rule("view_as_complex", "view_as_complex_copy")
def view_as_complex(trace: Recorder, call: Call) -> Any:
    """Ties the two numbers of one."""
    return compact(trace.labels.tie_along(trace.activation(call, "self"), call["self"].dim() - 1).squeeze(-1))


@rule("view_as_real", "view_as_real_copy")
def view_as_real(trace: Recorder, call: Call) -> Any:
    """Both numbers go together."""
    return trace.activation(call, "self").unsqueeze(-1).expand(call.result.shape)


@rule("roll")
def roll(trace: Recorder, call: Call) -> Any:
    """Freezes channels that are rolled; positions move."""
    shadow = call.shadow("self")
    if isinstance(shadow, Tensor) and any(varies(shadow, dim) for dim in call["dims"] or range(shadow.dim())):
        trace.freeze(shadow, "is rolled over channels")
    return follow(trace, call)


@rule("glu")
def glu(trace: Recorder, call: Call) -> Any:
    """Ties each channel to its gate."""
    first, second = trace.activation(call, "self").chunk(2, call["dim"])
    if varies(first, call["dim"]):
        trace.labels.tie(first, second)
    return compact(first)


@rule("unbind")
def unbind(trace: Recorder, call: Call) -> Any:
    """One piece for each index of a dimension."""
    shadow = call.shadow("self")
    if isinstance(shadow, AxisLabels):
        return tuple(
            shadow.moved(trace.labels, lambda labels, i=i: labels.select(call["dim"], i))  # type: ignore[misc]
            for i in range(len(call.result))
        )
    return None if shadow is None else tuple(compact(each) for each in shadow.unbind(call["dim"]))


@rule(*PIECES)
def pieces(trace: Recorder, call: Call) -> Any:
    """``chunk``, ``split``: balances pieces of equal size; freezes unequal ones."""
    shadow = call.shadow("self")
    if shadow is None:
        return None
    dim = 1 if call["dim"] is None else call["dim"]
    sizes = [each.shape[dim] for each in call.result]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    if isinstance(shadow, AxisLabels):
        found: list[Any] = [
            shadow.moved(trace.labels, lambda labels, i=i: labels.narrow(dim, starts[i], sizes[i]))  # type: ignore[misc]
            for i in range(len(sizes))
        ]
        along = [each.vector(dim) for each in found]
    else:
        found = [shadow.narrow(dim, start, size) for start, size in zip(starts, sizes, strict=True)]
        along = found if varies(shadow, dim) else []
        if not trace.fresh.holds(shadow):
            found = [compact(each) for each in found]
    first: dict[int, Tensor] = {}
    for size, each in zip(sizes, along, strict=False):
        line = each.movedim(dim if each.dim() > 1 else 0, 0)
        line = line[(slice(None), *[0] * (line.dim() - 1))]
        if size and first.setdefault(size, line) is not line:
            trace.labels.balance(first[size], line)
    if call.name.endswith("chunk") and len(set(sizes)) > 1:
        trace.freeze(shadow, "is cut into unequal pieces")
    return found


@rule("cat", "concat", "concatenate")
def cat(trace: Recorder, call: Call) -> Any:
    """Pieces side by side."""
    return _joined(trace, call, [each for each in call["tensors"] if each.numel() or each.dim() > 1])


@rule("stack")
def stack(trace: Recorder, call: Call) -> Any:
    """Pieces along a new dimension."""
    return _joined(trace, call, call["tensors"])


@rule("hstack", "vstack", "column_stack", "dstack")
def hstack(trace: Recorder, call: Call) -> Any:
    """Pieces side by side, along the dimension that the name says."""
    return compact(call.func(_each_labels(trace, call, call["tensors"])))


def _each_labels(trace: Recorder, call: Call, tensors: list[Tensor]) -> list[Tensor]:
    beside = next((shadow for each in tensors if isinstance(shadow := call.shadows[id(each)], Tensor)), None)
    return [as_activation(trace.labels, call.shadows[id(each)], tuple(each.shape), beside) for each in tensors]


def _joined(trace: Recorder, call: Call, tensors: list[Tensor]) -> Tensor:
    """What is joined along another axis than that of the channels loses the same ones everywhere."""
    labels = _each_labels(trace, call, tensors)
    dim = call["dim"] % call.result.dim()
    beside = call.name != "stack"
    if beside and any(holds_any(each) for each in labels) and not any(varies(each, dim) for each in labels):
        first = [each.narrow(dim, 0, 1) for each in labels]
        other = [at for at in range(first[0].dim()) if any(varies(each, at) for each in first)]
        if other:
            for each in first[1:]:
                trace.labels.tie(first[0], each)
            return next(each for each in first if holds_any(each)).expand(call.result.shape)
    if beside and trace.fresh.joined(call.result, dim, labels):
        return compact(call.func(labels, call["dim"]), but=dim)
    return compact(call.func(labels, call["dim"]))


@rule("index", "index_select", "gather", "take_along_dim", "masked_select")
def index(trace: Recorder, call: Call) -> Any:
    """Indexing by number; along an axis of channels it freezes them."""
    shadow = call.shadow("self")
    dims = [call["dim"]] if "dim" in call else indexed(call)
    if dims == [None]:  # of the flattened tensor
        trace.freeze(shadow, "is picked from by number")
        return None
    if isinstance(shadow, AxisLabels):
        for dim in dims:
            trace.labels.freeze(shadow.vector(dim), "is picked from by number")
        return shadow.moved(trace.labels, lambda labels: _pick(call, labels))
    if shadow is None:
        return None
    if call.name == "masked_select":
        trace.freeze(shadow, "is picked from by number")
        return None
    for dim in dims:
        if varies(shadow, dim):
            last = _last_picked(trace, call, dim, dims)
            picked = shadow if last is None else shadow.narrow(dim, 0, last + 1)
            trace.freeze(picked, "is picked from by number" if last is None else "is picked by number")
    return compact(_pick(call, shadow))


def _last_picked(trace: Recorder, call: Call, dim: int, dims: list[int]) -> int | None:
    """The highest number that a constant list picks; None where the numbers may be others next time."""
    given = call["indices"] if "indices" in call else [call["index"]]
    numbers = next((each for each in given if each is not None), None)
    if len(dims) > 1 or numbers is None or numbers.dtype == torch.bool or not numbers.numel():
        return None
    constant = trace.is_constant(numbers) and int(numbers.min()) >= 0
    return int(numbers.max()) if constant else None


def _pick(call: Call, labels: Tensor) -> Tensor:
    return call.func(**{**call.arguments, "self": labels})


@rule("pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad1d", "replication_pad2d")
def pad(trace: Recorder, call: Call) -> Any:
    """Padding beside a channel has its label; padded channels have none."""
    shadow = call.shadow("self")
    if isinstance(shadow, AxisLabels):
        shadow = as_activation(trace.labels, shadow, shadow.shape)
    if shadow is None:
        return None
    amounts = call["pad"] if "pad" in call else call["padding"]
    for i in range(len(amounts) // 2):
        dim = shadow.dim() - 1 - i
        if not varies(shadow, dim):
            size = call.result.shape[dim]
            shadow = shadow.narrow(dim, 0, 1).expand([size if d == dim else s for d, s in enumerate(shadow.shape)])
        elif any(amounts[2 * i : 2 * i + 2]):
            around = [0] * (2 * i) + list(amounts[2 * i : 2 * i + 2])
            shadow = torch.constant_pad_nd(shadow, around)
    return compact(shadow)


@rule("pixel_shuffle")
def pixel_shuffle(trace: Recorder, call: Call) -> Any:
    """Ties the sub-pixels of one channel."""
    shadow = trace.activation(call, "self")
    together = shadow.unflatten(-3, (-1, call["upscale_factor"] ** 2))
    trace.labels.tie_along(together, together.dim() - 3)
    kept = together.select(-3, 0)[..., :1, :1]
    return kept.expand(call.result.shape)


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(trace: Recorder, call: Call) -> Any:
    """Keeps the number of groups; ties the same channels across groups."""
    shadow = trace.activation(call, "self")
    trace.labels.tie_along(shadow.unflatten(1, (call["groups"], -1)), 1)
    return compact(run(call, "self", shadow))


@rule("im2col")
def im2col(trace: Recorder, call: Call) -> Any:
    """Patches of pixels: each has the labels of its channel."""
    shadow = trace.activation(call, "self").double()
    return compact(call.func(**{**call.arguments, "self": shadow}).int())
