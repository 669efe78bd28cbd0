"""One tiny model for each operation: how many channels can go, and that the cut model computes what it must."""

from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm
from torchvision.ops import FrozenBatchNorm2d

from pruning_core.graph import ChannelGraph, slim_
from pruning_core.graph.trace.labels import Axis
from tests.support.graph_reference import (
    Calls,
    Case,
    RMSNormByHand,
    case_maker,
    check,
    head,
    image,
    numbers,
    stem,
    tokens,
)

CASES: list[Case] = []
case, chain = case_maker(CASES)


# ---- layers with weights --------------------------------------------------------------------------------------------


def convolutions(name, dims, kind):
    data = image(dims=dims)
    chain(name, data, (8, 6), lambda: [kind(3, 8, 3), nn.Sigmoid(), kind(8, 6, 3), nn.ReLU(), kind(6, 4, 1)])

    def between(layer, width):
        return lambda: [stem(8, dims), nn.Sigmoid(), layer(), nn.GELU(), head(width, dims)]

    chain(f"grouped_{name}", data, (2, 3), between(lambda: kind(8, 12, 3, groups=4), 12))
    chain(f"depthwise_{name}", data, (8,), between(lambda: kind(8, 8, 3, groups=8), 8))


for dims, plain, turned in (
    (1, nn.Conv1d, nn.ConvTranspose1d),
    (2, nn.Conv2d, nn.ConvTranspose2d),
    (3, nn.Conv3d, nn.ConvTranspose3d),
):
    convolutions(f"conv{dims}d", dims, plain)
    convolutions(f"conv_transpose{dims}d", dims, turned)

chain(
    "depthwise_with_multiplier", image(), (6,), lambda: [stem(6), nn.Conv2d(6, 12, 3, groups=6), nn.Sigmoid(), head(12)]
)
chain("strided_without_bias", image(), (8,), lambda: [nn.Conv2d(3, 8, 3, 2, bias=False), nn.Sigmoid(), head()])
chain("linear", tokens(), (8,), lambda: [nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 4)])
chain("linear_without_bias", tokens(), (8,), lambda: [nn.Linear(5, 8, False), nn.Sigmoid(), nn.Linear(8, 4, False)])
chain("embedding", numbers, (8, 6), lambda: [nn.Embedding(10, 8), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)])
chain("embedding_bag", numbers, (8,), lambda: [nn.EmbeddingBag(10, 8, mode="mean"), nn.Linear(8, 4)])
chain(
    "weight_norm",
    image(),
    (8, 6),
    lambda: [stem(), nn.Sigmoid(), weight_norm(nn.Conv2d(8, 6, 3)), nn.Sigmoid(), head(6)],
)


@case("weights_scaled_in_the_code", tokens(), (8,), lambda: {"a": nn.Linear(5, 8), "out": nn.Linear(8, 4)})
def weights_scaled_in_the_code(m, x):
    return m.out(functional.linear(x, m.a.weight * 0.3, m.a.bias + 1).sigmoid())


@case("addmm", lambda batch: torch.randn(batch, 5), (4,), lambda: {"a": nn.Linear(5, 8), "out": nn.Linear(4, 8)})
def addmm(m, x):
    """The first four channels lend their biases to the output, so they stay."""
    return torch.addmm(m.a.bias[:4], m.a(x).sigmoid(), m.out.weight)


@case("shared_twice", image(), (8,), lambda: {"a": stem(), "b": nn.Conv2d(8, 8, 3, padding=1), "out": head()})
def shared_twice(m, x):
    return m.out(m.b(m.b(m.a(x)).sigmoid()).sigmoid())


@case(
    "tied_embedding", numbers, (8, 6), lambda: {"emb": nn.Embedding(10, 8), "a": nn.Linear(8, 6), "b": nn.Linear(6, 8)}
)
def tied_embedding(m, x):
    x = m.emb(x)
    return functional.linear(x + m.b(m.a(x).relu()), m.emb.weight)


