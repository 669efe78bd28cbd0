"""Matrix products, einsum and unfused attention, all written as einsum letters."""

from __future__ import annotations

import string
from typing import Any

import torch
from torch import Tensor

from pruning_core.graph.trace.labels import NONE, compact, holds_any, unexpanded, varies, varying
from pruning_core.graph.trace.recorder import Call, Recorder
from pruning_core.graph.trace.rules.elementwise import Met
from pruning_core.graph.trace.rules.table import rule
from pruning_core.graph.trace.rules.weighted import along
from pruning_core.graph.trace.shadows import AxisLabels, Shadow, as_activation


@rule("matmul", "mm", "bmm", "mv", "dot", "baddbmm", "addbmm")
def matmul(trace: Recorder, call: Call) -> Any:
    """A product written as letters, for ``product``."""
    left = "batch1" if "batch1" in call else "self"
    right = next(name for name in ("batch2", "mat2", "vec", "tensor", "other") if name in call)
    if call.name in ("baddbmm", "addbmm"):
        trace.freeze(call.shadow("self"), "is added to a product")
    a, b = call[left], call[right]
    batch = string.ascii_lowercase[: max(a.dim(), b.dim()) - 2] if max(a.dim(), b.dim()) > 2 else ""
    first = batch[len(batch) - (a.dim() - 2) :] + "YZ" if a.dim() > 1 else "Z"
    second = batch[len(batch) - (b.dim() - 2) :] + "ZX" if b.dim() > 1 else "Z"
    out = batch + ("Y" if a.dim() > 1 else "") + ("X" if b.dim() > 1 else "")
    if a.dim() == 2:
        first = "YZ"
    if b.dim() == 2:
        second = "ZX"
    return product(trace, call, (a, first), (b, second), out)


@rule("einsum")
def einsum(trace: Recorder, call: Call) -> Any:
    """Two operands; with more, all channels freeze."""
    tensors = call["tensors"]
    equation = str(call["equation"]).replace(" ", "")
    if len(tensors) != 2 or "->" not in equation:
        for shadow in call.shadows.values():
            trace.freeze(shadow, "an einsum of other than two operands")
        return None
    sides, _, out = equation.partition("->")
    first, second = sides.split(",")
    for each, letters in zip(tensors, (first, second), strict=True):
        if "..." in letters:
            more = "ABCDEFGH"[: each.dim() - len(letters) + 3]
            first, second, out = (text.replace("...", more) for text in (first, second, out))
    return product(trace, call, (tensors[0], first), (tensors[1], second), out)


def product(trace: Recorder, call: Call, left: tuple[Tensor, str], right: tuple[Tensor, str], out: str) -> Any:
    """A parameter times an activation, or two activations."""
    shadows = [call.shadows.get(id(tensor)) for tensor, _ in (left, right)]
    for i, (mine, other) in enumerate(((left, right), (right, left))):
        if isinstance(shadows[i], AxisLabels) and not isinstance(shadows[1 - i], AxisLabels):
            return _weight(trace, call, (shadows[i], mine[1]), (other[0], shadows[1 - i], other[1]), out)
    labels = [
        as_activation(trace.labels, shadow, tuple(tensor.shape))
        for shadow, (tensor, _) in zip(shadows, (left, right), strict=True)
    ]
    return _activations(trace, call, (labels[0], left[1]), (labels[1], right[1]), out)


def _weight(
    trace: Recorder, call: Call, weight: tuple[Shadow, str], source: tuple[Tensor, Shadow, str], out: str
) -> Any:
    """A parameter times an activation: its summed axis ends channels, its free axis begins some."""
    parameter, letters = weight
    assert isinstance(parameter, AxisLabels)
    tensor, shadow, theirs = source
    labels = as_activation(trace.labels, shadow, tuple(tensor.shape))
    summed = [each for each in letters if each not in out and each in theirs]
    free = [each for each in letters if each in out and each not in theirs]
    shared = [each for each in letters if each in out and each in theirs]
    if len(summed) != 1 or len(free) > 1:
        trace.freeze(parameter, "a product over several axes")
        trace.freeze(labels, "a product over several axes")
        return None
    for each in shared:
        _together(trace, parameter.vector(letters.index(each)), labels, theirs.index(each))
    taken = along(trace, labels, theirs.index(summed[0]))
    trace.consume(taken, parameter.vector(letters.index(summed[0])))
    shape = tuple(call.result.shape)
    rows = call.result.numel()
    vectors = [parameter.vector(letters.index(summed[0]))]
    given = torch.zeros((), dtype=torch.int32).expand(shape)
    if free:
        vector = parameter.vector(letters.index(free[0]))
        view = [1] * len(shape)
        view[out.index(free[0])] = -1
        given = vector.view(view).expand(shape)
        rows //= max(len(vector), 1)
        vectors.append(vector)
    trace.cost(vectors, rows=rows)
    return given


def _together(trace: Recorder, vector: Tensor, labels: Tensor, dim: int) -> None:
    """An axis that weight and activation share: of the channels along it, if there are any."""
    if varies(labels, dim):
        lines = labels.movedim(dim, -1)
        trace.labels.tie(lines, vector.expand(lines.shape))
    else:
        trace.labels.freeze(vector, "its axis is no channel axis")


