"""Matrix products, einsum and unfused attention, all written as einsum letters."""

from __future__ import annotations

import math
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


@rule("matmul", "mm", "bmm", "mv", "dot", "vdot", "baddbmm", "addbmm")
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
    return product(trace, Operand(call.shadow(left), a, first), Operand(call.shadow(right), b, second), out)


@rule("einsum")
def einsum(trace: Recorder, call: Call) -> Any:
    """Operands one after another: what is multiplied first loses what neither the others nor the result have."""
    tensors, equation = call["tensors"], str(call["equation"]).replace(" ", "")
    sides, arrow, out = equation.partition("->")
    letters = sides.split(",")
    for each, mine in zip(tensors, tuple(letters), strict=True):
        if "..." in mine:
            more = "ABCDEFGH"[: each.dim() - len(mine) + 3]
            letters, out = [text.replace("...", more) for text in letters], out.replace("...", more)
    if not arrow or any(len(set(each)) < len(each) for each in letters):
        for shadow in call.shadows.values():
            trace.freeze(shadow, "an einsum without '->' or of a diagonal")
        return None
    operands = [Operand(call.shadows.get(id(each)), each, mine) for each, mine in zip(tensors, letters, strict=True)]
    done = operands[0]
    for at, each in enumerate(operands[1:], 2):
        needed = out + "".join(letters[at:])
        left = "".join(letter for letter in dict.fromkeys(done.letters + each.letters) if letter in needed)
        done = _multiplied(trace, done, each, left if at < len(operands) else out)
    if len(operands) > 1:
        return done.shadow
    single = as_activation(trace.labels, done.shadow, done.shape)
    if any(varies(single, at) for at, letter in enumerate(done.letters) if letter not in out):
        trace.freeze(single, "an einsum of one operand that sums over channels")
        return None
    return compact(call.func(equation, [single]))


class Operand:
    """One side of a product: its shadow, its sizes, and a letter for each of its dimensions."""

    def __init__(self, shadow: Shadow, tensor: Tensor | tuple[int, ...], letters: str) -> None:
        self.shadow, self.letters = shadow, letters
        self.shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else tensor


def _multiplied(trace: Recorder, left: Operand, right: Operand, out: str) -> Operand:
    sizes = _sizes(left, right)
    return Operand(product(trace, left, right, out), tuple(sizes[each] for each in out), out)


def _sizes(*operands: Operand) -> dict[str, int]:
    """By letter; 1 is broadcast."""
    found: dict[str, int] = {}
    for each in operands:
        for letter, size in zip(each.letters, each.shape, strict=True):
            found[letter] = size if found.get(letter, 1) == 1 else found[letter]
    return found


def product(trace: Recorder, left: Operand, right: Operand, out: str) -> Any:
    """Two parameters, a parameter and an activation, or two activations."""
    if isinstance(left.shadow, AxisLabels) and isinstance(right.shadow, AxisLabels):
        return _parameters(trace, left, right, out)
    for weight, source in ((left, right), (right, left)):
        if isinstance(weight.shadow, AxisLabels):
            return _weight(trace, weight, source, out)
    return _activations(trace, left, right, out)


def _parameters(trace: Recorder, left: Operand, right: Operand, out: str) -> AxisLabels:
    """A weight that is computed from others, as in low-rank adapters and in a spectral norm."""
    sizes, axes = _sizes(left, right), {}
    assert isinstance(left.shadow, AxisLabels) and isinstance(right.shadow, AxisLabels)
    for letter in sizes:
        both = [
            each.shadow.vector(each.letters.index(letter))  # type: ignore[union-attr]
            for each in (left, right)
            if letter in each.letters
        ]
        if letter in out:
            axes[letter] = both[0]
            if len(both) > 1:
                trace.labels.tie(both[0], both[1])
        elif len(both) > 1:
            trace.consume(both[0], both[1])
        else:
            trace.labels.freeze(both[0], "is summed over")
    return AxisLabels(tuple(axes[each] for each in out), tuple(sizes[each] for each in out))


