"""Pointwise operations, in-place writes, and operations without labelled inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pruning_core.graph.trace.labels import NONE, Labels, compact, holds_any, unexpanded, varies, varying
from pruning_core.graph.trace.recorder import Call, Recorder
from pruning_core.graph.trace.rules.table import rule
from pruning_core.graph.trace.shadows import AxisLabels, Shadow, as_activation

BUFFERS = "zeros new_zeros empty new_empty full new_full ones new_ones".split()
LIKE = (
    "zeros_like ones_like empty_like full_like rand_like randn_like randint_like bernoulli dropout dropout_ "
    "feature_dropout feature_dropout_ alpha_dropout alpha_dropout_ rrelu gelu gelu_ silu silu_ mish mish_ "
    "hardswish hardswish_ hardsigmoid hardsigmoid_ elu elu_ selu selu_ celu celu_ relu6 relu6_ hardtanh hardtanh_ "
    "softplus logsigmoid log_sigmoid leaky_relu leaky_relu_ threshold threshold_ tanhshrink hardshrink softshrink "
    "nan_to_num clamp_ fill_ zero_ fill normal_ uniform_ bernoulli_ exponential_ native_dropout "
    "fake_quantize_per_tensor_affine"
).split()
WRITES = (
    "copy_ index_put_ index_put _index_put_impl_ index_add_ index_add index_copy_ index_copy index_fill_ index_fill "
    "index_reduce_ index_reduce scatter_ scatter scatter_add_ scatter_add scatter_reduce_ scatter_reduce "
    "masked_scatter_ masked_scatter slice_scatter select_scatter set_"
).split()
ADDS = ("index_add", "index_reduce", "scatter_add", "scatter_reduce")
MEET = "where masked_fill masked_fill_ lerp addcmul addcdiv _assert_tensor_metadata clamp_min clamp_max isclose".split()


@rule(*BUFFERS)
def nothing_known(trace: Recorder, call: Call) -> Any:
    """No labelled input; a fresh tensor may become a buffer that labelled values are written into."""
    if call.name in BUFFERS and isinstance(call.result, Tensor):
        return trace.fresh.add(tuple(call.result.shape))
    return None


@rule(*LIKE)
def like(trace: Recorder, call: Call) -> Any:
    """The result has the labels of the input."""
    return call.shadow("self") if "self" in call else call.shadow("input")


@rule(*MEET)
def pointwise(trace: Recorder, call: Call) -> Any:
    """Operands are broadcast against each other; labels that meet are tied."""
    operands = [(tensor, shadow) for tensor in call.tensors() if (shadow := call.shadows[id(tensor)]) is not None]
    if not isinstance(call.result, Tensor):
        return None
    shape = tuple(call.result.shape)
    if len(call.tensors()) == 1 and operands and isinstance(operands[0][1], Tensor) and not _is_square(call):
        return operands[0][1].expand(shape)
    if all(isinstance(shadow, AxisLabels) for _, shadow in operands):
        parameter = _parameters(trace.labels, [shadow for _, shadow in operands], shape)  # type: ignore[misc]
        if parameter is not None:
            return parameter
    met = Met(trace.labels, shape)
    for tensor, shadow in sorted(operands, key=lambda each: isinstance(each[1], AxisLabels)):
        met.add(tensor, shadow)
    if call.name in ("mul", "pow", "square") and _is_square(call):
        trace.squares[call.result] = True
    _adopt(trace, call, met.labels)
    return met.labels


def _adopt(trace: Recorder, call: Call, labels: Tensor) -> None:
    """What has no labels and meets channels one by one must have as many of them wherever it is used."""
    dims = varying(labels)
    for tensor in call.tensors() if dims else []:
        missing = labels.dim() - tensor.dim()
        shadow = call.shadows[id(tensor)]
        fresh = shadow if isinstance(shadow, Tensor) and trace.fresh.holds(shadow) else None
        if tensor is call.result or holds_any(trace.known(tensor)) or (shadow is not None and fresh is None):
            continue
        if all(dim >= missing and tensor.shape[dim - missing] > 1 and tensor.stride(dim - missing) for dim in dims):
            mine = labels[(0,) * missing]
            for dim, size in enumerate(tensor.shape):
                mine = mine.narrow(dim, 0, 1) if size == 1 else mine
            if fresh is not None:
                core = unexpanded(fresh)[0]
                core.copy_(mine.expand(tensor.shape)[tuple(slice(size) for size in core.shape)])
            else:
                trace.adopt(tensor, mine.expand(tensor.shape))


def _is_square(call: Call) -> bool:
    return (
        call.name == "square"
        or (call.name == "pow" and type(call["exponent"]) in (int, float) and call["exponent"] == 2)
        or (call.name == "mul" and call["self"] is call["other"])
    )


def _parameters(labels: Labels, shadows: list[AxisLabels], shape: tuple[int, ...]) -> AxisLabels | None:
    """Parameters among themselves: axis meets axis. None where the result is larger than all of them."""
    axes: list[Tensor | None] = [None] * len(shape)
    for shadow in shadows:
        for dim in shadow.labelled():
            at = dim + len(shape) - len(shadow.shape)
            mine, there = shadow.vector(dim), axes[at]
            if there is not None:
                labels.tie(there, mine)
            axes[at] = mine
    full = all(
        size == 1 or any(s.shape[d - len(shape)] == size for s in shadows if len(s.shape) >= len(shape) - d)
        for d, size in enumerate(shape)
    )
    return AxisLabels(tuple(axes), shape) if full else None


class Met:
    """Broadcasts operands one after another. A value broadcast over channels serves all of them and is frozen."""

    def __init__(self, ties: Labels, shape: tuple[int, ...]) -> None:
        self.ties, self.shape = ties, shape
        self.labels = torch.zeros((), dtype=torch.int32).expand(shape)
        self.single: set[int] = set(range(len(shape)))

    def add(self, tensor: Tensor, shadow: Shadow) -> None:
        """Broadcasts one more operand against those before it."""
        if shadow is None:
            return
        if isinstance(shadow, AxisLabels) and holds_any(self.labels):
            _parameter_beside(self.ties, shadow, self.labels)
            return
        mine = as_activation(self.ties, shadow, tuple(tensor.shape))
        if not holds_any(mine):
            return
        missing = len(self.shape) - mine.dim()
        mine = mine.view((1,) * missing + tuple(mine.shape))
        strides = (0,) * missing + tensor.stride()
        single = {d for d in range(len(self.shape)) if strides[d] == 0 or mine.shape[d] == 1}
        self.labels = self._joined(mine, single)
        self.single &= single

    def _joined(self, mine: Tensor, single: set[int]) -> Tensor:
        there = self.labels
        serves = any(varies(there, dim) for dim in single)
        served = any(varies(mine, dim) for dim in self.single)
        if serves and served and len(mine.unique()) > len(there.unique()):  # an outer product: the larger side goes on
            serves = False
        if serves:
            self.ties.freeze(mine, "serves all channels beside it")
            return there
        if served:
            self.ties.freeze(there, "serves all channels beside it")
            return mine.expand(self.shape)
        mine = mine.expand(self.shape)
        self.ties.tie_where_both(there, mine)
        return compact(torch.where(there == NONE, mine, there))


def _parameter_beside(labels: Labels, shadow: AxisLabels, there: Tensor) -> None:
    """A parameter's axis goes with the channels that lie along it; its other axes stay."""
    found = varying(there)
    used = False
    for dim in shadow.labelled():
        at = dim + there.dim() - len(shadow.shape)
        vector = shadow.vector(dim)
        if at not in found or used:
            labels.freeze(vector, "its axis is no channel axis")
        elif at != found[0] and shadow.labelled() == [dim] and labels.same_owner(there):
            labels.freeze(vector, "is shared by the heads")
            labels.tie_along(there, at)
            used = True
        else:
            lines = there.movedim(at, -1)
            labels.tie(lines, vector.expand(lines.shape))
            used = True


