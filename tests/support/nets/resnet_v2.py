"""Pre-activation ResNet with bottlenecks for small images (He et al. 2016, "Identity mappings")."""

from torch import Tensor, nn

from .backbone import EXPANSION, he_init


class PreActBottleneck(nn.Module):
    """BN-ReLU before each convolution; a projection, where one is needed, reads the pre-activated input."""

    def __init__(self, in_channels: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        out_channels = planes * EXPANSION
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, planes, 1, stride, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, out_channels, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.projection: nn.Conv2d | None = None
        if stride != 1 or in_channels != out_channels:
            self.projection = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(x))
        shortcut = x if self.projection is None else self.projection(out)
        out = self.conv1(out)
        out = self.conv2(self.relu(self.bn2(out)))
        out = self.conv3(self.relu(self.bn3(out)))
        return shortcut + out


class ResNetV2(nn.Module):
    """A 3x3 stem, three stages of ``blocks`` bottlenecks, and BN-ReLU-pool-linear."""

    def __init__(self, blocks: int, width: int = 16, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        stages: list[nn.Module] = []
        channels = width
        for index in range(3):
            planes = width * 2**index
            for block in range(blocks):
                stride = 2 if index > 0 and block == 0 else 1
                stages.append(PreActBottleneck(channels, planes, stride))
                channels = planes * EXPANSION
        self.stages = nn.Sequential(*stages)
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.stem(x))
        x = self.pool(self.relu(self.bn(x)))
        return self.fc(x.flatten(1))


def resnet_v2(depth: int = 29, width: int = 16, num_classes: int = 10) -> ResNetV2:
    """``depth`` is 9n + 2, with n bottlenecks a stage: 164 and 1001 in the paper."""
    if depth < 11 or (depth - 2) % 9:
        raise ValueError(f"depth: must be 9n + 2 with n >= 1, got {depth}; use 11, 20, 29, ...")
    return ResNetV2((depth - 2) // 9, width, num_classes)
