"""Small plain-PyTorch nets whose layers share channels in ways that are hard to prune."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from .fpn import FPN
from .hourglass import StackedHourglass
from .resnet_v2 import resnet_v2
from .rfcn import RFCN
from .simple_baseline import SimpleBaseline


def images(size: int, batch: int = 2) -> Tensor:
    """The same random images each time."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


SHALLOW = (2, 1, 1, 1)

NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "resnet_v2": (partial(resnet_v2, depth=29), partial(images, 32)),
    "rfcn": (
        partial(
            RFCN, 8, SHALLOW, channels=64, rpn_channels=32, bins=3, anchor_sizes=(16, 32, 64), candidates=200, keep=16
        ),
        partial(images, 128),
    ),
    "hourglass": (partial(StackedHourglass, features=64), partial(images, 128)),
    "fpn": (partial(FPN, 8, SHALLOW, channels=32, head_channels=24), partial(images, 64)),
    "simple_baseline": (partial(SimpleBaseline, 8, SHALLOW, channels=32), partial(images, 64)),
}

__all__ = ["FPN", "NETS", "RFCN", "SimpleBaseline", "StackedHourglass", "images", "resnet_v2"]