def _aligned(labels: Tensor, letters: str, all_letters: str) -> Tensor:
    """With one dimension for each letter, in one order."""
    order = [letters.index(each) for each in all_letters if each in letters]
    labels = labels.permute(order)
    for at, each in enumerate(all_letters):
        if each not in letters:
            labels = labels.unsqueeze(at)
    return labels


def _activations(trace: Recorder, call: Call, left: tuple[Tensor, str], right: tuple[Tensor, str], out: str) -> Any:
    letters = out + "".join(sorted(set(left[1] + right[1]) - set(out)))
    a, b = (_aligned(labels, names, letters) for labels, names in (left, right))
    shape = tuple(call.result.shape)
    if not holds_any(a) and not holds_any(b):
        return None
    summed = range(len(out), len(letters))
    batch = [at for at, each in enumerate(out) if each in left[1] and each in right[1]]
    together = [at for at in summed if varies(a, at) or varies(b, at)]
    heads = [at for at in batch if varies(a, at) and (varies(b, at) or not holds_any(b))]
    whole = bool(heads) and not trace.labels.narrow_heads
    if heads and not whole:
        a, b = (_without_heads(trace, each, heads) for each in (a, b))
    _cost(trace, call, a, b)
    for at in together:
        if whole:
            a, b = (trace.labels.tie_along(each, at).expand(each.shape) for each in (a, b))
        elif varies(a, at) and varies(b, at):
            _matched(trace, a, b, at)
        else:
            trace.labels.freeze(a, "is summed with a tensor of fixed size")
            trace.labels.freeze(b, "is summed with a tensor of fixed size")
    a, b = (_first(each, list(summed), [] if whole else together) for each in (a, b))
    for at in heads if whole else []:
        if varies(b, at):
            _one_head(trace, a, b, at)
    return _given(trace, a, b, heads if whole else [], shape)


def _cost(trace: Recorder, call: Call, a: Tensor, b: Tensor) -> None:
    """All letters multiplied; those that channels lie along are counted as they are kept."""
    whole = torch.broadcast_shapes(a.shape, b.shape)
    a, b = (unexpanded(each)[0] for each in (a, b))
    for dim in range(len(whole)):
        if not varies(a, dim) and not varies(b, dim):
            a, b = (each.narrow(dim, 0, 1) for each in (a, b))
    grid = torch.where(a == NONE, b, a)
    for dim in range(len(whole)):
        if not varies(grid, dim):
            grid = grid.narrow(dim, 0, 1)
    trace.cost([grid.reshape(-1)], rows=whole.numel() // grid.numel())


def _matched(trace: Recorder, a: Tensor, b: Tensor, at: int) -> None:
    """A contraction over channels of two activations: ties both sides, at all positions."""
    left, right = (each.movedim(at, -1).reshape(-1, each.shape[at]) for each in (a, b))
    first = trace.labels.tie_along(left, 0)[0]
    trace.labels.tie(first, trace.labels.tie_along(right, 0)[0])
    trace.products.append((trace.labels.place, first))


def _first(labels: Tensor, summed: list[int], lost: list[int]) -> Tensor:
    """Without what is summed; where channels were summed nothing is left of them."""
    if any(varies(labels, at) for at in lost):
        return torch.zeros([1] * labels.dim(), dtype=torch.int32)
    for at in summed:
        labels = labels.narrow(at, 0, 1)
    return labels


def _without_heads(trace: Recorder, labels: Tensor, heads: list[int]) -> Tensor:
    """Labels of heads as such (a bias of each): heads stay, and so do these."""
    if set(varying(labels)) - set(heads):
        return labels
    trace.labels.freeze(labels, "goes with heads, which stay")
    return torch.zeros((), dtype=torch.int32).expand(labels.shape)


def _one_head(trace: Recorder, a: Tensor, b: Tensor, at: int) -> None:
    """Products per head: ties each head as a whole."""
    left, right = (each.movedim(at, 0).reshape(each.shape[at], -1) for each in (a, b))
    for each in (left, right):
        trace.labels.tie(each, each[:, :1].expand(each.shape))
    trace.labels.tie(left[:, 0], right[:, 0])


def _given(trace: Recorder, a: Tensor, b: Tensor, heads: list[int], shape: tuple[int, ...]) -> Tensor:
    dims = len(shape)
    a, b = (each.reshape(each.shape[:dims]) for each in (a, b))
    if heads and holds_any(b) and not holds_any(a):
        return compact(b.expand(shape))
    if heads:
        richer = b if sum(b.shape[d] > 1 and varies(b, d) for d in range(dims)) else a
        return compact(richer.expand(shape))
    met = Met(trace.labels, shape)
    for each in (a, b):
        met.add(each, each if holds_any(each) else None)
    return met.labels


@rule("_grouped_mm")
def grouped_mm(trace: Recorder, call: Call) -> Any:
    """One weight for each group of rows: (experts, in, out)."""
    weight = call.shadow("mat2")
    if not isinstance(weight, AxisLabels) or len(weight.shape) != 3:
        for name in ("self", "mat2"):
            trace.freeze(call.shadow(name), "meets a weight that is no parameter")
        return None
    source = along(trace, trace.activation(call, "self"), -1)
    trace.labels.freeze(weight.vector(0), "is an expert")
    trace.consume(source, weight.vector(1))
    rows = call["self"].shape[0]
    trace.cost([weight.vector(1), weight.vector(2)], rows=rows)
    return weight.vector(2).expand(call.result.shape)
