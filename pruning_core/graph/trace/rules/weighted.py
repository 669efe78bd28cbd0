"""Weighted layers: consume the channels of their input and produce their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pruning_core.graph.trace.labels import holds_any, varies, varying
from pruning_core.graph.trace.recorder import Call, Recorder
from pruning_core.graph.trace.rules.table import rule
from pruning_core.graph.trace.shadows import AxisLabels, as_activation


def along(trace: Recorder, labels: Tensor, dim: int) -> Tensor:
    """The labels along one axis; everything at one index of it is tied."""
    lines = labels.movedim(dim, -1).reshape(-1, labels.shape[dim])
    if lines.shape[0] == 0:
        return torch.zeros(labels.shape[dim], dtype=torch.int32)
    if not varies(lines, 1) and varies(lines, 0):  # the channels lie on another axis: this one has a fixed size
        return torch.zeros(labels.shape[dim], dtype=torch.int32)
    return trace.labels.tie_along(lines, 0)[0]


def weight_of(trace: Recorder, call: Call, name: str = "weight") -> AxisLabels | None:
    """The shadow of a weight; None, with the input frozen, where the weight is computed or a constant."""
    shadow = call.shadow(name)
    return shadow if isinstance(shadow, AxisLabels) else None


def begin(trace: Recorder, call: Call, out: Tensor, bias: str = "bias") -> None:
    """Ties the bias to the channels produced here."""
    if isinstance(call[bias], Tensor):
        shadow = call.shadow(bias)
        if isinstance(shadow, AxisLabels) and shadow.shape == tuple(out.shape):
            trace.labels.tie(shadow.vector(0), out)
        elif isinstance(shadow, AxisLabels) and len(shadow.shape) and shadow.shape[-1] == out.shape[0]:
            trace.labels.tie(shadow.vector(-1), out)
        else:
            trace.labels.freeze(out, "its bias is computed")


def fixed_weight(trace: Recorder, call: Call, *names: str) -> Any:
    """Freezes what meets a weight that is not a parameter."""
    for name in names:
        trace.freeze(call.shadow(name), "meets a weight that is no parameter")
    return None


@rule("linear")
def linear(trace: Recorder, call: Call) -> Any:
    """``x @ weight.T + bias``: columns consume channels, rows make them."""
    weight = weight_of(trace, call)
    if weight is None:
        return fixed_weight(trace, call, "input", "weight", "bias")
    return _apply(trace, call, "input", weight.vector(1), weight.vector(0))


@rule("addmm")
def addmm(trace: Recorder, call: Call) -> Any:
    """``bias + x @ weight``, as in GPT-2."""
    weight = weight_of(trace, call, "mat2")
    if weight is None or isinstance(call.shadow("mat1"), AxisLabels):
        return fixed_weight(trace, call, "mat1", "mat2", "self")
    return _apply(trace, call, "mat1", weight.vector(0), weight.vector(1), "self")


def _apply(trace: Recorder, call: Call, source: str, taken: Tensor, given: Tensor, bias: str = "bias") -> Tensor:
    labels = trace.fresh.read(call[source], trace.activation(call, source), -1, taken)
    trace.consume(along(trace, labels, -1), taken)
    if varying(labels) and not varies(labels, labels.dim() - 1):
        return _across(trace, call, labels, labels.dim() - 1, [given])
    trace.cost([given, taken], rows=call.result.numel() // max(call.result.shape[-1], 1))
    begin(trace, call, given, bias)
    return given.expand(call.result.shape)


@rule("conv1d", "conv2d", "conv3d", "convolution", "_convolution", "conv_transpose1d", "conv_transpose2d",
      "conv_transpose3d")  # fmt: skip
def conv(trace: Recorder, call: Call) -> Any:
    """Consumes input channels, produces output channels; kernel axes are frozen."""
    weight = weight_of(trace, call)
    if weight is None:
        return fixed_weight(trace, call, "input", "weight", "bias")
    turned = "transpose" in call.name or bool(call["transposed"])
    groups = call["groups"]
    spatial = len(weight.shape) - 2
    for dim in range(2, 2 + spatial):
        trace.labels.freeze(weight.vector(dim), "is a kernel's axis")
    source = trace.activation(call, "input")
    channel = source.dim() - spatial - 1
    if any(varies(source, dim) for dim in range(channel + 1, source.dim())):
        if _pointwise(call, weight, spatial) and not varies(source, channel):
            return _across(trace, call, source, channel, [weight.vector(0), weight.vector(1)])
        trace.labels.freeze(source, "a convolution slides along channels")
    first, second = weight.vector(0), weight.vector(1)
    if groups == 1:
        source = trace.fresh.read(call["input"], source, channel, first if turned else second)
    taken = along(trace, source, channel)
    if groups == 1:
        given, inner = (second, first) if turned else (first, second)
        trace.consume(taken, inner)
    else:
        given = _grouped(trace, taken, first, second, groups, turned)
    begin(trace, call, given)
    counted = call["input"] if turned else call.result
    positions = counted.numel() // max(counted.shape[-spatial - 1], 1)
    trace.cost([first, second], rows=positions * _kernel(weight, spatial))
    return given.view(-1, *[1] * spatial).expand(call.result.shape)


def _across(trace: Recorder, call: Call, labels: Tensor, dim: int, weights: list[Tensor]) -> Tensor:
    """Sums over dimension ``dim``, which has no channels; these lie elsewhere and pass."""
    for each in weights:
        trace.labels.freeze(each, "works across positions, not channels")
    lines = [labels.movedim(each, -1).reshape(-1, labels.shape[each])[0] for each in varying(labels)]
    rows = call.result.numel() * labels.shape[dim] // (call["groups"] or 1)
    for line in lines:
        rows //= len(line)
    trace.cost(lines, rows=rows)
    return labels.narrow(dim, 0, 1).expand(call.result.shape)


def _pointwise(call: Call, weight: AxisLabels, spatial: int) -> bool:
    """Whether each position is computed from itself alone."""
    same = call["input"].shape[-spatial:] == call.result.shape[-spatial:]
    return same and _kernel(weight, spatial) == 1 and all(step == 1 for step in call["stride"])


def _kernel(weight: AxisLabels, spatial: int) -> int:
    size = 1
    for each in weight.shape[len(weight.shape) - spatial :]:
        size *= each
    return size


def _grouped(trace: Recorder, taken: Tensor, first: Tensor, second: Tensor, groups: int, turned: bool) -> Tensor:
    """Depthwise: ties each channel through. Grouped: ties the same channels across groups."""
    labels = trace.labels
    if groups == len(taken):  # a group is one input channel, with all that it gives
        given_each = second if turned else first.view(groups, -1)
        if turned:
            if len(second) > 1:
                labels.freeze(torch.cat([first, second]), "a depthwise transposed convolution with a multiplier")
                labels.freeze(taken, "a depthwise transposed convolution with a multiplier")
                return torch.zeros(groups * len(second), dtype=torch.int32)
            labels.freeze(second, "is the only channel of its group")
            labels.tie(taken, first, "meets an input of fixed size")
            return first
        labels.freeze(second, "is the only channel of its group")
        labels.tie(taken[:, None].expand(given_each.shape), given_each, "meets an input of fixed size")
        return first
    per_group = taken.view(groups, -1)
    labels.tie(per_group, per_group[:1].expand(per_group.shape), "meets an input of fixed size")
    if turned:  # weight: (in, out per group)
        trace.consume(taken, first)
        return second.repeat(groups)
    trace.consume(per_group[0], second)
    out = first.view(groups, -1)
    labels.tie(out, out[:1].expand(out.shape))
    return first


@rule("embedding", "embedding_bag", "_embedding_bag")
def embedding(trace: Recorder, call: Call) -> Any:
    """Rows are indexed by number and frozen; columns produce channels."""
    weight = weight_of(trace, call)
    if weight is None:
        return fixed_weight(trace, call, "weight", "indices")
    trace.labels.freeze(weight.vector(0), "is looked up by number")
    first = call.result[0] if isinstance(call.result, (tuple, list)) else call.result
    labels = weight.vector(1).expand(first.shape)
    if isinstance(call.result, (tuple, list)):
        return (labels, *[None] * (len(call.result) - 1))
    return labels


@rule("prelu", "_prelu_kernel")
def prelu(trace: Recorder, call: Call) -> Any:
    """Ties each slope to its channel."""
    labels = trace.activation(call, "self")
    weight = call.shadow("weight")
    if isinstance(weight, AxisLabels) and call["weight"].numel() > 1:
        trace.labels.tie(weight.vector(weight.labelled()[0]), along(trace, labels, 1))
    return labels


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(trace: Recorder, call: Call) -> Any:
    """LSTM, GRU, RNN: ties the hidden size across layers and directions."""
    if not isinstance(call["params"], (list, tuple)) or "batch_sizes" in call:
        for shadow in call.shadows.values():
            trace.freeze(shadow, "a packed sequence")
        return None
    gates = {"lstm": 4, "gru": 3}.get(call.name, 1)
    weights = [trace.shadow_of(each) for each in call["params"]]
    directions = 2 if call["bidirectional"] else 1
    each = len(weights) // (call["num_layers"] * directions)
    states = call["hx"] if isinstance(call["hx"], (list, tuple)) else [call["hx"]]
    given = [call.shadows.get(id(state)) for state in states]
    fresh = [each for each in given if isinstance(each, Tensor) and trace.fresh.holds(each) and not holds_any(each)]
    for shadow in given:
        if shadow is not None and not any(shadow is each for each in fresh):
            trace.freeze(shadow, "is a given state")
    projected = each in (3, 5) and gates == 4
    source = along(trace, trace.activation(call, "input"), -1)
    common: list[Tensor] = []
    for layer in range(call["num_layers"]):
        out = []
        for direction in range(directions):
            at = (layer * directions + direction) * each
            out.append(_cell(trace, call, weights[at : at + each], source, gates, projected, common))
        source = torch.cat(out)
    for labels, known in zip(given, common[::-1] if gates == 4 else common[1:], strict=False):
        if isinstance(labels, Tensor):
            trace.fresh.begun(labels, -1, known)
    hidden = source.expand(call.result[0].shape)
    return (hidden, *[None] * (len(call.result) - 1)) if not common else (hidden, *_states(call, source, common))


def _cell(
    trace: Recorder, call: Call, weights: list[Any], source: Tensor, gates: int, projected: bool, common: list[Tensor]
) -> Tensor:
    """The labels of what one direction of one layer gives."""
    for each in weights:
        if not isinstance(each, AxisLabels):
            trace.labels.freeze(source, "meets a weight that is no parameter")
            return torch.zeros(weights[1].shape[1] if isinstance(weights[1], AxisLabels) else 1, dtype=torch.int32)
    inputs, recurrent_weight = weights[0], weights[1]
    trace.consume(source, inputs.vector(1))
    units = inputs.vector(0).view(gates, -1)
    cells = units[0]
    for each in [inputs, recurrent_weight, *[bias for bias in weights[2:4] if len(bias.shape) == 1]]:
        trace.labels.tie(each.vector(0).view(gates, -1), cells.expand(gates, -1))
    given = cells
    if projected:
        trace.consume(cells, weights[-1].vector(1))
        given = weights[-1].vector(0)
    trace.consume(given, recurrent_weight.vector(1))
    for each in (inputs, recurrent_weight, *weights[len(weights) - projected :]):
        trace.cost([each.vector(0), each.vector(1)], rows=call["input"].numel() // call["input"].shape[-1])
    if not common:
        common += [cells, given]
    trace.labels.tie(cells, common[0])
    trace.labels.tie(given, common[1])
    return given


def _states(call: Call, source: Tensor, common: list[Tensor]) -> list[Tensor]:
    given = [common[1]] if len(call.result) == 2 else [common[1], common[0]]
    return [labels.expand(state.shape) for labels, state in zip(given, call.result[1:], strict=True)]


@rule("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def cell(trace: Recorder, call: Call) -> Any:
    """A recurrent cell: ties its states to its output."""
    gates = {"lstm_cell": 4, "gru_cell": 3}.get(call.name, 1)
    names = ["w_ih", "w_hh", *[name for name in ("b_ih", "b_hh") if isinstance(call[name], Tensor)]]
    source = along(trace, trace.activation(call, "input"), -1)
    given = _cell(trace, call, [call.shadow(name) for name in names], source, gates, False, [])
    states = call["hx"] if isinstance(call["hx"], (list, tuple)) else [call["hx"]]
    for state in states:
        labels = as_activation(trace.labels, call.shadows.get(id(state)), tuple(state.shape))
        labels = trace.fresh.begun(labels, -1, given)
        trace.labels.tie_where_both(labels, given.expand(labels.shape))
    many = isinstance(call.result, (tuple, list))
    return tuple(given.expand(each.shape) for each in call.result) if many else given.expand(call.result.shape)
