"""Attention, recurrence and the transformer's blocks, each as one tiny model that is cut at random."""

import math

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional

from pruning_core.graph import ChannelGraph, GraphError, Plan, slim_
from pruning_core.graph.trace.labels import Axis
from tests.support.graph_reference import Calls, Case, case_maker, check, image, tokens

CASES: list[Case] = []
case, chain = case_maker(CASES)


# ---- attention ------------------------------------------------------------------------------------------------------


def attention_layers(width=8, query=12, key=12):
    return {
        "a": nn.Linear(5, width),
        "q": nn.Linear(width, query),
        "k": nn.Linear(width, key),
        "v": nn.Linear(width, key),
        "out": nn.Linear(query, 7),
    }


def split_heads(x, heads, width):
    return x.view(x.shape[0], x.shape[1], heads, width).transpose(1, 2)


def joined(x):
    return x.transpose(1, 2).flatten(2)


def eager(q, k, v):
    return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1) @ v


HEADS = {"heads": 4, "head_dim": 3}


@case("sdpa", tokens(), (8, 4), attention_layers, HEADS)
def sdpa(m, x):
    x = m.a(x)
    q, k, v = (split_heads(each(x), m.heads, m.head_dim) for each in (m.q, m.k, m.v))
    return m.out(joined(functional.scaled_dot_product_attention(q, k, v)))


@case("sdpa_causal_by_shape", tokens(), (8, 4), attention_layers, {"head_dim": 3})
def sdpa_causal_by_shape(m, x):
    x = m.a(x)
    q, k, v = (split_heads(each(x), -1, m.head_dim) for each in (m.q, m.k, m.v))
    return m.out(joined(functional.scaled_dot_product_attention(q, k, v, is_causal=True)))


@case("eager", tokens(), (8, 4), attention_layers, {"heads": 4})
def eager_attention(m, x):
    x = m.a(x)
    q, k, v = (split_heads(each(x), m.heads, -1) for each in (m.q, m.k, m.v))
    return m.out(joined(eager(q, k, v)))


@case("eager_with_mask", tokens(), (8, 4), attention_layers, HEADS)
def eager_with_mask(m, x):
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    x = m.a(x)
    q, k, v = (split_heads(each(x), m.heads, m.head_dim) for each in (m.q, m.k, m.v))
    weights = (q @ k.transpose(-2, -1)).masked_fill(~mask, float("-inf")).softmax(-1)
    return m.out(joined(weights @ v))


@case("einsum_attention", tokens(), (8, 4), attention_layers, HEADS)
def einsum_attention(m, x):
    x = m.a(x)
    q, k, v = (each(x).unflatten(-1, (m.heads, m.head_dim)) for each in (m.q, m.k, m.v))
    weights = torch.einsum("bihd,bjhd->bhij", q, k).softmax(-1)
    return m.out(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))


@case(
    "relative_bias",
    tokens(),
    (4, 8),
    lambda: attention_layers() | {"table": nn.Parameter(torch.ones(16, 4))},
    HEADS,
)
def relative_bias(m, x):
    x = m.a(x)
    q, k, v = (split_heads(each(x), m.heads, m.head_dim) for each in (m.q, m.k, m.v))
    bias = m.table[torch.arange(16)].view(4, 4, -1).permute(2, 0, 1)
    return m.out(joined((q @ k.transpose(-2, -1) + bias).softmax(-1) @ v))


@case(
    "bias_of_each_head_as_mask",
    tokens(),
    (4, 8),
    lambda: {"bias": nn.Parameter(torch.ones(4, 4, 4))} | attention_layers(),
    HEADS,
)
def bias_of_each_head_as_mask(m, x):
    x = m.a(x)
    q, k, v = (split_heads(each(x), m.heads, m.head_dim) for each in (m.q, m.k, m.v))
    return m.out(joined(functional.scaled_dot_product_attention(q, k, v, m.bias[None])))


@case(
    "mask_of_all_heads", tokens(), (8, 4), lambda: {"bias": nn.Parameter(torch.ones(4, 4))} | attention_layers(), HEADS
)
def mask_of_all_heads(m, x):
    x = m.a(x)
    q, k, v = (split_heads(each(x), m.heads, m.head_dim) for each in (m.q, m.k, m.v))
    return m.out(joined(functional.scaled_dot_product_attention(q, k, v, m.bias)))


