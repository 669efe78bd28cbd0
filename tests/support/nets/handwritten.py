"""Nets as people write them by hand: statistics over channels, computed weights, states, gates, experts, slices."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

HANDWRITTEN: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], float]] = {}
"""Name -> what builds it, its inputs, and the share of the multiply-adds that a cut of all it can must fall below."""


def net(left: float, inputs: Callable[[], Any]) -> Callable[[Any], Any]:
    """Registers a net by the name of its class or function."""

    def register(build: Any) -> Any:
        HANDWRITTEN[build.__name__] = (build, inputs, left)
        return build

    return register


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _words_of(count: int, length: int = 8) -> Tensor:
    return torch.randint(0, count, (2, length), generator=torch.Generator().manual_seed(0))


def image() -> Tensor:
    return _random(2, 3, 16, 16)


def rows() -> Tensor:
    return _random(4, 16)


def tokens() -> Tensor:
    return _random(2, 6, 16)


class Function(nn.Module):
    """A plain function as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


# ---- statistics over channels ---------------------------------------------------------------------------------------


class NormByHand(nn.Module):
    """A layer norm over the last dimension, written by hand in three ways."""

    def __init__(self, width: int, way: str) -> None:
        super().__init__()
        self.weight, self.bias, self.way = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width)), way

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        if self.way == "squares":
            scaled = (x - mean) / torch.sqrt(((x - mean) ** 2).mean(-1, keepdim=True) + 1e-5)
        elif self.way == "std":
            scaled = (x - mean) / (x.std(-1, keepdim=True) + 1e-5)
        else:
            variance, mean = torch.var_mean(x, -1, keepdim=True, unbiased=False)
            scaled = (x - mean) * torch.rsqrt(variance + 1e-5)
        return self.weight * scaled + self.bias


def _with_norms(way: str) -> nn.Module:
    norm = lambda: NormByHand(32, way)  # noqa: E731
    return nn.Sequential(nn.Linear(16, 32), norm(), nn.ReLU(), nn.Linear(32, 32), norm(), nn.Linear(32, 4))


@net(0.1, rows)
def layer_norm_by_squares() -> nn.Module:
    return _with_norms("squares")


@net(0.1, rows)
def layer_norm_by_std() -> nn.Module:
    return _with_norms("std")


@net(0.1, rows)
def layer_norm_by_var_mean() -> nn.Module:
    return _with_norms("var_mean")


class NormOfImages(nn.Module):
    """ConvNeXt's own: over dimension 1, with a weight that lies there."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(1, keepdim=True)
        return self.weight * x / torch.sqrt(x.pow(2).mean(1, keepdim=True) + 1e-6) + self.bias


@net(0.1, image)
def layer_norm_of_images() -> nn.Module:
    layers = [nn.Conv2d(3, 16, 3), NormOfImages(16), nn.ReLU(), nn.Conv2d(16, 32, 3), NormOfImages(32)]
    return nn.Sequential(*layers, nn.Conv2d(32, 4, 1))


class SpatialGate(nn.Module):
    """CBAM's: from the mean and the maximum over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)
        return x * self.conv(both).sigmoid()


@net(0.1, image)
def cbam() -> nn.Module:
    layers = [nn.Conv2d(3, 32, 3), nn.ReLU(), SpatialGate(), nn.Conv2d(32, 32, 3), nn.ReLU(), SpatialGate()]
    return nn.Sequential(*layers, nn.Conv2d(32, 4, 1))