def tied_layers():
    layers = {"emb": nn.Embedding(10, 8), "a": nn.Linear(8, 6), "b": nn.Linear(6, 8), "out": nn.Linear(8, 10, False)}
    layers["out"].weight = layers["emb"].weight
    return layers


@case("tied_head", numbers, (8, 6), tied_layers)
def tied_head(m, x):
    x = m.emb(x)
    return m.out(x + m.b(m.a(x).relu()))


@case("looked_up_and_multiplied", numbers, (), lambda: {"emb": nn.Embedding(10, 8), "out": nn.Linear(10, 4)})
def looked_up_and_multiplied(m, x):
    """Its rows are channels of the product, but they are looked up by number as well."""
    return m.out(functional.linear(m.emb(x), m.emb.weight).sigmoid())


@case("matmul_with_parameter", tokens(), (8,), lambda: {"a": nn.Linear(5, 8), "out": nn.Linear(4, 8)})
def matmul_with_parameter(m, x):
    return torch.matmul(m.a(x).sigmoid(), m.out.weight)


@case("einsum_with_parameter", tokens(), (8,), lambda: {"a": nn.Linear(5, 8), "out": nn.Linear(4, 8)})
def einsum_with_parameter(m, x):
    return torch.einsum("bnc,cd->bnd", m.a(x).sigmoid(), m.out.weight)


@case(
    "einsum_with_ellipsis",
    tokens(),
    (8, 6),
    lambda: {"a": nn.Linear(5, 8), "b": nn.Linear(8, 6), "out": nn.Linear(6, 4)},
)
def einsum_with_ellipsis(m, x):
    return m.out(torch.einsum("...c,dc->...d", m.a(x).sigmoid(), m.b.weight).sigmoid())


# ---- norms ----------------------------------------------------------------------------------------------------------

chain(
    "batch_norm1d",
    tokens(3, 5),
    (8,),
    lambda: [nn.Conv1d(5, 8, 1), nn.BatchNorm1d(8), nn.Sigmoid(), nn.Conv1d(8, 4, 1)],
)
chain(
    "batch_norm1d_rows",
    lambda batch: torch.randn(batch, 5),
    (8,),
    lambda: [nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Sigmoid(), nn.Linear(8, 4)],
)
for dims in (2, 3):
    batch_norm = (nn.BatchNorm2d, nn.BatchNorm3d)[dims - 2]
    chain(
        f"batch_norm{dims}d",
        image(dims=dims),
        (8,),
        lambda dims=dims, norm=batch_norm: [stem(8, dims), norm(8), nn.Sigmoid(), head(8, dims)],
    )
for name, norm, groups in (
    ("batch_norm_without_weights", lambda: nn.BatchNorm2d(8, affine=False), (8,)),
    ("frozen_batch_norm", lambda: FrozenBatchNorm2d(8), (8,)),
    ("group_norm_1", lambda: nn.GroupNorm(1, 8), (8,)),
    ("group_norm_4", lambda: nn.GroupNorm(4, 12), (3,)),
    ("group_norm_of_single_channels", lambda: nn.GroupNorm(8, 8), (8,)),
    ("group_norm_of_single_channels_without_weights", lambda: nn.GroupNorm(8, 8, affine=False), (8,)),
    ("instance_norm", lambda: nn.InstanceNorm2d(8), (8,)),
    ("instance_norm_affine", lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True), (8,)),
):
    width = 12 if name == "group_norm_4" else 8
    chain(name, image(), groups, lambda norm=norm, width=width: [stem(width), norm(), nn.Sigmoid(), head(width)])
for name, norm in (
    ("layer_norm", lambda: nn.LayerNorm(8)),
    ("layer_norm_without_bias", lambda: nn.LayerNorm(8, bias=False)),
    ("rms_norm", lambda: nn.RMSNorm(8)),
    ("rms_norm_by_hand", lambda: RMSNormByHand(8)),
):
    chain(name, tokens(), (8,), lambda norm=norm: [nn.Linear(5, 8), norm(), nn.Sigmoid(), nn.Linear(8, 4)])
