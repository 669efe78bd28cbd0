"""Sizes that modules keep as attributes: found where they are read, in few runs, and never left wrong."""

import json
import warnings
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import nn

from pruning_core.graph import ChannelGraph, GraphError, apply_structure, slim_, structure


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


# ---- sizes that no code reads ---------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Eight channels in four heads; as many modules do, it keeps sizes that its code does not read."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(12, 8) for _ in range(3))
        self.out = nn.Linear(8, 12)
        self.num_attention_heads, self.attention_head_size, self.all_head_size = 4, 2, 8
        self.num_key_value_heads, self.hidden_size, self.max_position_embeddings, self.window = 4, 12, 8, 12

    def forward(self, x):
        q, k, v = (f(x).view(*x.shape[:2], -1, self.attention_head_size).transpose(1, 2) for f in self.three())
        x = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return self.out(x.reshape(*x.shape[:2], -1))

    def three(self):
        return self.query, self.key, self.value


class Encoder(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.stem, self.attention, self.head = nn.Linear(5, 12), attention, nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.attention(self.stem(x)))


def cut_encoder(attention, heads=(1,), width=(0, 1, 2, 3)):
    model, example = Encoder(attention), torch.randn(2, 6, 5)
    graph = ChannelGraph.trace(model, example)
    removed = {name: heads if len(group) == 4 else width for name, group in graph.groups.items()}
    slim_(model, graph.plan(removed), example_inputs=example)
    return model


def test_sizes_with_usual_names_follow_and_others_stay():
    model = cut_encoder(Attention())
    found = {name: value for name, value in vars(model.attention).items() if type(value) is int}
    assert found == {
        **{"num_attention_heads": 3, "attention_head_size": 2, "all_head_size": 6, "num_key_value_heads": 3},
        **{"hidden_size": 8, "max_position_embeddings": 8, "window": 12},
    }
    fresh = Encoder(Attention())
    apply_structure(fresh, structure(model))
    assert vars(fresh.attention)["hidden_size"] == 8 and fresh.attention.num_attention_heads == 3


def test_a_size_that_is_computed_with_stays_and_the_others_follow():
    class Scaling(Attention):
        def forward(self, x):
            return super().forward(x) / torch.tensor(float(self.hidden_size))

    model = cut_encoder(Scaling())
    assert model.attention.hidden_size == 12
    assert model.attention.num_attention_heads == 3 and model.attention.all_head_size == 6


def test_without_a_cut_of_heads_or_width_their_sizes_stay():
    assert cut_encoder(Attention(), heads=()).attention.num_attention_heads == 4
    model = cut_encoder(Attention(), width=())
    assert model.attention.hidden_size == 12 and model.attention.all_head_size == 6


