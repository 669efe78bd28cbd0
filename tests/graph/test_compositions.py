"""Random nets of random blocks: what holds for each operation alone holds for what they make together."""

import random
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.support.graph_reference import Calls, Case, check, image

# A block is made for a number of channels; it gives the module and how many channels that returns.


def of(function, width, numbers=None, **layers):
    return Calls(function, layers, numbers or {}), width


def convolution(c, rng, **options):
    width = rng.choice([4, 6, 8])
    return nn.Conv2d(c, width, 3, padding=1, **options), width


def same(kind, c, rng):
    return kind(c), c


def activation(c, rng):
    return rng.choice([nn.ReLU(), nn.Sigmoid(), nn.PReLU(c), nn.PReLU()]), c


def depthwise(c, rng, multiplier=1):
    return nn.Conv2d(c, c * multiplier, 3, padding=1, groups=c), c * multiplier


def grouped(c, rng):
    return nn.Conv2d(c, 8, 1, groups=2), 8


def bottleneck(c, rng):
    return of(lambda m, x: x + m.b(m.a(x).sigmoid()), c, a=nn.Conv2d(c, 6, 1), b=nn.Conv2d(6, c, 1))


def beside(c, rng):
    return of(lambda m, x: torch.cat([m.a(x), x.sigmoid(), m.a(x).relu()], 1), c + 8, a=nn.Conv2d(c, 4, 1))


def excited(c, rng):
    def forward(m, x):
        return x * m.b(m.a(x.mean((2, 3), keepdim=True)).relu()).sigmoid()

    return of(forward, c, a=nn.Conv2d(c, 4, 1), b=nn.Conv2d(4, c, 1))


def gated(c, rng):
    return of(lambda m, x: x * m.a(x).sigmoid(), c, a=nn.Conv2d(c, 1, 1))


def chunked(c, rng):
    def forward(m, x):
        first, second = x.chunk(2, 1)
        return torch.cat([first, second, m.a(second)], 1)

    return of(forward, c // 2 * 3, a=nn.Conv2d(c // 2, c // 2, 1))


def halved(c, rng):
    return of(lambda m, x: functional.glu(x, 1), c // 2)


def parted(c, rng):
    def forward(m, x):
        first, second = x.split(m.parts, 1)
        return torch.cat([m.a(first), second], 1)

    return of(forward, 4 + c - c // 3, {"parts": [c // 3, c - c // 3]}, a=nn.Conv2d(c // 3, 4, 1))


def shuffled(c, rng):
    def forward(m, x):
        return x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)

    return rng.choice([nn.ChannelShuffle(2), of(forward, c)[0]]), c


def channels_last(c, rng):
    def forward(m, x):
        return m.linear(m.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)

    return of(forward, 6, norm=nn.LayerNorm(c), linear=nn.Linear(c, 6))


def shrunk_and_grown(c, rng):
    return nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * c, 16, 1), nn.PixelShuffle(2)), 4


def turned(c, rng):
    return nn.Sequential(nn.MaxPool2d(2), nn.ConvTranspose2d(c, 6, 2, 2)), 6


def attention(c, rng):
    def forward(m, x):
        b, _, h, w = x.shape
        qkv = m.qkv(x.flatten(2).transpose(1, 2)).view(b, h * w, 3, -1, m.head_dim).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2)
        return x + m.out(y).transpose(1, 2).view(b, -1, h, w)

    return of(forward, c, {"head_dim": 3}, qkv=nn.Linear(c, 36), out=nn.Linear(12, c))


def multihead(c, rng):
    def forward(m, x):
        y = x.flatten(2).transpose(1, 2)
        return x + m.attention(y, y, y, need_weights=False)[0].transpose(1, 2).reshape(x.shape)

    return of(forward, c, attention=nn.MultiheadAttention(c, 2, batch_first=True))


def recurrent(c, rng):
    def forward(m, x):
        b, _, h, w = x.shape
        return m.lstm(x.flatten(2).transpose(1, 2))[0].transpose(1, 2).view(b, -1, h, w)

    return of(forward, 6, lstm=nn.LSTM(c, 3, batch_first=True, bidirectional=True))


def twice(c, rng):
    return of(lambda m, x: m.a(m.a(x).relu()), c, a=nn.Conv2d(c, c, 1))


NORMS = [
    partial(same, nn.BatchNorm2d),
    partial(same, partial(nn.GroupNorm, 1)),
    partial(same, partial(nn.GroupNorm, 2)),
]
EVEN = [NORMS[2], grouped, chunked, halved, shuffled, multihead]
BLOCKS = [
    convolution,
    activation,
    depthwise,
    partial(depthwise, multiplier=2),
    bottleneck,
    beside,
    excited,
    gated,
    parted,
]
BLOCKS += [channels_last, shrunk_and_grown, turned, attention, recurrent, twice, *NORMS, *EVEN]


def net(seed):
    """Even channels for blocks that halve them, and few enough channels everywhere."""
    rng, c, layers = random.Random(seed), 8, [nn.Conv2d(3, 8, 1)]
    for _ in range(rng.randrange(3, 9)):
        block = rng.choice([each for each in BLOCKS if c % 2 == 0 or each not in EVEN] if c < 30 else [convolution])
        layer, c = block(c, rng)
        layers.append(layer)
    return nn.Sequential(*layers, nn.Conv2d(c, 4, 1))


@pytest.mark.parametrize("seed", range(40))
def test_random_nets(seed):
    check(Case(str(seed), partial(net, seed), image(size=4), None))