chain(
    "layer_norm_over_an_image",
    image(),
    (),
    lambda: [stem(), nn.LayerNorm([8, 6, 6]), nn.Sigmoid(), head()],
)


@case(
    "layer_norm_channels_last",
    image(),
    (8, 6),
    lambda: {"a": stem(), "norm": nn.LayerNorm(8), "b": nn.Linear(8, 6), "out": head(6)},
)
def layer_norm_channels_last(m, x):
    x = m.norm(m.a(x).permute(0, 2, 3, 1))
    return m.out(m.b(x).sigmoid().permute(0, 3, 1, 2))


chain(
    "layer_norm_over_an_image_without_weights",
    image(),
    (),
    lambda: [stem(), nn.LayerNorm([8, 6, 6], elementwise_affine=False), nn.Sigmoid(), head()],
)
for name, norm in (("layer_norm", nn.LayerNorm), ("rms_norm", nn.RMSNorm), ("rms_norm_by_hand", RMSNormByHand)):
    parts = [nn.Unflatten(-1, (-1, 3)), norm(3), nn.Sigmoid(), nn.Flatten(-2)]
    chain(f"{name}_of_parts", tokens(), (4,), lambda parts=parts: [nn.Linear(5, 12), *parts, nn.Linear(12, 4)])


# ---- element by element ---------------------------------------------------------------------------------------------

chain("prelu_one", image(), (8,), lambda: [stem(), nn.PReLU(), head()])
chain("prelu_many", image(), (8,), lambda: [stem(), nn.PReLU(8), head()])
chain("dropout", image(), (8,), lambda: [stem(), nn.Dropout(0.5), nn.Dropout2d(0.5), head()])
chain("in_place", image(), (8,), lambda: [stem(), nn.ReLU(inplace=True), nn.Hardswish(inplace=True), head()])


@case("in_place_sums", image(), (8,), lambda: {"a": stem(), "b": stem(), "out": head()})
def in_place_sums(m, x):
    y = m.a(x)
    y += m.b(x)
    y.mul_(2).add_(1).clamp_(-1, 1)
    y[:, :, 0] = 0.0
    return m.out(y)


@case(
    "residual", image(), (8, 6), lambda: {"a": stem(), "b": nn.Conv2d(8, 6, 1), "c": nn.Conv2d(6, 8, 1), "out": head()}
)
def residual(m, x):
    x = m.a(x)
    return m.out((x + m.c(m.b(x).sigmoid())).sigmoid())


@case("branches", image(), (8,), lambda: {"a": stem(), "b": nn.Conv2d(3, 8, 3, padding=1), "out": head()})
def branches(m, x):
    return m.out((m.a(x) + m.b(x)).sigmoid())


@case(
    "squeeze_excitation",
    image(),
    (8, 5),
    lambda: {"a": stem(), "b": nn.Conv2d(8, 5, 1), "c": nn.Conv2d(5, 8, 1), "out": head()},
)
def squeeze_excitation(m, x):
    x = m.a(x)
    return m.out(x * m.c(m.b(x.mean((2, 3), keepdim=True)).relu()).sigmoid())


@case("spatial_gate", image(), (8,), lambda: {"a": stem(), "b": nn.Conv2d(8, 1, 3, padding=1), "out": head()})
def spatial_gate(m, x):
    x = m.a(x)
    return m.out(x * m.b(x).sigmoid())


@case(
    "layer_scale",
    tokens(),
    (8, 6),
    lambda: {
        "a": nn.Linear(5, 8),
        "b": nn.Linear(8, 6),
        "c": nn.Linear(6, 8),
        "gamma": nn.Parameter(torch.ones(8)),
        "out": nn.Linear(8, 4),
    },
)
def layer_scale(m, x):
    x = m.a(x)
    return m.out(x + m.gamma * m.c(m.b(x).sigmoid()))


@case(
    "position_and_class_token",
    tokens(),
    (8,),
    lambda: {
        "a": nn.Linear(5, 8),
        "pos": nn.Parameter(torch.ones(1, 5, 8)),
        "cls": nn.Parameter(torch.ones(1, 1, 8)),
        "out": nn.Linear(8, 4),
    },
)
def position_and_class_token(m, x):
    x = torch.cat([m.cls.expand(x.shape[0], -1, -1), m.a(x)], 1) + m.pos
    return m.out(x.sigmoid()[:, 0])


