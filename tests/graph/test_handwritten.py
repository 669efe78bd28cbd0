"""Nets that no zoo has: how small they get, and that a cut one computes what it must."""

import pytest
import torch
from torch import nn

from pruning_core import ChannelGraph, slim_
from pruning_core.graph.trace.labels import Axis
from tests.support.graph_reference import Calls
from tests.support.nets.handwritten import HANDWRITTEN, NormByHand


def lively(build):
    torch.manual_seed(0)
    model = build()
    for each in model.parameters():
        if each.dim() == 1:
            each.data += 0.1 * torch.rand_like(each)
    return model.eval()


@pytest.mark.parametrize("name", HANDWRITTEN)
def test_nets_written_by_hand_lose_what_they_can(name):
    build, inputs, left = HANDWRITTEN[name]
    model = lively(build)
    graph = ChannelGraph.trace(model, inputs())
    gone = graph.restored({each: range(len(group) - 1) for each, group in graph.groups.items()})
    assert graph.macs(gone) < left * graph.macs()
    assert all("other outputs" not in why and "does not know these" not in why for _, _, why in graph.frozen())
    half = graph.restored({each: range(0, len(group), 2) for each, group in graph.groups.items()})
    before = sum(each.numel() for each in model.parameters())
    done = slim_(model, graph.plan(half))
    assert done.difference < 1e-5 and done.params_after < before
    model.train()
    given = inputs()
    out = model(*given) if isinstance(given, tuple) else model(given)
    out.sum().backward()
    assert all(each.grad is None or each.grad.shape == each.shape for each in model.parameters())


@pytest.mark.parametrize("way", ["squares", "var_mean"])
def test_a_layer_norm_by_hand_is_cut_as_pytorchs_own(way):
    def chain(norm):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 12), norm, nn.SiLU(), nn.Linear(12, 3)).double()

    x, found = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), []
    for norm in (nn.LayerNorm(12), NormByHand(12, way)):
        model = chain(norm)
        graph = ChannelGraph.trace(model, x)
        slim_(model, graph.plan({"0.weight:0": [1, 2, 7]}))
        found.append(model(x))
    assert torch.allclose(*found, rtol=1e-12)


WRONG = {
    "a window slides over them": (lambda x: nn.functional.local_response_norm(x, 5), "channels lie where it pools"),
    "every second": (lambda x: x[:, ::2], "is picked by number, at slice"),
    "a list": (lambda x: x[:, [0, 3, 9]], "is picked by number, at index"),
    "a range": (lambda x: x[:, 4:12], "is taken by a number that is no attribute and no share of the shape"),
    "the best": (lambda x: x.topk(3, 1).values, "a topk over channels"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_stays_says_in_one_line_why(case):
    function, why = WRONG[case]
    torch.manual_seed(0)
    side = nn.Conv2d(len(function(torch.zeros(1, 16, 1, 1))[0]), 4, 1)
    layers = {"a": nn.Conv2d(3, 16, 1), "out": nn.Conv2d(16, 4, 1), "b": nn.Conv2d(3, 16, 1), "side": side}
    model = Calls(lambda m, x: m.out(m.a(x)) + m.side(function(m.b(x))), layers, {}).double()
    graph = ChannelGraph.trace(model, torch.randn(2, 3, 4, 4, dtype=torch.float64))
    assert any(reason.startswith(why) for axis, _, reason in graph.frozen() if axis == Axis("b.weight", 0))
    assert len(graph.groups["a.weight:0"]) == 16
    slim_(model, graph.plan(graph.restored({each: [0, 2] for each in graph.groups})))


def test_numbers_that_are_computed_freeze_all_channels_that_they_may_pick():
    class Picked(nn.Module):
        def __init__(self, constant):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.last, self.constant = nn.Linear(5, 12), nn.Linear(12, 3), constant
            self.side = nn.Linear(3, 3)

        def forward(self, x, at):
            h = self.first(x)
            picked = h[:, [0, 2, 3]] if self.constant else h[:, at]
            return self.last(h) + self.side(picked)

    x, at = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 2, 3])
    constant, computed = (ChannelGraph.trace(Picked(each).double(), (x, at)) for each in (True, False))
    assert [len(each) for each in constant.groups.values()] == [8]
    assert not any("first" in each for each in computed.groups)
