"""Sizes that modules keep as attributes: found where they are read, in few runs, and never left wrong."""

import pytest
import torch
from torch import nn

from pruning_core.graph import ChannelGraph, GraphError, slim_


class Block(nn.Module):
    """Reads its width from an attribute."""

    def __init__(self, width=8):
        super().__init__()
        self.inner, self.outer, self.width = nn.Linear(width, width), nn.Linear(width, width), width

    def forward(self, x):
        return self.outer(self.inner(x).view(-1, self.width))


class Steady(Block):
    """The same class of step in the same place, but its attribute is a number to compute with."""

    def forward(self, x):
        x = self.inner(x)
        x = x.view(-1, self.width) if self.follows else x.view(-1, x.shape[-1])
        return self.outer(x if self.follows else x * torch.ones(self.width).sum())


def steady(follows):
    block = Steady()
    block.follows = follows
    return block


@pytest.fixture
def runs(monkeypatch):
    """Counts the forward passes of whole models."""
    counted = []
    original = nn.Sequential.forward

    def forward(self, x):
        counted.append(len(self))
        return original(self, x)

    monkeypatch.setattr(nn.Sequential, "forward", forward)
    return counted


def cut(model, count=3):
    example = torch.randn(2, 8)
    graph = ChannelGraph.trace(model, example)
    plan = graph.plan({name: range(count) for name in graph.groups})
    return slim_(model, plan, example_inputs=example)


def test_the_same_attribute_of_equal_blocks_is_found_once(runs):
    counts = {}
    for blocks in (2, 12):
        model = nn.Sequential(*(Block() for _ in range(blocks)))
        del runs[:]
        cut(model)
        counts[blocks] = len(runs)
        assert [block.width for block in model] == [5] * blocks
    assert counts[2] == counts[12]


def test_a_guess_that_would_be_wrong_is_taken_back():
    model = nn.Sequential(steady(True), steady(False), steady(True))
    assert cut(model).difference < 1e-5
    assert [block.width for block in model] == [5, 8, 5]


def test_attributes_are_as_before_when_the_cut_cannot_be_followed():
    class Stubborn(Block):
        def forward(self, x):
            x = self.inner(x)
            if x.shape[-1] == 5:
                raise RuntimeError("five is no width")
            return self.outer(x.view(-1, self.width))

    model = nn.Sequential(Block(), Stubborn(), Block())
    with pytest.raises(GraphError, match="five is no width"):
        cut(model)
    assert [block.width for block in model] == [8, 8, 8]


def test_channels_whose_number_is_computed_with_stay_and_others_go():
    class Scaled(nn.Module):
        """Divides by the root of its width, as a tensor: no operation shows that number."""

        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            x = self.first(x)
            x = x / torch.sqrt(torch.tensor(float(x.shape[-1])))
            return self.third(self.second(x))

    model = Scaled()
    graph = ChannelGraph.trace(model, torch.randn(2, 8))
    assert list(graph.groups) == ["second.weight:0"]
    why = {reason for axis, _, reason in graph.frozen() if str(axis) == "first.weight:0"}
    assert len(why) == 1 and "a cut gives other outputs" in why.pop()
    slim_(model, graph.plan({"second.weight:0": [1, 3]}), example_inputs=torch.randn(2, 8))
    assert model.second.out_features == 6