@case("channel_attention_product", tokens(), (6,), lambda: {"a": nn.Linear(5, 6), "b": nn.Linear(5, 6)}, reader="all")
def channel_attention_product(m, x):
    return torch.einsum("bic,bjc->bij", m.a(x), m.b(x))


@case(
    "convolution_over_positions",
    tokens(),
    (8,),
    lambda: {"a": nn.Linear(5, 8), "mix": nn.Conv1d(4, 6, 1), "back": nn.Conv1d(6, 4, 1), "out": nn.Linear(8, 4)},
)
def convolution_over_positions(m, x):
    """A mixer of tokens: its kernel of 1 leaves the channels, which lie where others have positions, alone."""
    return m.out(m.a(x) + m.back(m.mix(m.a(x)).sigmoid()))


@case(
    "linear_over_positions",
    tokens(),
    (8,),
    lambda: {"a": nn.Linear(5, 8), "mix": nn.Linear(4, 6), "back": nn.Linear(6, 4), "out": nn.Linear(8, 4)},
)
def linear_over_positions(m, x):
    return m.out(m.a(x) + m.back(m.mix(m.a(x).mT).sigmoid()).mT)


@case(
    "convolution_along_channels",
    image(),
    (6,),
    lambda: {"a": stem(), "eca": nn.Conv1d(1, 1, 3, padding=1, bias=False), "b": nn.Conv2d(8, 6, 1), "out": head(6)},
)
def convolution_along_channels(m, x):
    """Efficient channel attention: each channel's gate is computed from its neighbours'."""
    x = m.a(x)
    gate = m.eca(x.mean((2, 3))[:, None]).sigmoid()[:, 0, :, None, None]
    return m.out(m.b(x * gate).sigmoid())


@case(
    "grouped_convolution_over_positions",
    tokens(),
    (8,),
    lambda: {"a": nn.Linear(5, 8), "mix": nn.Conv1d(4, 6, 1, groups=2), "out": nn.Linear(8, 4)},
)
def grouped_convolution_over_positions(m, x):
    return m.out(m.mix(m.a(x)).sigmoid())


@case("norm_over_positions", tokens(), (8,), lambda: {"a": nn.Linear(5, 8), "out": nn.Linear(8, 4)})
def norm_over_positions(m, x):
    return m.out(functional.batch_norm(m.a(x), torch.zeros(4).double(), torch.ones(4).double()))


@case("unit_length", image(), (8,), lambda: {"a": stem(), "out": head()}, reader="all")
def unit_length(m, x):
    return m.out(functional.normalize(m.a(x), dim=1))


@case("unit_length_of_parts", tokens(), (4,), lambda: {"a": nn.Linear(5, 12), "out": nn.Linear(12, 4)}, {"width": 3})
def unit_length_of_parts(m, x):
    return m.out(functional.normalize(m.a(x).unflatten(-1, (-1, m.width)), dim=-1).flatten(-2))


@case("maximum_over_channels", image(), (8,), lambda: {"a": stem(), "out": head()}, reader="all")
def maximum_over_channels(m, x):
    """Of squares: that of a removed channel, a zero, is none of them."""
    return m.out(m.a(x)) * m.a(x).square().amax(1, keepdim=True)


@case("width_in_the_code", image(), (), lambda: {"a": stem(), "out": head()})
def width_in_the_code(m, x):
    x = m.a(x)
    return m.out(x / x.shape[1] ** 0.5)


@pytest.mark.parametrize("each", CASES, ids=str)
def test_the_cut_model_computes_what_the_dense_one_does_with_zeroed_readers(each):
    check(each)


# ---- what stays, and why --------------------------------------------------------------------------------------------


@torch.library.custom_op("graph_tests::noisy", mutates_args=())
def noisy(x: torch.Tensor) -> torch.Tensor:
    return x + torch.rand_like(x)