def two_layers():
    second = {f"{name}2": layer for name, layer in attention_layers().items() if name != "a"}
    return attention_layers() | {"out": nn.Linear(12, 8)} | second


@case("mask_of_each_head_for_two_layers", tokens(), (8, 4), two_layers, HEADS)
def mask_of_each_head_for_two_layers(m, x):
    x = m.a(x)
    mask = x.new_ones(1, m.heads, x.shape[1], x.shape[1]).tril().log()
    q, k, v = (split_heads(each(x), m.heads, m.head_dim) for each in (m.q, m.k, m.v))
    x = x + m.out(joined(functional.scaled_dot_product_attention(q, k, v, mask)))
    q, k, v = (split_heads(each(x), m.heads, m.head_dim) for each in (m.q2, m.k2, m.v2))
    return m.out2(joined(functional.scaled_dot_product_attention(q, k, v, mask)))


@case("grouped_queries_interleaved", tokens(), (8, 2), lambda: attention_layers(key=6), {"heads": 4, "pairs": 2})
def grouped_queries_interleaved(m, x):
    x = m.a(x)
    q = split_heads(m.q(x), m.heads, 3)
    k, v = (split_heads(each(x), m.pairs, 3).repeat_interleave(2, 1) for each in (m.k, m.v))
    return m.out(joined(functional.scaled_dot_product_attention(q, k, v)))


@case("grouped_queries_expanded", tokens(), (8, 2), lambda: attention_layers(key=6), {"head_dim": 3})
def grouped_queries_expanded(m, x):
    x = m.a(x)
    q = split_heads(m.q(x), -1, m.head_dim)
    k, v = (split_heads(each(x), -1, m.head_dim) for each in (m.k, m.v))
    k, v = (each[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for each in (k, v))
    return m.out(joined(eager(q, k, v)))


@case("grouped_queries_of_sdpa", tokens(), (8, 2), lambda: attention_layers(key=6), {"head_dim": 3})
def grouped_queries_of_sdpa(m, x):
    x = m.a(x)
    q, k, v = (split_heads(each(x), -1, m.head_dim) for each in (m.q, m.k, m.v))
    return m.out(joined(functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)))


def fused_layers():
    return {"a": nn.Linear(5, 8), "qkv": nn.Linear(8, 36), "out": nn.Linear(12, 7)}


@case("fused_chunk", tokens(), (8, 4), fused_layers, HEADS)
def fused_chunk(m, x):
    q, k, v = (split_heads(each, m.heads, m.head_dim) for each in m.qkv(m.a(x)).chunk(3, -1))
    return m.out(joined(functional.scaled_dot_product_attention(q, k, v)))


@case("fused_split", tokens(), (8, 4), fused_layers, {"width": 12, "head_dim": 3})
def fused_split(m, x):
    q, k, v = (split_heads(each, -1, m.head_dim) for each in m.qkv(m.a(x)).split(m.width, -1))
    return m.out(joined(eager(q, k, v)))


@case("fused_reshape", tokens(), (8, 4), fused_layers, HEADS)
def fused_reshape(m, x):
    x = m.qkv(m.a(x))
    q, k, v = x.reshape(*x.shape[:2], 3, m.heads, m.head_dim).permute(2, 0, 3, 1, 4)
    return m.out(joined(eager(q, k, v)))


@case("fused_reshape_by_index", tokens(), (8, 4), fused_layers, {"heads": 4})
def fused_reshape_by_index(m, x):
    x = m.qkv(m.a(x))
    qkv = x.reshape(*x.shape[:2], 3, m.heads, -1).permute(2, 0, 3, 1, 4)
    return m.out(joined(functional.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])))


@case("one_head", tokens(), (8, 12, 12), attention_layers, reader="all")
def one_head(m, x):
    x = m.a(x)
    return m.out((m.q(x) @ m.k(x).transpose(1, 2) * 0.3).softmax(-1) @ m.v(x))


@case("one_head_of_sdpa", tokens(), (8, 12, 12), attention_layers, reader="all")
def one_head_of_sdpa(m, x):
    x = m.a(x)
    return m.out(functional.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x), scale=0.3))


