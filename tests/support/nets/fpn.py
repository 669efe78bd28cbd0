"""A feature pyramid network (Lin et al. 2017) with a heatmap head."""

from collections.abc import Sequence

from torch import Tensor, nn

from .backbone import Backbone, he_init


def upsample_to(x: Tensor, like: Tensor) -> Tensor:
    """Nearest neighbours, to the height and width of ``like``."""
    return nn.functional.interpolate(x, size=like.shape[-2:], mode="nearest")


class FeaturePyramid(nn.Module):
    """1x1 lateral convolutions, a top-down sum, and a 3x3 convolution on each level."""

    def __init__(self, in_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels)

    def forward(self, stages: Sequence[Tensor]) -> list[Tensor]:
        """Finest level first, as ``stages``."""
        merged = [lateral(stage) for lateral, stage in zip(self.lateral, stages, strict=True)]
        for level in range(len(merged) - 2, -1, -1):
            merged[level] = merged[level] + upsample_to(merged[level + 1], merged[level])
        return [output(level) for output, level in zip(self.output, merged, strict=True)]


class SumHead(nn.Module):
    """The same 3x3 Conv-BN-ReLU on every level, summed at the finest one, and a 1x1 prediction."""

    def __init__(self, in_channels: int, channels: int, heatmaps: int) -> None:
        super().__init__()
        self.shared = nn.Sequential(
            nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )
        self.predict = nn.Conv2d(channels, heatmaps, 1)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        total = self.shared(levels[0])
        for level in levels[1:]:
            total = total + upsample_to(self.shared(level), total)
        return self.predict(total)


class FPN(nn.Module):
    """Heatmaps at a quarter of the input."""

    def __init__(
        self,
        width: int = 64,
        layers: Sequence[int] = (3, 4, 6, 3),
        channels: int = 256,
        head_channels: int = 128,
        heatmaps: int = 17,
    ) -> None:
        super().__init__()
        self.backbone = Backbone(width, layers)
        self.pyramid = FeaturePyramid(self.backbone.channels, channels)
        self.head = SumHead(channels, head_channels, heatmaps)
        he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pyramid(self.backbone(x)))