class Noise(nn.Module):
    def forward(self, x):
        return noisy(x)


def reasons(graph, axis):
    return [(count, why) for each, count, why in graph.frozen() if str(each) == axis]


def test_an_operation_without_a_rule_freezes_what_it_touches_and_is_named_with_its_module():
    layers = {"a": stem(), "noise": Noise(), "b": nn.Conv2d(8, 6, 1), "out": head(6)}
    model = nn.Sequential(OrderedDict(layers)).double()
    graph = ChannelGraph.trace(model, torch.randn(1, 3, 4, 4).double())
    assert list(graph.groups) == ["b.weight:0"]
    assert reasons(graph, "a.weight:0") == [(8, "an operation without a rule, at noisy in noise")]
    assert reasons(graph, "b.weight:1") == [(8, "meets an input of fixed size, at conv2d in b")]


@dataclass
class Answer:
    logits: torch.Tensor


@pytest.mark.parametrize("wrap", [lambda y: y, lambda y: (y,), lambda y: {"logits": [y]}, Answer])
def test_outputs_stay(wrap):
    model = Calls(lambda m, x: wrap(m.out(m.a(x))), {"a": stem(), "out": head()}, {})
    graph = ChannelGraph.trace(model, torch.randn(1, 3, 4, 4))
    assert list(graph.groups) == ["a.weight:0"]
    assert reasons(graph, "out.weight:0") == [(4, "is an output")]


def test_a_depthwise_transposed_convolution_with_a_multiplier_stays():
    model = nn.Sequential(stem(), nn.ConvTranspose2d(8, 16, 3, groups=8), head(16))
    graph = ChannelGraph.trace(model, torch.randn(1, 3, 4, 4))
    assert not graph.groups
    assert "with a multiplier, at conv_transpose2d in 1" in reasons(graph, "0.weight:0")[0][1]


def test_kernels_stay():
    graph = ChannelGraph.trace(nn.Sequential(nn.Conv2d(3, 8, 3), head()), torch.randn(1, 3, 4, 4))
    assert reasons(graph, "0.weight:2") == reasons(graph, "0.weight:3") == [(3, "is a kernel's axis, at conv2d in 0")]


def on_a_side_branch(function, width):
    """Two branches: one is cut, the other meets a function that a cut would change."""
    layers = {"a": nn.Linear(5, 8), "b": nn.Linear(5, 6), "out": nn.Linear(8, 4), "side": nn.Linear(width, 4)}
    return Calls(lambda m, x: m.out(m.a(x)) * m.side(function(m.b(x))), layers, {})


REASONS = {
    "is summed with a tensor of fixed size, at matmul in the model": (lambda y: y @ torch.ones(6, 3), 3),
    "cumprod over channels, at cumprod in the model": (lambda y: y.cumprod(-1), 6),
    "a norm's statistics are over channels, at batch_norm in the model": (
        lambda y: functional.batch_norm(y[:, None], torch.zeros(1), torch.ones(1), training=True)[:, 0],
        6,
    ),
    "a norm's statistics are over channels, at instance_norm in the model": (
        lambda y: functional.instance_norm(y[:, None])[:, 0],
        6,
    ),
    "a norm's statistics are over channels, at group_norm in the model": (
        lambda y: functional.group_norm(y[:, None], 1)[:, 0],
        6,
    ),
    "argmax over channels, at argmax in the model": (lambda y: y + y.argmax(-1, keepdim=True), 6),
    "the channel's number in max over channels, at max in the model": (lambda y: y + y.max(-1, True)[1], 6),
    "a topk over channels, at topk in the model": (lambda y: y.topk(3).values, 3),
    "is picked from by number, at index in the model": (lambda y: y[:, torch.tensor([1, 4]) + 1], 2),
    "is cut into unequal pieces, at chunk in the model": (lambda y: y[:, :5].chunk(2, -1)[0], 3),
    "its values become numbers, at bucketize in the model": (lambda y: torch.bucketize(y, torch.zeros(1)).float(), 6),
    "an operation without a rule, at cdist in the model": (lambda y: torch.cdist(y, y), 2),
}