@pytest.mark.parametrize("options", [{}, {"track_running_stats": True}, {"affine": True}])
def test_an_instance_norm_knows_its_width(options):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.InstanceNorm2d(8, **options), nn.Conv2d(8, 4, 1)).eval()
    example = torch.randn(1, 3, 6, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as errors they would stop the cut model where it has another width
        graph = ChannelGraph.trace(model, example)
        slim_(model, graph.plan({name: [0, 5] for name in graph.groups}), example_inputs=example)
    assert model[1].num_features == 6
    model(example)


class Renamed(nn.Module):
    """Heads of a width that is called otherwise, or of a query in two steps."""

    def __init__(self, names, low=0):
        super().__init__()
        self.num_heads, self.d_k, self.low = 4, 2, low
        for name in names:
            setattr(self, name, nn.Linear(12, 8))
        self.names, self.out = names, nn.Linear(8, 12)
        if low:
            self.q_down, self.q_up = nn.Linear(12, low), nn.Linear(low, 12)

    def forward(self, x):
        given = [self.q_up(self.q_down(x)) if self.low else x, x, x]
        q, k, v = (
            getattr(self, name)(each).view(*x.shape[:2], -1, self.d_k).transpose(1, 2)
            for name, each in zip(self.names, given, strict=True)
        )
        x = nn.functional.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(1, 2)
        return self.out(x.reshape(*x.shape[:2], -1))


def test_narrow_heads_are_as_many_as_before():
    model, example = Encoder(Renamed(("q", "k", "v"))), torch.randn(2, 6, 5)
    graph = ChannelGraph.trace(model, example, narrow_heads=True)
    slim_(
        model,
        graph.plan({name: [0] for name, group in graph.groups.items() if len(group) == 2}),
        example_inputs=example,
    )
    assert (model.attention.num_heads, model.attention.d_k, model.attention.q.out_features) == (4, 1, 4)


def test_a_query_of_low_rank_says_nothing_of_heads():
    model, example = Encoder(Renamed(("to_q", "to_k", "to_v"), low=8)), torch.randn(2, 6, 5)
    graph = ChannelGraph.trace(model, example)
    slim_(model, graph.plan({"attention.q_down.weight:0": range(4)}), example_inputs=example)
    assert model.attention.num_heads == 4 and model.attention.q_down.out_features == 4


@pytest.mark.parametrize("computes_all", [False, True])
def test_a_number_of_outputs_is_no_number_of_heads(computes_all):
    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads, self.q = 2, nn.Linear(5, 16)
            self.heads = nn.ModuleList(nn.Linear(16, 1) for _ in range(2))

        def forward(self, x):
            x = self.q(x).relu()
            return [self.heads[i](x) for i in range(2 if computes_all else self.num_heads)][: self.num_heads]

    model, example = Critic(), torch.randn(4, 5)
    graph = ChannelGraph.trace(model, example)
    slim_(model, graph.plan({"q.weight:0": range(8)}), example_inputs=example)
    assert model.num_heads == 2


class Sized(nn.Module):
    """Splits by sizes that are kept in some form."""

    def __init__(self, sizes):
        super().__init__()
        self.sizes, self.qkv, self.out = sizes, nn.Linear(12, 48), nn.Linear(16, 12)

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, *self.split()).permute(2, 0, 3, 1, 4)
        return x + self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def split(self):
        heads = self.sizes["heads"] if isinstance(self.sizes, dict) else self.sizes[0]
        return int(heads), -1


Sizes = namedtuple("Sizes", "heads width")


@pytest.mark.parametrize("sizes", [(4, 4), [4, 4], Sizes(4, 4), torch.Size([4, 4]), (np.int64(4), np.int64(4))])
def test_sizes_in_several_forms_follow_and_keep_their_form(sizes):
    model = cut_encoder(Sized(sizes))
    found = model.attention.sizes
    assert type(found) is type(sizes) and found[0] == 3 and model.attention.qkv.out_features == 36
    fresh = Encoder(Sized(sizes))
    apply_structure(fresh, json.loads(json.dumps(structure(model))))
    assert type(fresh.attention.sizes) is type(sizes) and fresh.attention.sizes == found


def test_modules_of_one_class_at_several_depths_with_their_sizes_elsewhere():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            sizes = {"heads": 4}
            self.num_heads, self.stem, self.head = 4, nn.Linear(5, 12), nn.Linear(12, 3)
            self.down, self.mid = nn.ModuleList([nn.Sequential(Sized(sizes))]), Sized(sizes)

        def forward(self, x):
            return self.head(self.mid(self.down[0](self.stem(x))))

    model, example = Net(), torch.randn(2, 6, 5)
    graph = ChannelGraph.trace(model, example)
    assert [len(group) for group in graph.groups.values()] == [12]
    slim_(model, graph.plan({"stem.weight:0": [2, 7]}), example_inputs=example)
    assert model.head.in_features == 10


def test_a_power_of_two_tensors_is_traced():
    class Powers(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x):
            slopes = torch.pow(torch.tensor(2.0), torch.arange(8.0))
            return self.second(torch.pow(self.first(x).abs(), torch.ones(2, 1)) * slopes)

    graph = ChannelGraph.trace(Powers(), torch.randn(2, 4))
    assert "first.weight:0" in {str(axis) for axis, _, _ in graph.frozen()}
