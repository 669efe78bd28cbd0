"""Normalisation. A norm over channels takes its statistics over the kept ones."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pruning_core.graph.trace.labels import varies, varying
from pruning_core.graph.trace.recorder import Call, Recorder, Statistic
from pruning_core.graph.trace.rules.table import rule
from pruning_core.graph.trace.rules.weighted import along
from pruning_core.graph.trace.shadows import AxisLabels


def _tie_parameters(trace: Recorder, call: Call, labels: Tensor, names: tuple[str, ...]) -> None:
    for name in names:
        shadow = call.shadow(name)
        if isinstance(shadow, AxisLabels):
            trace.labels.tie(shadow.vector(0), labels)
        elif isinstance(call[name], Tensor):
            trace.labels.freeze(labels, "meets a norm's computed parameter")


def _freeze_positions(trace: Recorder, labels: Tensor) -> None:
    """Freezes channels that lie where others have positions, over which the statistics are taken."""
    if any(varies(labels, dim) for dim in range(2, labels.dim())):
        trace.labels.freeze(labels, "a norm's statistics are over channels")


@rule("batch_norm", "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
      "instance_norm")  # fmt: skip
def batch_norm(trace: Recorder, call: Call) -> Any:
    """Ties weight, bias and statistics to the channel."""
    weight = call.shadow("input")
    if isinstance(weight, AxisLabels):
        return _of_weight(trace, call, weight)
    labels = trace.activation(call, "input")
    if call["training"] or call["train"] or call["use_input_stats"] or not isinstance(call["running_mean"], Tensor):
        _freeze_positions(trace, labels)
    channels = along(trace, labels, 1)
    _tie_parameters(trace, call, channels, ("weight", "bias", "running_mean", "running_var"))
    return (labels, None, None) if isinstance(call.result, tuple) else labels


def _of_weight(trace: Recorder, call: Call, weight: AxisLabels) -> Any:
    """Weight standardization: each output channel of a weight is normalised over all that it reads."""
    names = ("weight", "bias", "running_mean", "running_var")
    given = [call.shadow(name) for name in names if isinstance(call[name], Tensor)]
    for each in given:
        if isinstance(each, AxisLabels):
            trace.labels.tie(each.vector(0), weight.vector(1))
    if len(given) and not all(isinstance(each, AxisLabels) for each in given):
        trace.labels.freeze(weight.vector(1), "meets a norm's computed parameter")
    for dim in weight.labelled():
        if dim != 1:
            trace.statistics.append(Statistic(call.where, None, weight.vector(dim).unique()))
    return (weight, None, None) if isinstance(call.result, tuple) else weight


@rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(trace: Recorder, call: Call) -> Any:
    """Statistics over the last dimensions: over channels they are those of the kept ones."""
    labels = trace.activation(call, "input")
    dims = range(labels.dim() - len(call["normalized_shape"]), labels.dim())
    if len(dims) > 1:
        _many(trace, call, labels, list(dims))
    elif varies(labels, labels.dim() - 1):
        _last(trace, call, labels)
    else:
        _fixed(trace, call)
    return (labels, *[None] * (len(call.result) - 1)) if isinstance(call.result, tuple) else labels


def _last(trace: Recorder, call: Call, labels: Tensor) -> None:
    outer = [dim for dim in varying(labels) if dim != labels.dim() - 1]
    if outer and trace.labels.same_owner(labels):  # heads: each is normalised alone, with one weight for all
        trace.labels.tie_along(labels, labels.dim() - 1)
        _fixed(trace, call)
        return
    trace.statistic(call, labels)
    _tie_parameters(trace, call, along(trace, labels, -1), ("weight", "bias"))


def _fixed(trace: Recorder, call: Call) -> None:
    for name in ("weight", "bias"):
        trace.freeze(call.shadow(name), "its axis is no channel axis")


def _many(trace: Recorder, call: Call, labels: Tensor, dims: list[int]) -> None:
    """A norm over several dimensions has a weight for each position: the shape of them all is fixed."""
    _fixed(trace, call)
    if any(varies(labels, dim) for dim in dims):
        trace.labels.freeze(labels, "a norm over several dimensions")


@rule("group_norm", "native_group_norm")
def group_norm(trace: Recorder, call: Call) -> Any:
    """Keeps the number of groups and ties the same channels across groups; a group of one channel goes with it."""
    labels = trace.activation(call, "input")
    _freeze_positions(trace, labels)
    channels = along(trace, labels, 1)
    trace.statistic(call, labels)
    groups = call["num_groups"] if "num_groups" in call else call["group"]
    _tie_parameters(trace, call, channels, ("weight", "bias"))
    if 1 < groups < len(channels):
        per_group = channels.view(groups, -1)
        trace.labels.tie(per_group, per_group[:1].expand(per_group.shape), "meets a group of fixed channels")
    return (labels, None, None) if isinstance(call.result, tuple) else labels


@rule("_weight_norm", "_weight_norm_interface")
def weight_norm(trace: Recorder, call: Call) -> Any:
    """Of the kept inputs, for each output channel."""
    value, scale = call.shadow("v"), call.shadow("g")
    if not isinstance(value, AxisLabels) or not isinstance(scale, AxisLabels):
        trace.freeze(value, "an operation without a rule")
        trace.freeze(scale, "an operation without a rule")
        return None
    kept = call["dim"] % len(value.shape)
    trace.labels.tie(value.vector(kept), scale.vector(kept))
    for dim in value.labelled():
        if dim != kept:
            trace.statistics.append(Statistic(call.where, None, value.vector(dim).unique()))
    return (value, None) if isinstance(call.result, tuple) else value