@pytest.mark.parametrize("why", REASONS)
def test_what_stays_says_why(why):
    graph = ChannelGraph.trace(on_a_side_branch(*REASONS[why]), torch.randn(2, 5))
    assert list(graph.groups) == ["a.weight:0"]
    assert why in [each for _, each in reasons(graph, "b.weight:0")]


@pytest.mark.parametrize("window", [{"kernel_size": 3, "padding": 1}, {"kernel_size": 1, "stride": 2, "padding": 4}])
def test_a_convolution_along_channels_says_so(window):
    """The second one gives as many numbers as it gets, and yet each from another place."""
    layers = {"a": stem(), "eca": nn.Conv1d(1, 1, **window, bias=False), "b": nn.Conv2d(8, 6, 1), "out": head(6)}
    graph = ChannelGraph.trace(Calls(convolution_along_channels, layers, {}), torch.randn(1, 3, 4, 4))
    assert reasons(graph, "a.weight:0") == [(8, "a convolution slides along channels, at conv1d in eca")]


def split_by_the_code(m, x):
    scaled = (m.a.weight * 2).view(2, 4, 5).flatten(0, 1)
    return m.out(m.a(x) * functional.linear(x, scaled))


def test_a_computed_weight_whose_axis_is_split_stays():
    model = Calls(split_by_the_code, {"a": nn.Linear(5, 8), "out": nn.Linear(8, 4)}, {})
    graph = ChannelGraph.trace(model, torch.randn(1, 5))
    assert not graph.groups
    assert reasons(graph, "a.weight:0") == [(8, "its axis is split or merged, at view in the model")]


def test_norms_over_one_value_do_not_hinder_training_mode():
    layers = [nn.Conv2d(3, 8, 1), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4)]
    assert not ChannelGraph.trace(nn.Sequential(*layers), torch.randn(1, 3, 4, 4)).notes


def test_what_is_not_used_stays_and_is_listed():
    model = nn.Sequential(OrderedDict(a=stem(), out=head()))
    model.register_parameter("idle", nn.Parameter(torch.ones(5, 2)))
    graph = ChannelGraph.trace(model, torch.randn(1, 3, 4, 4))
    assert graph.untraced() == ["idle"]
    assert list(graph.groups) == ["a.weight:0"]


def test_a_channel_without_others_of_its_kind_stays_with_a_reason():
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.alone, self.rest = nn.Linear(4, 4), nn.Linear(2, 3), nn.Linear(3, 3)

        def forward(self, x):
            x = self.inner(x)
            return self.alone(x[:, :1].expand(-1, 2)) + self.rest(x[:, 1:])

    graph = ChannelGraph.trace(One(), torch.randn(2, 4))
    assert [len(group) for group in graph.groups.values()] == [3]
    why = "no other channel has the same axes, and one must stay"
    assert reasons(graph, "inner.weight:0") == [(1, why)]
    assert reasons(graph, "alone.weight:1") == [(2, why)]


# ---- rows that are added to rows: graph networks -------------------------------------------------------------------

EDGES = torch.randint(0, 7, (2, 20), generator=torch.Generator().manual_seed(0))
NODES = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))


def wide(to, m):
    return to[:, None].expand(-1, m.shape[1])


ADDS = {
    "index_add_": lambda z, to, m: z.index_add_(0, to, m),
    "index_add": lambda z, to, m: z.index_add(0, to, m),
    "scatter_add_": lambda z, to, m: z.scatter_add_(0, wide(to, m), m),
    "scatter_add": lambda z, to, m: z.scatter_add(-2, wide(to, m), m),
    "scatter_ with add": lambda z, to, m: z.scatter_(0, wide(to, m), m, reduce="add"),
    "scatter_reduce_ mean": lambda z, to, m: z.scatter_reduce_(0, wide(to, m), m, "mean", include_self=False),
    "scatter_reduce amax": lambda z, to, m: z.scatter_reduce(0, wide(to, m), m, "amax"),
    "index_reduce_": lambda z, to, m: z.index_reduce_(0, to, m, "mean"),
    "index_put_": lambda z, to, m: z.index_put_((to,), m, accumulate=True),
    "index_put": lambda z, to, m: z.index_put((to,), m, accumulate=True),
    "two by two": lambda z, to, m: z.new_zeros(7, 2, z.shape[1]).index_put_((to, to % 2), m, accumulate=True).sum(1),
    "a view of zeros": lambda z, to, m: z[None][0].index_add_(0, to, m),
}