@case("one_head_scaled_by_its_width", tokens(), (8, 12), attention_layers)
def one_head_scaled_by_its_width(m, x):
    x = m.a(x)
    return m.out(functional.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x)))


@case(
    "cross_attention",
    lambda batch: (tokens()(batch), tokens(6, 3)(batch)),
    (4,),
    lambda: {"q": nn.Linear(5, 12), "k": nn.Linear(6, 12), "v": nn.Linear(6, 12), "out": nn.Linear(12, 7)},
    HEADS,
)
def cross_attention(m, x, y):
    q, k, v = (split_heads(each, m.heads, m.head_dim) for each in (m.q(x), m.k(y), m.v(y)))
    return m.out(joined(functional.scaled_dot_product_attention(q, k, v)))


@case(
    "convolutional_attention",
    image(),
    (8, 4),
    lambda: {"a": nn.Conv2d(3, 8, 1), "qkv": nn.Conv2d(8, 36, 1), "out": nn.Conv2d(12, 7, 1)},
    HEADS,
)
def convolutional_attention(m, x):
    b, _, h, w = x.shape
    q, k, v = m.qkv(m.a(x)).view(b, 3, m.heads, m.head_dim, h * w).unbind(1)
    x = v @ (q.transpose(-2, -1) @ k).softmax(-1).transpose(-2, -1)
    return m.out(x.reshape(b, -1, h, w))


@case("softmax_over_head_width", tokens(), (8, 4), attention_layers, HEADS)
def softmax_over_head_width(m, x):
    x = m.a(x)
    q, k, v = (split_heads(each(x), m.heads, m.head_dim) for each in (m.q, m.k, m.v))
    return m.out(joined(q.softmax(-1) @ (k.softmax(-2).transpose(-2, -1) @ v)))


@case("linear_attention", tokens(), (8, 4), attention_layers, HEADS)
def linear_attention(m, x):
    x = m.a(x)
    q, k, v = (split_heads(each(x), m.heads, m.head_dim) for each in (m.q, m.k, m.v))
    return m.out(joined(q.sigmoid() @ (k.sigmoid().transpose(-2, -1) @ v)))


@case("rotary", tokens(), (8, 4), lambda: attention_layers(query=16, key=16), {"heads": 4, "head_dim": 4})
def rotary(m, x):
    x = m.a(x)
    q, k, v = (split_heads(each(x), m.heads, m.head_dim) for each in (m.q, m.k, m.v))
    angle = torch.arange(q.shape[2], dtype=q.dtype)[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1], dtype=q.dtype)

    def turned(y):
        half = torch.cat([-y[..., 2:], y[..., :2]], -1)
        return y * angle.cos() + half * angle.sin()

    return m.out(joined(functional.scaled_dot_product_attention(turned(q), turned(k), v)))


@case("norm_of_each_head", tokens(), (8, 4), lambda: attention_layers() | {"norm": nn.LayerNorm(3)}, HEADS)
def norm_of_each_head(m, x):
    x = m.a(x)
    q, k, v = (split_heads(each(x), m.heads, m.head_dim) for each in (m.q, m.k, m.v))
    return m.out(joined(functional.scaled_dot_product_attention(m.norm(q), m.norm(k), v)))


@case(
    "multihead_attention",
    tokens(),
    (12, 4, 12),
    lambda: {"a": nn.Linear(5, 12), "mha": nn.MultiheadAttention(12, 4, batch_first=True), "out": nn.Linear(12, 7)},
)
def multihead_attention(m, x):
    x = m.a(x)
    return m.out(m.mha(x, x, x, need_weights=False)[0])


@case(
    "multihead_attention_with_weights",
    tokens(),
    (12, 4, 12),
    lambda: {"a": nn.Linear(5, 12), "mha": nn.MultiheadAttention(12, 4), "out": nn.Linear(12, 7)},
)
def multihead_attention_with_weights(m, x):
    x = m.a(x).transpose(0, 1)
    return m.out(m.mha(x, x, x)[0].transpose(0, 1))


