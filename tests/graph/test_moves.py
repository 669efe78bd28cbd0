"""Channels that are joined, taken apart and moved: each pattern as one tiny model that is cut at random."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.support.graph_reference import Case, case_maker, check, head, image, stem, tokens

CASES: list[Case] = []
case, chain = case_maker(CASES)


# ---- joined and taken apart -----------------------------------------------------------------------------------------


@case("concat", image(), (4, 6), lambda: {"a": stem(4), "b": stem(6), "out": head(10)})
def concat(m, x):
    return m.out(torch.cat([m.a(x), m.b(x)], 1).sigmoid())


@case("stack", image(), (4,), lambda: {"a": stem(4), "b": stem(4), "out": head(4)})
def stack(m, x):
    return m.out(torch.stack([m.a(x).sigmoid(), m.b(x)]).sum(0))


@case(
    "concat_of_positions", tokens(), (8,), lambda: {"a": nn.Linear(5, 8), "b": nn.Linear(5, 8), "out": nn.Linear(8, 4)}
)
def concat_of_positions(m, x):
    return m.out(torch.cat([m.a(x), m.b(x)], 1).sigmoid())


@case("chunk", image(), (4, 4, 4), lambda: {"a": stem(8), "b": nn.Conv2d(4, 4, 1), "out": head(12)})
def chunk(m, x):
    first, second = m.a(x).chunk(2, 1)
    return m.out(torch.cat([first, second, m.b(second)], 1).sigmoid())


@case("chunk_into_unequal_pieces", image(), (), lambda: {"a": stem(9), "b": head(5), "out": head(4)})
def chunk_into_unequal_pieces(m, x):
    first, second = m.a(x).chunk(2, 1)
    return m.b(first) + m.out(second)


@case("gated_by_chunk", image(), (4,), lambda: {"a": stem(8), "out": head(4)})
def gated_by_chunk(m, x):
    first, second = m.a(x).chunk(2, 1)
    return m.out(first * second.sigmoid())


@case("glu", tokens(), (4,), lambda: {"a": nn.Linear(5, 8), "out": nn.Linear(4, 4)})
def glu(m, x):
    return m.out(functional.glu(m.a(x)))


@case("split_by_attribute", image(), (3, 5), lambda: {"a": stem(8), "b": head(3), "out": head(5)}, {"parts": [3, 5]})
def split_by_attribute(m, x):
    first, second = m.a(x).sigmoid().split(m.parts, 1)
    return m.b(first) + m.out(second)


@case("split_by_number", image(), (4, 4), lambda: {"a": stem(8), "b": head(4), "out": head(4)}, {"c": 4})
def split_by_number(m, x):
    first, second = m.a(x).sigmoid().split(m.c, 1)
    return m.b(first) + m.out(second)


@case("slices_by_attribute", image(), (3, 5), lambda: {"a": stem(8), "b": head(3), "out": head(5)}, {"c": 3})
def slices_by_attribute(m, x):
    x = m.a(x).sigmoid()
    return m.b(x[:, : m.c]) + m.out(x[:, m.c :])


@case("slices_by_literal", image(), (5,), lambda: {"a": stem(8), "b": head(3), "out": head(5)})
def slices_by_literal(m, x):
    x = m.a(x).sigmoid()
    return m.b(x[:, :3]) + m.out(x[:, 3:])


@case("slices_by_shape", image(), (4, 4), lambda: {"a": stem(8), "b": head(4), "out": head(4)})
def slices_by_shape(m, x):
    x = m.a(x).sigmoid()
    c = x.shape[1] // 2
    return m.b(x[:, :c]) + m.out(x[:, c:])


@case("unbind", tokens(), (8,), lambda: {"a": nn.Linear(5, 8), "out": nn.Linear(8, 4)})
def unbind(m, x):
    first, second, *_ = m.a(x).sigmoid().unbind(1)
    return m.out(first * second)


@case(
    "option_a_shortcut", image(4), (), lambda: {"a": nn.Conv2d(4, 4, 1), "b": nn.Conv2d(4, 8, 3, 2, 1), "out": head()}
)
def option_a_shortcut(m, x):
    x = m.a(x)
    return m.out((functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)) + m.b(x)).sigmoid())


@case("written_by_slices", image(), (4, 4), lambda: {"a": stem(4), "b": stem(4), "out": head()})
def written_by_slices(m, x):
    first, second = m.a(x), m.b(x)
    c = first.shape[1]
    both = x.new_zeros(x.shape[0], c + second.shape[1], *x.shape[2:])
    both[:, :c] = first
    both[:, c:] = second
    return m.out(both.sigmoid())


@case("written_by_literal_slices", image(), (), lambda: {"a": stem(4), "b": stem(4), "out": head()})
def written_by_literal_slices(m, x):
    both = x.new_zeros(x.shape[0], 8, *x.shape[2:])
    both[:, :4] = m.a(x)
    both[:, 4:] = m.b(x)
    return m.out(both.sigmoid())


@case("gated_by_slices", image(), (4,), lambda: {"a": stem(), "out": head(4)})
def gated_by_slices(m, x):
    x = m.a(x)
    c = x.shape[1] // 2
    return m.out(x[:, :c] * x[:, c:].sigmoid())


@case(
    "products_of_all_channels",
    tokens(),
    (8,),
    lambda: {"a": nn.Linear(5, 8), "b": nn.Linear(5, 6), "out": nn.Linear(48, 4)},
)
def products_of_all_channels(m, x):
    return m.out((m.a(x)[..., :, None] * m.b(x)[..., None, :]).flatten(-2).sigmoid())


@case("unfolded", image(), (8,), lambda: {"a": stem(), "out": nn.Linear(32, 4)})
def unfolded(m, x):
    return m.out(functional.unfold(m.a(x), 2, stride=2).sigmoid().transpose(1, 2))


# ---- moved ----------------------------------------------------------------------------------------------------------

chain("flatten", image(size=3), (6,), lambda: [stem(6), nn.Sigmoid(), nn.Flatten(), nn.Linear(54, 4)])
chain("unflatten", tokens(), (3,), lambda: [nn.Linear(5, 6), nn.Unflatten(-1, (2, 3)), nn.Sigmoid(), nn.Linear(3, 4)])
chain("pixel_shuffle", image(), (3,), lambda: [stem(12), nn.PixelShuffle(2), nn.Sigmoid(), head(3)])
chain("pixel_unshuffle", image(), (4,), lambda: [stem(4), nn.PixelUnshuffle(2), nn.Sigmoid(), head(16)])
chain("channel_shuffle", image(), (4,), lambda: [stem(), nn.ChannelShuffle(2), nn.Sigmoid(), head()])


@case("channel_shuffle_by_hand", image(), (4,), lambda: {"a": stem(), "out": head()})
def channel_shuffle_by_hand(m, x):
    x = m.a(x).sigmoid()
    b, c, h, w = x.shape
    return m.out(x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w))


@case("flatten_with_literal", image(size=3), (), lambda: {"a": stem(6), "out": nn.Linear(54, 4)})
def flatten_with_literal(m, x):
    return m.out(m.a(x).sigmoid().reshape(-1, 54))


@case("permute", image(), (8,), lambda: {"a": stem(), "out": nn.Linear(8, 4)})
def permute(m, x):
    return m.out(m.a(x).sigmoid().permute(0, 2, 3, 1))


@case("folded_into_the_batch", image(), (4,), lambda: {"a": stem(), "out": head(4)})
def folded_into_the_batch(m, x):
    x = m.a(x).sigmoid()
    return m.out(x.reshape(2 * x.shape[0], -1, *x.shape[2:]))


@case("rows_overwritten", image(), (8,), lambda: {"a": stem(), "b": stem(), "out": head()})
def rows_overwritten(m, x):
    y = m.a(x).sigmoid()
    y[:, :, 0] = m.b(x)[:, :, 0]
    return m.out(y)


@case("windows", image(), (8,), lambda: {"a": stem(), "out": nn.Linear(8, 4)}, {"window": 2})
def windows(m, x):
    x = m.a(x).permute(0, 2, 3, 1).roll((-1, -1), (1, 2))
    b, h, w, c = x.shape
    x = x.view(b, h // m.window, m.window, w // m.window, m.window, c).permute(0, 1, 3, 2, 4, 5)
    return m.out(x.reshape(-1, m.window**2, c).sigmoid())


@case("focus", image(), (4,), lambda: {"a": stem(4), "out": head(16)})
def focus(m, x):
    x = m.a(x)
    parts = [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]]
    return m.out(torch.cat(parts, 1).sigmoid())


@case("padded", image(), (8,), lambda: {"a": stem(), "out": nn.Conv2d(8, 4, 3)})
def padded(m, x):
    x = functional.pad(m.a(x), (1, 2, 0, 1), value=0.5)
    return m.out(
        functional.pad(functional.pad(x, (1, 1, 1, 1), mode="reflect"), (1, 1, 1, 1), mode="replicate").sigmoid()
    )


for mode in ("nearest", "bilinear"):
    chain(
        f"upsampled_{mode}", image(), (8,), lambda mode=mode: [stem(), nn.Upsample(scale_factor=2, mode=mode), head()]
    )
chain(
    "pooled",
    image(8),
    (8,),
    lambda: [nn.Conv2d(8, 8, 1), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Sigmoid(), head()],
)


# ---- by number: what is before the number stays, or everything ------------------------------------------------------


@case("first_channel_gates", image(), (7,), lambda: {"a": stem(), "out": head()})
def first_channel_gates(m, x):
    x = m.a(x).sigmoid()
    return m.out(x * x[:, :1])


@case("one_channel_by_number", image(), (5,), lambda: {"a": stem(), "out": head()})
def one_channel_by_number(m, x):
    x = m.a(x).sigmoid()
    return m.out(x) * x[:, 2].mean()


@case("last_channel_by_number", image(), (7,), lambda: {"a": stem(), "out": head()})
def last_channel_by_number(m, x):
    x = m.a(x).sigmoid()
    return m.out(x) * x[:, -1].mean()


@case("every_second_channel", image(), (), lambda: {"a": stem(4), "b": head(2), "out": head(2)})
def every_second_channel(m, x):
    x = m.a(x).sigmoid()
    return m.b(x[:, ::2]) + m.out(x[:, 1::2])


@case("channels_by_a_list", image(), (4,), lambda: {"a": stem(), "out": head(2)})
def channels_by_a_list(m, x):
    return m.out(m.a(x)[:, [0, 3]])


@case("rolled_channels", image(), (), lambda: {"a": stem(), "out": head()})
def rolled_channels(m, x):
    return m.out(m.a(x).sigmoid().roll(3, 1))


@case("flipped_channels", image(), (8,), lambda: {"a": stem(), "out": head()})
def flipped_channels(m, x):
    return m.out(m.a(x).sigmoid().flip(1))


@case("repeated_channels", image(), (8,), lambda: {"a": stem(), "out": head(16), "b": head(16)})
def repeated_channels(m, x):
    x = m.a(x).sigmoid()
    return m.out(x.repeat(1, 2, 1, 1)) + m.b(x.repeat_interleave(2, 1))


@case("neighbours", image(), (), lambda: {"a": stem(), "out": head(7)})
def neighbours(m, x):
    x = m.a(x).sigmoid()
    return m.out(x[:, 1:] - x[:, :-1])


@pytest.mark.parametrize("each", CASES, ids=str)
def test_the_cut_model_computes_what_the_dense_one_does_with_zeroed_readers(each):
    check(each)