class GraphNet(nn.Module):
    """Messages along edges are added at the nodes they go to."""

    def __init__(self, add):
        super().__init__()
        torch.manual_seed(0)
        self.node, self.message, self.out = nn.Linear(5, 12), nn.Linear(12, 10), nn.Linear(10, 3)
        self.add = add

    def forward(self, x, edges):
        h = self.node(x).relu()
        m = self.message(h[edges[0]])
        return self.out(self.add(h.new_zeros(len(x), m.shape[1]), edges[1], m))


@pytest.mark.filterwarnings("ignore:index_reduce", "ignore:The reduce argument")
@pytest.mark.parametrize("add", ADDS.values(), ids=ADDS)
def test_rows_added_to_rows_keep_their_channels_removable(add):
    model = GraphNet(add).double()
    graph = ChannelGraph.trace(model, (NODES.double(), EDGES))
    assert {name: len(group) for name, group in graph.groups.items()} == {"node.weight:0": 12, "message.weight:0": 10}
    done = slim_(model, graph.plan({"node.weight:0": [0, 5, 7], "message.weight:0": [1, 2, 9]}))
    assert done.difference < 1e-12 and model.out.weight.shape == (3, 7)


@pytest.mark.parametrize(
    ("add", "tied"),
    [
        (lambda h, to, m: torch.zeros_like(h).index_add_(0, to, m), True),
        (lambda h, to, m: h.clone().index_add_(0, to, m), True),
        (lambda h, to, m: h.clone().scatter_reduce(0, wide(to, m), m, "sum"), True),
        (lambda h, to, m: torch.zeros(7, m.shape[1]).double().index_add_(0, to, m).index_add_(0, to, h[to]), True),
        (lambda h, to, m: h.new_zeros(20, 12).index_add_(1, torch.arange(12).flip(0), m)[:7], False),
        (lambda h, to, m: m.clone().index_add_(1, torch.arange(12).flip(0), m)[:7], False),
        (lambda h, to, m: m.clone().index_fill_(1, torch.tensor([3]), 0.0)[:7], False),
        (lambda h, to, m: m.scatter(1, torch.zeros(20, 1, dtype=torch.int64), 2.0)[:7], False),
    ],
)
def test_what_is_added_to_channels_is_tied_to_them_and_across_channels_it_freezes(add, tied):
    class Net(GraphNet):
        def forward(self, x, edges):
            h = self.node(x).relu()
            return self.out(self.add(h, edges[1], self.message(h[edges[0]])))

    model = Net(add)
    model.message, model.out = nn.Linear(12, 12), nn.Linear(12, 3)
    model.double()
    graph = ChannelGraph.trace(model, (NODES.double(), EDGES))
    if tied:
        assert [len(group) for group in graph.groups.values()] == [12]
        assert set(graph.groups["node.weight:0"].slices[0]) >= {Axis("message.weight", 0), Axis("out.weight", 1)}
        assert slim_(model, graph.plan({"node.weight:0": [0, 4]})).difference < 1e-12
    else:
        assert "message.weight:0" not in graph.groups
        assert any("by number" in why for axis, _, why in graph.frozen() if axis == Axis("message.weight", 0))


class Dots(nn.Module):
    """Dot products of vectors, as in the old ``spectral_norm``."""

    def __init__(self, dot):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last, self.dot = nn.Linear(5, 12), nn.Linear(12, 12), nn.Linear(12, 3), dot

    def forward(self, x):
        h = self.first(x)
        return self.last(h * self.dot(self.middle, h))