@case(
    "multihead_attention_of_other_widths",
    lambda batch: (tokens()(batch), tokens(6, 3)(batch)),
    (12, 10, 12, 4),
    lambda: {
        "a": nn.Linear(5, 12),
        "b": nn.Linear(6, 10),
        "out": nn.Linear(12, 7),
        "mha": nn.MultiheadAttention(12, 4, kdim=10, vdim=10, batch_first=True),
    },
)
def multihead_attention_of_other_widths(m, x, y):
    y = m.b(y)
    return m.out(m.mha(m.a(x), y, y, need_weights=False)[0])


chain(
    "transformer_encoder",
    tokens(),
    (12, 4, 9),
    lambda: [nn.Linear(5, 12), nn.TransformerEncoderLayer(12, 4, 9, batch_first=True), nn.Linear(12, 4)],
)
chain(
    "transformer_encoder_norm_first",
    tokens(),
    (12, 4, 9),
    lambda: [
        nn.Linear(5, 12),
        nn.TransformerEncoderLayer(12, 4, 9, batch_first=True, norm_first=True),
        nn.Linear(12, 4),
    ],
)


class WidthOfItsInput(nn.Module):
    """Gets the width of a head from its input's: both must lose as much."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(12, 36), nn.Linear(12, 12), 4

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        return self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


def with_width_of_its_input():
    return {"a": nn.Linear(5, 12), "attention": WidthOfItsInput(), "out": nn.Linear(12, 4)}


@case("width_of_its_input", tokens(), (12, 4, 12), with_width_of_its_input)
def width_of_its_input(m, x):
    return m.out(m.attention(m.a(x)))


@case("width_of_its_input_and_output", tokens(), (12, 4), with_width_of_its_input)
def width_of_its_input_and_output(m, x):
    x = m.a(x)
    return m.out(x + m.attention(x))


# ---- recurrence -----------------------------------------------------------------------------------------------------


class First(nn.Module):
    def forward(self, x):
        return x[0]


def recurrent(name, groups, kind, directions=1, out=6, **options):
    def layers():
        return [nn.Linear(5, 7), kind(7, 6, batch_first=True, **options), First(), nn.Linear(out * directions, 4)]

    chain(name, tokens(), groups, layers)


for name, kind in (("lstm", nn.LSTM), ("gru", nn.GRU), ("rnn", nn.RNN)):
    recurrent(name, (7, 6), kind)
    recurrent(f"{name}_2_layers", (7, 6), kind, num_layers=2)
    recurrent(f"{name}_bidirectional", (7, 6), kind, directions=2, bidirectional=True)
    recurrent(
        f"{name}_2_layers_bidirectional_without_bias", (7, 6), kind, 2, num_layers=2, bidirectional=True, bias=False
    )
recurrent("lstm_projected", (7, 6, 2), nn.LSTM, out=2, proj_size=2)
recurrent(
    "lstm_projected_2_layers_bidirectional", (7, 6, 2), nn.LSTM, 2, 2, proj_size=2, num_layers=2, bidirectional=True
)


def states(x, width):
    return x.new_zeros(x.shape[0], width)


@case("lstm_cell", tokens(), (6,), lambda: {"cell": nn.LSTMCell(5, 6), "out": nn.Linear(6, 4)})
def lstm_cell(m, x):
    state = None
    for step in x.unbind(1):
        state = m.cell(step, state)
    return m.out(state[0])


@case(
    "gru_cell_of_its_own_state",
    tokens(),
    (7, 6),
    lambda: {"a": nn.Linear(5, 7), "cell": nn.GRUCell(7, 6), "out": nn.Linear(6, 4)},
)
def gru_cell_of_its_own_state(m, x):
    state = x.new_zeros(x.shape[0], m.cell.hidden_size)
    for step in m.a(x).unbind(1):
        state = m.cell(step, state)
    return m.out(state)


@case("lstm_last_state", tokens(), (6,), lambda: {"lstm": nn.LSTM(5, 6, batch_first=True), "out": nn.Linear(6, 4)})
def lstm_last_state(m, x):
    return m.out(m.lstm(x)[1][0][-1])


@case(
    "lstm_given_state",
    tokens(),
    (6,),
    lambda: {"lstm": nn.LSTM(5, 6, batch_first=True), "out": nn.Linear(6, 4)},
    {"width": 6},
)
def lstm_given_state(m, x):
    zeros = torch.zeros(1, x.shape[0], m.width, dtype=x.dtype)
    return m.out(m.lstm(x, (zeros, zeros))[0])


@pytest.mark.parametrize("each", CASES, ids=str)
def test_the_cut_model_computes_what_the_dense_one_does_with_zeroed_readers(each):
    check(each)


@pytest.mark.parametrize("each", CASES, ids=str)
def test_heads_lose_the_same_channels_where_that_was_asked_for(each):
    """Sizes, predicted costs and values, as above; what cannot go stays."""
    check(each, narrow_heads=True)


# ---- channels of heads ----------------------------------------------------------------------------------------------


def narrow(function, numbers, layers=attention_layers):
    torch.manual_seed(0)
    model = Calls(function, layers(), numbers).double()
    return model, ChannelGraph.trace(model, tokens()(2).double(), narrow_heads=True)


def test_with_a_given_scale_queries_keys_and_values_lose_as_many():
    def scaled(m, x):
        x = m.a(x)
        q, k, v = (split_heads(each(x), m.heads, m.head_dim) for each in (m.q, m.k, m.v))
        return m.out(joined(functional.scaled_dot_product_attention(q, k, v, scale=0.5)))

    model, graph = narrow(scaled, HEADS)
    assert {name: len(group) for name, group in graph.groups.items()} == {
        "a.weight:0": 8,
        "q.weight:0": 3,
        "v.weight:0": 3,
    }
    assert graph.groups["q.weight:0"].slices[0] == {
        Axis(name, 0): (0, 3, 6, 9) for name in ("q.weight", "q.bias", "k.weight", "k.bias")
    }
    with pytest.raises(GraphError, match="would differ in size"):
        graph.plan({"q.weight:0": [1]})
    slim_(model, graph.plan({"q.weight:0": [1], "v.weight:0": [2]}), example_inputs=tokens()(2).double())
    assert (model.heads, model.head_dim, model.q.out_features, model.out.in_features) == (4, 2, 8, 8)


def test_a_default_scale_keeps_queries_and_values_of_their_own_size_go():
    def of_two_sizes(m, x):
        x = m.a(x)
        q, k, v = (split_heads(each(x), m.heads, -1) for each in (m.q, m.k, m.v))
        return m.out(joined(functional.scaled_dot_product_attention(q, k, v)))

    _, graph = narrow(of_two_sizes, {"heads": 4})
    assert {name: len(group) for name, group in graph.groups.items()} == {"a.weight:0": 8, "v.weight:0": 3}
    why = {reason for axis, _, reason in graph.frozen() if axis == Axis("q.weight", 0)}
    assert why == {"attention scales by its width, at scaled_dot_product_attention in the model"}


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_heads_of_a_transformer_become_narrower(kind):
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=24, num_hidden_layers=1, num_attention_heads=4, intermediate_size=8
    )
    config._attn_implementation = kind
    torch.manual_seed(0)
    model = transformers.BertModel(config, add_pooling_layer=False).double().eval()
    words = torch.arange(10).view(2, 5)
    graph = ChannelGraph.trace(model, words, narrow_heads=True)
    plan = graph.plan({name: [0, 3] for name, group in graph.groups.items() if len(group) == 6})
    assert slim_(model, Plan.from_dict(plan.to_dict()), example_inputs=words).difference < 1e-12
    attention = model.encoder.layer[0].attention.self
    assert (attention.num_attention_heads, attention.attention_head_size, attention.all_head_size) == (4, 4, 16)


def test_a_scale_made_of_the_width_beside_the_model_is_noticed():
    """No output shows it: random weights look everywhere alike. Its number does."""

    def beside(m, x):
        x = m.a(x)
        q, k, v = (split_heads(each(x), m.heads, -1) for each in (m.q, m.k, m.v))
        scores = q @ k.transpose(-2, -1) / torch.sqrt(torch.FloatTensor([q.shape[-1]]))
        return m.out(joined((1e-7 * scores).softmax(-1) @ v))

    _, graph = narrow(beside, {"heads": 4})
    assert {name: len(group) for name, group in graph.groups.items()} == {"a.weight:0": 8, "v.weight:0": 3}