class ResponseNorm(nn.Module):
    """ConvNeXt V2's global response normalisation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 1, 1, channels))
        self.bias = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        size = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        return self.weight * (x * size / (size.mean(-1, keepdim=True) + 1e-6)) + self.bias + x


@net(0.1, lambda: _random(2, 6, 6, 3))
def global_response_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 32), nn.ReLU(), ResponseNorm(32), nn.Linear(32, 4))


@net(0.1, image)
def softmax_over_channels() -> nn.Module:
    return _between(lambda x: x.softmax(1))


# ---- computed weights -----------------------------------------------------------------------------------------------


class Standardized(nn.Conv2d):
    """Weight standardization: by mean and std, of a view, or by a batch norm of the weight as timm does it."""

    way = "mean and std"

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.way == "mean and std":
            mean, std = weight.mean((1, 2, 3), keepdim=True), weight.std((1, 2, 3), keepdim=True)
            weight = (weight - mean) / (std + 1e-5)
        elif self.way == "view":
            weight = weight - weight.mean(1, keepdim=True).mean(2, keepdim=True).mean(3, keepdim=True)
            weight = weight / (weight.view(weight.size(0), -1).std(1).view(-1, 1, 1, 1) + 1e-5)
        else:
            flat = weight.reshape(1, self.out_channels, -1)
            weight = functional.batch_norm(flat, None, None, training=True, momentum=0.0).reshape_as(weight)
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def _standardized(way: str) -> nn.Module:
    first, second = Standardized(3, 16, 3), Standardized(16, 32, 3)
    first.way = second.way = way
    norms = nn.GroupNorm(4, 16), nn.GroupNorm(4, 32)
    return nn.Sequential(first, norms[0], nn.ReLU(), second, norms[1], nn.ReLU(), nn.Conv2d(32, 4, 1))


@net(0.1, image)
def weight_standardization() -> nn.Module:
    return _standardized("mean and std")


@net(0.1, image)
def weight_standardization_of_a_view() -> nn.Module:
    return _standardized("view")


@net(0.1, image)
def weight_standardization_by_batch_norm() -> nn.Module:
    return _standardized("batch norm")


def _normed(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    convs = [norm(nn.Conv2d(*sizes)) for sizes in ((3, 32, 3), (32, 32, 3), (32, 4, 1))]
    return nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])


@net(0.1, image)
def spectral_norm() -> nn.Module:
    return _normed(parametrizations.spectral_norm)


@net(0.1, image)
def spectral_norm_of_old() -> nn.Module:
    return _normed(nn.utils.spectral_norm)


@net(0.1, image)
def weight_norm() -> nn.Module:
    return _normed(parametrizations.weight_norm)


# ---- states ---------------------------------------------------------------------------------------------------------


class ConvCell(nn.Module):
    """One step of a convolutional LSTM."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.hidden, self.conv = hidden, nn.Conv2d(channels + hidden, 4 * hidden, 3, padding=1)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        i, f, o, g = torch.split(self.conv(torch.cat([x, h], 1)), self.hidden, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