@pytest.mark.parametrize(
    "dot",
    [
        lambda middle, h: torch.dot(middle.bias, middle.bias),
        lambda middle, h: torch.dot(h[0], h[1]),
        lambda middle, h: torch.dot(middle.bias, h[0]),
        lambda middle, h: torch.vdot(h[0], middle.bias),
        lambda middle, h: torch.dot(middle.bias, torch.mv(middle.weight, middle.bias)),
    ],
)
def test_dot_products_are_cut_right_or_frozen_by_name(dot):
    model = Dots(dot).double()
    graph = ChannelGraph.trace(model, NODES.double())
    assert all("does not know these" not in why and "other outputs" not in why for _, _, why in graph.frozen())
    slim_(model, graph.plan({name: [0, 3] for name in graph.groups}))


# ---- numbers that change with a cut, and matter only where an output depends on them -------------------------------


class Gated(nn.Module):
    """What ``use`` makes of the number of the largest channel beside the path to the output."""

    def __init__(self, use):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.use, self.kept = nn.Linear(5, 12), nn.Linear(12, 3), use, []

    def forward(self, x):
        h = self.first(x)
        return self.use(self, h, h.argmax(-1).to(h.dtype), self.last(h))


@pytest.mark.parametrize(
    ("use", "free"),
    [
        (lambda m, h, best, y: y, True),
        (lambda m, h, best, y: (best * 2 + 1, y)[1], True),
        (lambda m, h, best, y: m.kept.append(best.detach()) or y, True),
        (lambda m, h, best, y: (y, best), False),
        (lambda m, h, best, y: {"y": y, "aux": best.square().sum()}, False),
        (lambda m, h, best, y: y * best[:, None], False),
        (lambda m, h, best, y: m.last(h * best.sigmoid()[:, None]), False),
        (lambda m, h, best, y: y[best.argsort()], False),
        (lambda m, h, best, y: y[: 1 + int(best[0] > 0)], False),
        (lambda m, h, best, y: y if best.sum() > 30 else -y, False),
        (lambda m, h, best, y: torch.zeros_like(y).copy_(best[:, None]) + y, False),
        (lambda m, h, best, y: y.masked_fill(best[:, None] > 0, 0.0), False),
        (lambda m, h, best, y: torch.stack([best, best]).max(0)[0][:, None] + y, False),
    ],
)
def test_the_number_of_a_channel_freezes_them_only_where_an_output_depends_on_it(use, free):
    model = Gated(use).double()
    graph = ChannelGraph.trace(model, NODES.double())
    why = {reason for axis, _, reason in graph.frozen() if axis == Axis("first.weight", 0)}
    if free:
        assert len(graph.groups["first.weight:0"]) == 12 and not why
        slim_(model, graph.plan({"first.weight:0": [0, 3]}))
    else:
        assert not graph.groups and "argmax over channels, at argmax in the model" in why


@pytest.mark.parametrize(
    "reduce",
    [
        lambda both: torch.stack(both).mean(0),
        lambda both: torch.stack(both, 1).sum(1),
        lambda both: torch.stack(both, -1).amax(-1),
        lambda both: torch.stack(both).max(0)[0],
        lambda both: torch.stack(both).var(0),
        lambda both: torch.stack(both).prod(0),
        lambda both: (torch.stack(both) * torch.stack(both).mean(1, keepdim=True).softmax(0)).sum(0),
    ],
)
def test_branches_that_are_stacked_and_reduced_lose_the_same_channels(reduce):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.out = nn.Linear(5, 12), nn.Linear(5, 12), nn.Linear(12, 3)

        def forward(self, x):
            return self.out(reduce([self.a(x), self.b(x).relu()]))

    model = Branches().double()
    graph = ChannelGraph.trace(model, NODES.double())
    assert [len(group) for group in graph.groups.values()] == [12]
    assert set(graph.groups["a.weight:0"].slices[0]) >= {Axis("b.weight", 0), Axis("out.weight", 1)}
    assert slim_(model, graph.plan({"a.weight:0": [0, 7, 8]})).difference < 1e-12