@rule(*WRITES)
def write(trace: Recorder, call: Call) -> Any:
    """Writes: labels are copied into a fresh buffer, tied where labelled values are overwritten or added to."""
    source = next((call[name] for name in ("source", "src", "values") if isinstance(call[name], Tensor)), None)
    shadow = call.shadows.get(id(source))
    target = call.shadow("self")
    if isinstance(target, AxisLabels):
        trace.freeze(target, "is written into")
        trace.freeze(shadow, "is written into a parameter")
        return None
    if target is None:
        trace.freeze(shadow, "is written into a tensor of fixed size")
        return None
    labels = as_activation(trace.labels, shadow, tuple(source.shape)) if source is not None else None
    dims = [call["dim"]] if "dim" in call else indexed(call)
    if any(varies(target, dim) for dim in dims):
        trace.freeze(target, "is written into by number")
        trace.freeze(labels, "is written by number")
        return target
    if labels is None or not holds_any(labels):
        return target
    if call.name.startswith(ADDS) or call["accumulate"] or isinstance(call["reduce"], str):
        return _added(trace, call, target, labels, dims)
    if trace.fresh.holds(target):
        run = {**call.arguments, "self": target}
        run.update({name: labels for name in ("source", "src", "values") if call[name] is source})
        run = {key: value for key, value in run.items() if key != "non_blocking"}
        written = target.copy_(labels) if call.name == "copy_" else call.func(**run)
        trace.fresh.filled(target)
        return written
    if call.name == "copy_":
        trace.labels.tie_where_both(target, labels.expand(target.shape))
        return target
    trace.freeze(target, "is written into by number")
    trace.freeze(labels, "is written by number")
    return target


def indexed(call: Call) -> list[int]:
    """The dimensions that ``indices`` pick from."""
    dims, at = [], 0
    for each in call["indices"] or ():
        if each is not None:
            dims += list(range(at, at + (each.dim() if each.dtype == torch.bool else 1)))
        at += each.dim() if each is not None and each.dtype == torch.bool else 1
    return dims


def _added(trace: Recorder, call: Call, target: Tensor, labels: Tensor, dims: list[int]) -> Tensor | None:
    """Rows are added to rows, as in graph networks: all rows have the channels of the source."""
    if "indices" in call:  # the source has the shape of the indices in place of the dimensions that they pick from
        picked = max(each.dim() for each in call["indices"] if each is not None)
        rest = labels.dim() - picked
        rows, fits = range(picked), dims == list(range(target.dim() - rest))
    else:
        rest = labels.dim() - 1
        rows = range(dims[0] % max(labels.dim(), 1), dims[0] % max(labels.dim(), 1) + 1)
        fits = labels.dim() == target.dim()
    line = labels
    for dim in rows if fits else ():
        fits = fits and not varies(labels, dim)
        line = line.narrow(dim, 0, 1)
    if "indices" in call and fits:
        line = line.reshape(line.shape[len(rows) :])
    sizes = zip(reversed(line.shape), reversed(target.shape), strict=False)
    fresh = trace.fresh.holds(target)
    if not fits or not (fresh or holds_any(target)) or any(mine not in (1, theirs) for mine, theirs in sizes):
        trace.freeze(target, "is added to by number")
        trace.freeze(labels, "is added by number")
        return target
    line = line.expand(target.shape)
    trace.labels.tie_where_both(target, line)
    merged = torch.where(target == NONE, line, target)
    if fresh and call.name.endswith("_"):
        return target.copy_(merged)
    return compact(merged)