@net(0.1, lambda: _random(2, 3, 3, 8, 8))
class ConvLSTM(nn.Module):
    """The first states are zeros; the first cell reads them beside an image that has no channels to cut."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleList([ConvCell(3, 24), ConvCell(24, 32)])
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        states = [2 * (torch.zeros(len(x), each.hidden, *x.shape[-2:], dtype=x.dtype),) for each in self.cells]
        for step in x.unbind(1):
            for at, cell in enumerate(self.cells):
                states[at] = cell(step, *states[at])
                step = states[at][0]
        return self.head(step.mean((2, 3)))


class Mamba(nn.Module):
    """A selective state space cell, with the recurrence in a loop."""

    def __init__(self, width: int = 32, states: int = 8, rank: int = 4) -> None:
        super().__init__()
        self.inner, self.states, self.rank = 2 * width, states, rank
        self.in_proj = nn.Linear(width, 2 * self.inner, bias=False)
        self.conv = nn.Conv1d(self.inner, self.inner, 4, groups=self.inner, padding=3)
        self.x_proj = nn.Linear(self.inner, rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(rank, self.inner)
        self.log_a = nn.Parameter(torch.log(torch.arange(1, states + 1).float().repeat(self.inner, 1)))
        self.skip = nn.Parameter(torch.ones(self.inner))
        self.out_proj = nn.Linear(self.inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        u, gate = self.in_proj(x).split([self.inner, self.inner], -1)
        u = functional.silu(self.conv(u.transpose(1, 2))[:, :, :length].transpose(1, 2))
        step, b, c = self.x_proj(u).split([self.rank, self.states, self.states], -1)
        step = functional.softplus(self.dt_proj(step))
        decay = torch.exp(torch.einsum("bld,dn->bldn", step, -torch.exp(self.log_a)))
        given = torch.einsum("bld,bln,bld->bldn", step, b, u)
        h, out = torch.zeros(batch, self.inner, self.states, dtype=x.dtype), []
        for t in range(length):
            h = decay[:, t] * h + given[:, t]
            out.append(torch.einsum("bdn,bn->bd", h, c[:, t]))
        return self.out_proj((torch.stack(out, 1) + u * self.skip) * functional.silu(gate))


@net(0.1, lambda: _words_of(40))
class MambaModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(40, 32), nn.Linear(32, 40)
        self.cells = nn.ModuleList(Mamba() for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for each in self.cells:
            x = x + each(x)
        return self.head(x)


# ---- attention and products -----------------------------------------------------------------------------------------


@net(0.1, lambda: (_words_of(50), _words_of(50, 6)))
class EncoderDecoder(nn.Module):
    """``nn.Transformer`` with a mask of padding, which it checks before it computes anything."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 32), nn.Linear(32, 50)
        self.transformer = nn.Transformer(32, 4, 2, 2, 64, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        x, y = self.embedding(source), self.embedding(target)
        causal = nn.Transformer.generate_square_subsequent_mask(y.shape[1], dtype=y.dtype)
        return self.head(self.transformer(x, y, src_key_padding_mask=source == 0, tgt_mask=causal))


@net(0.3, tokens)
class LinearAttention(nn.Module):
    """An einsum of three operands."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(16, 32) for _ in range(3))
        self.heads, self.head_dim, self.out = 4, 8, nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(*x.shape[:2], self.heads, self.head_dim) for f in (self.query, self.key, self.value))
        return self.out(torch.einsum("bnhd,bmhd,bmhe->bnhe", q.softmax(-1), k.softmax(1), v).flatten(2))


@net(0.1, rows)
class Bilinear(nn.Module):
    """A weight between two activations, in one einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(16, 32), nn.Linear(16, 24), nn.Linear(20, 4)
        self.weight = nn.Parameter(_random(20, 32, 24) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.einsum("bi,oij,bj->bo", self.first(x), self.weight, self.second(x)))


@net(0.1, tokens)
class HeadsInTheWeight(nn.Module):
    """Attention whose weights have an axis of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(16, 24), nn.Linear(24, 3)
        self.query, self.key, self.value = (nn.Parameter(_random(4, 24, 8) * 0.2) for _ in range(3))
        self.out = nn.Parameter(_random(4, 8, 24) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        q, k, v = (torch.einsum("bnd,hde->bhne", x, weight) for weight in (self.query, self.key, self.value))
        seen = (torch.einsum("bhne,bhme->bhnm", q, k) * 8**-0.5).softmax(-1)
        return self.head(x + torch.einsum("bhne,hed->bnd", torch.einsum("bhnm,bhme->bhne", seen, v), self.out))


@net(0.1, lambda: _words_of(40))
class ComplexRotary(nn.Module):
    """Rotary embeddings by complex numbers, as in Llama's reference."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(40, 32), nn.Linear(32, 40)
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(32, 32, bias=False) for _ in range(4))
        self.n_heads, self.head_dim = 4, 8
        angles = torch.outer(torch.arange(16).float(), 1e4 ** (-torch.arange(0, 8, 2).float() / 8))
        self.turns = torch.polar(torch.ones_like(angles), angles)

    def turned(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
        turns = self.turns[: x.shape[1]].view(1, x.shape[1], 1, pairs.shape[-1])
        return torch.view_as_real(pairs * turns).flatten(3).type_as(x)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        batch, length, _ = x.shape
        q, k, v = (f(x).view(batch, length, self.n_heads, self.head_dim) for f in (self.wq, self.wk, self.wv))
        q, k, v = (each.transpose(1, 2) for each in (self.turned(q), self.turned(k), v))
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(self.head_dim)
        seen = torch.matmul(scores.float().softmax(-1).type_as(q), v)
        return self.head(x + self.wo(seen.transpose(1, 2).contiguous().view(batch, length, -1)))


@net(0.1, lambda: _random(2, 2, 16))
class FourierOperator(nn.Module):
    """A Fourier neural operator: a complex weight for each of the lowest frequencies."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out, self.width = nn.Conv1d(2, 16, 1), nn.Conv1d(16, 2, 1), 16
        self.weight = nn.Parameter(0.1 * torch.complex(_random(16, 16, 5), _random(16, 16, 5).flip(0)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        waves = torch.fft.rfft(x)
        out = torch.zeros(len(x), self.width, waves.shape[-1], dtype=waves.dtype)
        out[..., :5] = torch.einsum("bix,iox->box", waves[..., :5], self.weight)
        return self.out(torch.fft.irfft(out, n=x.shape[-1]) + x)


# ---- experts --------------------------------------------------------------------------------------------------------


@net(0.1, tokens)
class StackedExperts(nn.Module):
    """All experts in one weight, all of them computed."""

    def __init__(self, experts: int = 4, width: int = 16, inner: int = 32) -> None:
        super().__init__()
        self.stem, self.gate, self.out = nn.Linear(16, width), nn.Linear(width, experts), nn.Linear(width, 4)
        self.up, self.down = (
            nn.Parameter(_random(experts, *sizes) * 0.2) for sizes in ((width, inner), (inner, width))
        )
        self.bias = nn.Parameter(_random(experts, inner) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        h = functional.gelu(torch.einsum("bnd,edf->bnef", x, self.up) + self.bias)
        y = torch.einsum("bnef,efd->bned", h, self.down)
        return self.out(x + torch.einsum("bned,bne->bnd", y, self.gate(x).softmax(-1)))


@net(0.1, tokens)
class ChosenExperts(StackedExperts):
    """Each token goes to its two best experts."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        flat = x.reshape(-1, x.shape[-1])
        share, chosen = self.gate(flat).softmax(-1).topk(2)
        out = torch.zeros_like(flat)
        for expert in range(len(self.up)):
            row, place = torch.where(chosen == expert)
            y = functional.gelu(flat[row] @ self.up[expert] + self.bias[expert]) @ self.down[expert]
            out.index_add_(0, row, y * share[row, place, None])
        return self.out(x + out.view_as(x))


# ---- masks and sizes ------------------------------------------------------------------------------------------------


@net(0.1, rows)
class MaskOfChannels(nn.Module):
    """A bool and an int for each channel, in buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(16, 32), nn.Linear(32, 4)
        self.register_buffer("keep", torch.arange(32) % 3 > 0)
        self.register_buffer("times", torch.arange(32))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.where(self.keep, self.first(x).relu(), 0.0).masked_fill(~self.keep, 1.0) * self.times)


@net(0.1, image)
class OneWidth(nn.Module):
    """One attribute is the width of two convolutions, in two kinds of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.c = 16
        self.first, self.second, self.out = nn.Conv2d(3, 16, 1), nn.Conv2d(3, 16, 3, padding=1), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x).view(len(x), self.c, -1).mean(-1)
        b = self.second(x).reshape(len(x), self.c, -1).amax(-1)
        return self.out(torch.cat([a, b], 1))


