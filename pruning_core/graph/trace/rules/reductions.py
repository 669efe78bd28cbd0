"""Reductions: pools, sums, softmax, sorting."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pruning_core.graph.trace.labels import NONE, compact, varies, varying
from pruning_core.graph.trace.operations import SCANS, STATISTICS
from pruning_core.graph.trace.recorder import Call, Recorder, Statistic
from pruning_core.graph.trace.rules.elementwise import pointwise
from pruning_core.graph.trace.rules.table import rule
from pruning_core.graph.trace.shadows import AxisLabels

POOLS = {
    1: "max_pool1d avg_pool1d adaptive_avg_pool1d adaptive_max_pool1d upsample_nearest1d upsample_linear1d lp_pool1d",
    2: "max_pool2d max_pool2d_with_indices avg_pool2d adaptive_avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d "
    "fractional_max_pool2d upsample_nearest2d upsample_nearest_exact2d _upsample_nearest_exact2d upsample_bilinear2d "
    "upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa grid_sampler grid_sampler_2d roi_align "
    "roi_pool",
    3: "max_pool3d max_pool3d_with_indices avg_pool3d adaptive_avg_pool3d _adaptive_avg_pool3d adaptive_max_pool3d "
    "upsample_nearest3d upsample_trilinear3d grid_sampler_3d",
}
NO_STATISTIC = frozenset("argmax argmin mode kthvalue prod cumprod max min median nanmedian cummax cummin".split())
"""What they give says little about the kept channels: the number of one, or a product. Some also give a value."""
VALUED = frozenset("max min median nanmedian cummax cummin".split())
ORDERED = "sort topk argsort msort"


def _flat(labels: Tensor, dims: Iterable[int], shape: tuple[int, ...]) -> Tensor:
    for dim in dims:
        labels = labels.narrow(dim, 0, 1)
    return labels.expand(shape)


def _pool(spatial: int) -> Any:
    def pool(trace: Recorder, call: Call) -> Any:
        main = "self" if "self" in call else "input"
        labels = trace.activation(call, main)
        dims = list(range(labels.dim() - spatial, labels.dim()))
        if call.name.startswith("roi"):
            dims.append(0)
        many = isinstance(call.result, (tuple, list))
        shape = tuple((call.result[0] if many else call.result).shape)
        if any(varies(labels, dim) for dim in dims):
            trace.labels.freeze(labels, "channels lie where it pools")
            return None
        pooled = _flat(labels, dims, shape)
        return tuple(pooled for _ in call.result) if many else pooled

    return pool


for _spatial, _names in POOLS.items():
    rule(*_names.split())(_pool(_spatial))


@rule(
    *(f"fft_{kind}{dims}" for kind in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft") for dims in ("", "2", "n")),
)
def fourier(trace: Recorder, call: Call) -> Any:
    """A Fourier transform over positions, of which some may be zeros that the code has added; over channels it freezes
    them."""
    labels = trace.activation(call, "self")
    dims = _dims(call, labels.dim())
    line = labels.amax(dims, keepdim=True)
    if bool(((labels != NONE) & (labels != line)).any()):
        trace.labels.freeze(labels, "a Fourier transform over channels")
        return None
    return compact(line.expand(call.result.shape))


@rule(*SCANS)
def softmax(trace: Recorder, call: Call) -> Any:
    """Over positions labels pass, over channels as well: it is one of the kept ones. What meets on one line of several
    goes together."""
    labels = trace.activation(call, "self")
    dim = call["dim"] % max(labels.dim(), 1)
    if varies(labels, dim) and len(varying(labels)) > 1:
        labels = compact(trace.labels.tie_along(labels, dim).expand(labels.shape))
    elif varies(labels, dim):
        trace.statistic(call, labels)
        _numbers(trace, call, labels)
    return (labels, labels) if isinstance(call.result, tuple) else labels


@rule(*STATISTICS)
def reduction(trace: Recorder, call: Call) -> Any:
    """Over positions labels pass. Over channels it is a statistic of the kept ones; where others lie beside them, all
    that is reduced to one number goes together, but for a norm."""
    if isinstance(call["other"], Tensor):
        return pointwise(trace, call)
    shadow = call.shadow("self")
    if isinstance(shadow, AxisLabels):
        return _of_parameter(trace, call, shadow)
    labels = trace.activation(call, "self")
    dims = _dims(call, labels.dim())
    mixed = [dim for dim in dims if varies(labels, dim)]
    outer = [dim for dim in varying(labels) if dim not in dims]
    if mixed and outer and not _is_norm(trace, call):
        for dim in mixed:  # heads of a head's channels, or the same channels of several tensors: they go together
            trace.labels.tie_along(labels, dim)
    elif mixed:
        _statistic(trace, call, labels, mixed, outer)
        labels = torch.zeros((), dtype=torch.int32).expand(labels.shape)
    kept = _flat(labels, dims, tuple(1 if dim in dims else size for dim, size in enumerate(labels.shape)))
    return _shaped(kept, dims, call)


def _of_parameter(trace: Recorder, call: Call, shadow: AxisLabels) -> Any:
    """A statistic of a weight, as in weight standardization: of the axes that are left, each keeps its labels."""
    dims = _dims(call, len(shadow.shape))
    for dim in shadow.labelled():
        if dim in dims:
            trace.statistics.append(Statistic(call.where, None, shadow.vector(dim).unique()))
            _numbers(trace, call, shadow.vector(dim))
    axes = [None if dim in dims else axis for dim, axis in enumerate(shadow.axes)]
    if not call["keepdim"]:
        axes = [axis for dim, axis in enumerate(axes) if dim not in dims]
    if isinstance(call.result, (tuple, list)):
        return tuple(AxisLabels(tuple(axes), tuple(each.shape)) for each in call.result)
    return AxisLabels(tuple(axes), tuple(call.result.shape))


def _numbers(trace: Recorder, call: Call, labels: Tensor) -> None:
    """What depends on the number of a channel changes as soon as one goes."""
    if call.name not in NO_STATISTIC:
        return
    if call.name not in VALUED:
        trace.changes(call.result, labels, f"{call.name} over channels")
    elif isinstance(call.result, (tuple, list)):
        trace.changes(call.result[1:], labels, f"the channel's number in {call.name} over channels")


def _is_norm(trace: Recorder, call: Call) -> bool:
    """A root of the mean of squares, or of their sum: those of the kept channels say the same."""
    return (call["self"] in trace.squares and call.name in ("mean", "sum")) or call.name in (
        "norm",
        "linalg_vector_norm",
    )


def _statistic(trace: Recorder, call: Call, labels: Tensor, mixed: list[int], outer: list[int]) -> None:
    """Normalised within each head, a head goes whole; else all positions lose the same channels."""
    trace.statistic(call, labels)
    _numbers(trace, call, labels)
    heads = outer and trace.labels.same_owner(labels)
    for dim in mixed if heads else outer:
        trace.labels.tie_along(labels, dim)


def _dims(call: Call, count: int) -> list[int]:
    dims = call["dim"]
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        return list(range(count))
    return [dim % count for dim in ([dims] if isinstance(dims, int) else dims)]


def _shaped(kept: Tensor, dims: list[int], call: Call) -> Any:
    if not call["keepdim"]:
        for dim in sorted(dims, reverse=True):
            kept = kept.select(dim, 0)
    kept = compact(kept)
    if isinstance(call.result, (tuple, list)):
        return tuple(kept.reshape(each.shape) for each in call.result)
    return kept.reshape(call.result.shape)


@rule(*ORDERED.split())
def ordered(trace: Recorder, call: Call) -> Any:
    """Sorting over channels freezes them."""
    labels = trace.activation(call, "self")
    dim = call["dim"] if call["dim"] is not None else -1
    if varies(labels, dim % max(labels.dim(), 1)):
        trace.labels.freeze(labels, f"a {call.name} over channels")
        return None
    many = isinstance(call.result, (tuple, list))
    results = call.result if many else [call.result]
    found = [_flat(labels, [dim % labels.dim()], tuple(each.shape)) for each in results]
    return tuple(found) if many else found[0]


@rule("one_hot", "bucketize", "histc", "bincount", "nonzero", "item", "_local_scalar_dense", "is_nonzero", "equal")
def number(trace: Recorder, call: Call) -> Any:
    """Tensors that become numbers; freezes the channels they are computed from."""
    for shadow in call.shadows.values():
        trace.freeze(shadow, "its values become numbers")
    return None