def _weight(trace: Recorder, weight: Operand, source: Operand, out: str) -> Tensor:
    """A parameter times an activation: its summed axis ends channels, its free axis begins some.

    Of several axes with channels one goes on: of the input's the heads, or the channels of each with ``narrow_heads``;
    of those that begin here the longest. The others keep their size.
    """
    parameter, theirs, sizes = weight.shadow, source.letters, _sizes(weight, source)
    assert isinstance(parameter, AxisLabels)
    axes = {letter: parameter.vector(at) for at, letter in enumerate(weight.letters)}
    labels = as_activation(trace.labels, source.shadow, source.shape)
    met = [each for each in theirs if each in axes and varies(labels, theirs.index(each))]
    main = met[-1 if trace.labels.narrow_heads else 0] if met else ""
    for each in met:
        if each != main:
            labels = trace.labels.tie_along(labels, theirs.index(each)).expand(labels.shape)
    for each in (each for each in weight.letters if each in theirs):
        if each not in out and main in ("", each):
            trace.consume(along(trace, labels, theirs.index(each)), axes[each])
        elif each == main:
            lines = labels.movedim(theirs.index(each), -1)
            trace.labels.tie(lines, axes[each].expand(lines.shape))
        else:
            trace.labels.freeze(axes[each], "its axis is no channel axis")
    passing = _passing(labels, theirs, out, main)
    free = sorted((each for each in axes if each not in theirs), key=lambda each: (each in out, sizes[each]))
    begun = free.pop() if free and free[-1] in out and not varying(passing) else ""
    for each in free:
        trace.labels.freeze(axes[each], "its axis is no channel axis")
    counted = [axes[each] for each in (main, begun) if each]
    counted += [passing.movedim(at, -1).reshape(-1, passing.shape[at])[0] for at in varying(passing) if out[at] != main]
    trace.cost(counted, rows=math.prod(sizes.values()) // max(math.prod(len(each) for each in counted), 1))
    shape = tuple(sizes[each] for each in out)
    if not begun:
        return compact(passing.expand(shape))
    return axes[begun].view([-1 if each == begun else 1 for each in out]).expand(shape)


def _passing(labels: Tensor, letters: str, out: str, summed: str) -> Tensor:
    """What is left of an input's labels: those along ``summed`` are read here."""
    for at, each in enumerate(letters):
        if each not in out:
            labels = labels.narrow(at, 0, 1)
            labels = torch.zeros_like(labels) if each == summed else labels
    labels = _aligned(labels, letters, out + "".join(each for each in letters if each not in out))
    return labels.reshape(labels.shape[: len(out)])


def _aligned(labels: Tensor, letters: str, all_letters: str) -> Tensor:
    """With one dimension for each letter, in one order."""
    order = [letters.index(each) for each in all_letters if each in letters]
    labels = labels.permute(order)
    for at, each in enumerate(all_letters):
        if each not in letters:
            labels = labels.unsqueeze(at)
    return labels


def _activations(trace: Recorder, left: Operand, right: Operand, out: str) -> Any:
    letters, sizes = out + "".join(sorted(set(left.letters + right.letters) - set(out))), _sizes(left, right)
    a, b = (
        _aligned(as_activation(trace.labels, each.shadow, each.shape), each.letters, letters) for each in (left, right)
    )
    shape = tuple(sizes[each] for each in out)
    if not holds_any(a) and not holds_any(b):
        return None
    summed = range(len(out), len(letters))
    batch = [at for at, each in enumerate(out) if each in left.letters and each in right.letters]
    together = [at for at in summed if varies(a, at) or varies(b, at)]
    heads = [at for at in batch if varies(a, at) and (varies(b, at) or not holds_any(b))]
    whole = bool(heads) and not trace.labels.narrow_heads
    if heads and not whole:
        a, b = (_without_heads(trace, each, heads) for each in (a, b))
    _cost(trace, a, b)
    for at in together:
        if whole:
            a, b = (trace.labels.tie_along(each, at).expand(each.shape) for each in (a, b))
        elif varies(a, at) and varies(b, at):
            _matched(trace, a, b, at)
        else:
            trace.labels.freeze(a if varies(a, at) else b, "is summed with a tensor of fixed size")
    a, b = (_first(each, list(summed), [] if whole else together) for each in (a, b))
    for at in heads if whole else []:
        if varies(b, at):
            _one_head(trace, a, b, at)
    return _given(trace, a, b, heads if whole else [], shape)


def _cost(trace: Recorder, a: Tensor, b: Tensor) -> None:
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