class PartialConv(nn.Module):
    """FasterNet's: a convolution of a quarter of the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dim_conv, self.dim_untouched = channels // 4, channels - channels // 4
        self.conv = nn.Conv2d(self.dim_conv, self.dim_conv, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.split(x, [self.dim_conv, self.dim_untouched], 1)
        return torch.cat([self.conv(a), b], 1)


@net(0.1, image)
def partial_convolution() -> nn.Module:
    layers = [nn.Conv2d(3, 32, 3), PartialConv(32), nn.Conv2d(32, 64, 1), nn.ReLU(), nn.Conv2d(64, 32, 1)]
    return nn.Sequential(*layers, nn.Conv2d(32, 4, 1))


def _between(function: Callable[[Tensor], Tensor]) -> nn.Module:
    """A function of 32 channels between two convolutions."""
    width = function(torch.zeros(1, 32, 4, 4)).shape[1]
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), Function(function), nn.Conv2d(width, 16, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(16, 4, 1))


@net(0.2, image)
def first_channels() -> nn.Module:
    return _between(lambda x: x[:, :8])


@net(0.2, image)
def last_channels() -> nn.Module:
    return _between(lambda x: x[:, -8:])


@net(0.1, image)
def two_ranges() -> nn.Module:
    return _between(lambda x: torch.cat([x[:, :8] * 2, x[:, 8:]], 1))


@net(0.1, image)
def two_halves() -> nn.Module:
    return _between(lambda x: torch.cat([x[:, : x.shape[1] // 2] * 2, x[:, x.shape[1] // 2 :]], 1))


@net(0.3, image)
def a_list_of_channels() -> nn.Module:
    return _between(lambda x: x[:, [0, 3, 5, 7, 9]])


@net(0.4, image)
def every_second_channel() -> nn.Module:
    return _between(lambda x: x[:, ::2])


@net(0.3, image)
def local_response_norm() -> nn.Module:
    return _between(lambda x: functional.local_response_norm(x, 5))
