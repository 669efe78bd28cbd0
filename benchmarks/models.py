"""Models of real size with synthetic weights and gradients: no download, no forward and no backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

ConvShape = tuple[int, int, int]
"""(input channels, output channels, kernel size)"""


def _c3(into: int, out: int, bottlenecks: int) -> list[ConvShape]:
    """YOLOv5's C3 block: two narrow branches, one of them with bottlenecks, and the convolution that joins them."""
    half = out // 2
    return [(into, half, 1), (into, half, 1), (out, out, 1), *[(half, half, 1), (half, half, 3)] * bottlenecks]


def yolov5s_shapes() -> list[ConvShape]:
    """Backbone and neck of YOLOv5s 6.x without the three detection layers: 57 convolutions, 7.0 M weights."""
    backbone = [
        *[(3, 32, 6), (32, 64, 3), *_c3(64, 64, 1)],
        *[(64, 128, 3), *_c3(128, 128, 2)],
        *[(128, 256, 3), *_c3(256, 256, 3)],
        *[(256, 512, 3), *_c3(512, 512, 1)],
        *[(512, 256, 1), (1024, 512, 1)],
    ]
    neck = [
        *[(512, 256, 1), *_c3(512, 256, 1)],
        *[(256, 128, 1), *_c3(256, 128, 1)],
        *[(128, 128, 3), *_c3(256, 256, 1)],
        *[(256, 256, 3), *_c3(512, 512, 1)],
    ]
    return [*backbone, *neck]


def yolov5s() -> nn.Module:
    convs = [nn.utils.skip_init(nn.Conv2d, i, o, k, bias=False) for i, o, k in yolov5s_shapes()]
    return nn.Sequential(*convs)


def bert_base() -> nn.Module:
    """The encoder's 72 linear layers: query, key, value, attention output, and the two of the feed-forward block."""
    block = [(768, 768)] * 4 + [(768, 3072), (3072, 768)]
    return nn.Sequential(*(nn.utils.skip_init(nn.Linear, i, o, bias=False) for i, o in block * 12))


def llama_1b() -> nn.Module:
    """TinyLlama-1.1B's linear layers: 22 blocks of query, key, value, output, gate, up and down, and the head."""
    block = [(2048, 2048), (2048, 256), (2048, 256), (2048, 2048), (2048, 5632), (2048, 5632), (5632, 2048)]
    return nn.Sequential(*(nn.utils.skip_init(nn.Linear, i, o, bias=False) for i, o in [*block * 22, (2048, 32000)]))


MODELS: dict[str, Callable[[], nn.Module]] = {"yolov5s": yolov5s, "bert-base": bert_base, "llama-1b": llama_1b}


@torch.no_grad()
def build(name: str, seed: int, dtype: str) -> nn.Module:
    """The model with normal weights (0.02) and one normal gradient (0.001) that stays for all steps."""
    model = MODELS[name]().to(getattr(torch, dtype))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.normal_(0.0, 0.02, generator=generator)
        parameter.grad = torch.empty_like(parameter).normal_(0.0, 0.001, generator=generator)
    return model
