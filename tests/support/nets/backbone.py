"""A post-activation residual backbone (He et al. 2015) that gives its four stages."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

EXPANSION = 4


def he_init(net: nn.Module) -> None:
    """Normal weights that keep the variance through ReLUs, zero biases."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            # PyTorch's fan-out of a transposed convolution, whose weight is (in, out, ...), counts its inputs.
            mode: Literal["fan_in", "fan_out"] = "fan_out" if isinstance(module, nn.ConvTranspose2d) else "fan_in"
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class Bottleneck(nn.Module):
    """1x1 down, 3x3, 1x1 up, and a projection where the shape changes."""

    def __init__(self, in_channels: int, planes: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        out_channels = planes * EXPANSION
        self.conv1 = nn.Conv2d(in_channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            projection = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + self.downsample(x))


def stage(in_channels: int, planes: int, blocks: int, stride: int, dilation: int = 1) -> nn.Sequential:
    """``blocks`` bottlenecks; the first strides and changes the width."""
    first = Bottleneck(in_channels, planes, stride, dilation)
    rest = (Bottleneck(planes * EXPANSION, planes, dilation=dilation) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)


class Backbone(nn.Module):
    """Stem and four stages of bottlenecks: C2 to C5, at strides 4, 8, 16 and 32 (16 with ``dilate_last``)."""

    def __init__(self, width: int = 64, layers: Sequence[int] = (3, 4, 6, 3), dilate_last: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, padding=3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, padding=1),
        )
        self.channels = [width * EXPANSION * 2**i for i in range(4)]
        c2, c3, c4, _ = self.channels
        self.stage1 = stage(width, width, layers[0], stride=1)
        self.stage2 = stage(c2, width * 2, layers[1], stride=2)
        self.stage3 = stage(c3, width * 4, layers[2], stride=2)
        last_stride, last_dilation = (1, 2) if dilate_last else (2, 1)
        self.stage4 = stage(c4, width * 8, layers[3], last_stride, last_dilation)
        he_init(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        c2 = self.stage1(self.stem(x))
        c3 = self.stage2(c2)
        c4 = self.stage3(c3)
        return c2, c3, c4, self.stage4(c4)
