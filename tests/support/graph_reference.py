"""What a cut model must compute, made by hand: readers of removed channels see zeros, norms count the kept ones.

Nothing here asks the package what an operation does: the reference is the dense model with zeroed columns.
"""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from pruning_core.graph import ChannelGraph, slim_
from pruning_core.graph.trace.labels import Axis


@dataclass(frozen=True)
class Case:
    """A tiny model, what it takes, and how many channels each group must have.

    ``groups`` is None where that is not known. ``reader``: ``consumers`` zeroes what reads removed channels; ``all``
    everything that is removed, for channels that are summed with each other and that no weight reads.
    """

    name: str
    build: Callable
    example: Callable
    groups: tuple = ()
    reader: str = "consumers"

    def __str__(self):
        return self.name


class Calls(nn.Module):
    """Layers by name, plain numbers, and a function of both."""

    def __init__(self, function, layers, numbers):
        super().__init__()
        self.function = function
        for name, value in {**layers, **numbers}.items():
            setattr(self, name, value)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def case_maker(cases):
    """Two ways to add a case: over a function of its layers, and as a chain of layers."""

    def case(name, example, groups, layers, numbers=None, reader="consumers"):
        def register(function):
            cases.append(Case(name, lambda: Calls(function, layers(), numbers or {}), example, groups, reader))
            return function

        return register

    def chain(name, example, groups, layers):
        cases.append(Case(name, lambda: nn.Sequential(*layers()), example, groups))

    return case, chain


def image(channels=3, size=6, dims=2):
    return lambda batch: torch.randn(batch, channels, *[size] * dims)


def tokens(width=5, count=4):
    return lambda batch: torch.randn(batch, count, width)


def numbers(batch):
    return torch.randint(0, 10, (batch, 4))


def stem(out=8, dims=2):
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](3, out, 1)


def head(width=8, dims=2):
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](width, 4, 1)


class RMSNormByHand(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class KeptNorm(nn.Module):
    """A dense norm whose statistics are those of the kept channels, written out."""

    def __init__(self, norm, kept):
        super().__init__()
        self.norm, self.kept = norm, kept
        self.eps = getattr(norm, "eps", 1e-6) or torch.finfo(norm.weight.dtype).eps
        self.weight, self.bias = norm.weight, getattr(norm, "bias", None)

    def forward(self, x):
        norm = self.norm
        if isinstance(norm, nn.GroupNorm):
            return self.group_norm(x)
        kept = x[..., self.kept]
        center = kept.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else 0.0
        square = ((kept - center) ** 2).sum(-1, keepdim=True) / len(self.kept)
        scaled = (x - center) / torch.sqrt(square + self.eps) * self.weight
        return scaled if self.bias is None else scaled + self.bias

    def group_norm(self, x):
        out = torch.empty_like(x)
        for group in torch.arange(x.shape[1]).chunk(self.norm.num_groups):
            kept = x[:, [i for i in group.tolist() if i in self.kept]].flatten(1)
            if not kept.shape[1]:
                continue
            mean, square = kept.mean(1), ((kept - kept.mean(1, keepdim=True)) ** 2).mean(1)
            shape = (-1,) + (1,) * (x.dim() - 1)
            out[:, group] = (x[:, group] - mean.view(shape)) / torch.sqrt(square.view(shape) + self.eps)
        column = (-1,) + (1,) * (x.dim() - 2)
        return out.nan_to_num(0.0) * self.weight.view(column) + self.bias.view(column)


def reference(model, plan, reader="consumers"):
    """The dense model, with zeros in the place of what is removed."""
    model = copy.deepcopy(model)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for axis in plan.removed if reader == "all" else plan.consumers:
        tensors[axis.tensor].data.index_fill_(axis.dim, torch.tensor(plan.removed[axis]), 0)
    for path, module in list(model.named_modules()):
        axis = Axis(f"{path}.weight", 0)
        if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm | RMSNormByHand) and axis in plan.removed:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, KeptNorm(module, plan.kept(axis)))
    return model


def made(case):
    """The model in double precision with all values random, in evaluation mode."""
    torch.manual_seed(0)
    model = case.build().double().eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        with torch.no_grad():
            tensor.copy_(torch.rand_like(tensor) + 0.5 if "running_var" in name else torch.randn_like(tensor) * 0.5)
    return model


def double(example):
    return pytree.tree_map_only(torch.Tensor, lambda x: x.double() if x.is_floating_point() else x, example)


def chosen(graph, seed):
    """A random part of each group, at least one channel of it stays."""
    rng = random.Random(seed)
    removed = {name: rng.sample(range(len(group)), rng.randrange(len(group))) for name, group in graph.groups.items()}
    return graph.restored(removed)


def slimmed(model, plan, example, **options):
    """A cut copy."""
    model = copy.deepcopy(model)
    slim_(model, plan, example_inputs=example, **options)
    return model


def run(model, example):
    """Its outputs, computed with gradients: without them fused kernels skip the modules that the reference replaces."""
    outputs = pytree.tree_leaves(model(*example) if isinstance(example, tuple) else model(example))
    return [each.detach() for each in outputs]


def assert_close(got, want):
    """To 1e-9 of the largest value, output by output."""
    assert len(got) == len(want)
    for mine, other in zip(got, want, strict=True):
        assert mine.shape == other.shape
        assert (mine - other).abs().max() <= 1e-9 * other.abs().max()


def assert_same(left, right):
    """Bit by bit; whatever holds the tensors."""
    mine, shape = pytree.tree_flatten(left)
    other, other_shape = pytree.tree_flatten(right)
    assert shape == other_shape
    for each, there in zip(mine, other, strict=True):
        assert torch.equal(each, there) if isinstance(each, torch.Tensor) else each == there


def params(model):
    return sum(parameter.numel() for parameter in model.parameters())


def macs(model, example):
    with FlopCounterMode(display=False) as counter:
        run(model, example)
    return counter.get_total_flops() // 2


def sizes(graph):
    return tuple(len(group) for group in graph.groups.values())


def check(case, narrow_heads=False):
    """Traces, then cuts three random parts and compares each with the reference on inputs of its own. ``groups`` and
    ``reader`` are those of whole heads."""
    model, example = made(case), double(case.example(2))
    graph = ChannelGraph.trace(model, example, narrow_heads=narrow_heads)
    assert narrow_heads or case.groups in (None, sizes(graph)), [str(each) for each in graph.frozen()]
    assert graph.params() == params(model)
    assert graph.macs() == macs(model, example)
    cut = 0
    for seed in range(3):
        removed = chosen(graph, seed)
        plan = graph.plan(removed)
        slim = slimmed(model, plan, example)
        assert params(slim) == graph.params(removed)
        assert macs(slim, example) == graph.macs(removed)
        cut += params(model) - params(slim)
        torch.manual_seed(1 + seed)
        fresh = double(case.example(3))
        assert_close(run(slim, fresh), run(reference(model, plan, "all" if narrow_heads else case.reader), fresh))
    assert cut or case.groups == () or narrow_heads
    return graph
