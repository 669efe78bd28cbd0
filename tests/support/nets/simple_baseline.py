"""Simple Baselines for pose (Xiao et al. 2018): a backbone, three transposed convolutions, heatmaps."""

from collections.abc import Sequence

from torch import Tensor, nn

from .backbone import Backbone, he_init


def deconv(in_channels: int, out_channels: int) -> list[nn.Module]:
    """Doubles the resolution."""
    return [
        nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    ]


class SimpleBaseline(nn.Module):
    """Heatmaps at a quarter of the input, from the last stage of the backbone."""

    def __init__(
        self, width: int = 64, layers: Sequence[int] = (3, 4, 6, 3), channels: int = 256, heatmaps: int = 17
    ) -> None:
        super().__init__()
        self.backbone = Backbone(width, layers)
        self.deconvs = nn.Sequential(
            *deconv(self.backbone.channels[-1], channels), *deconv(channels, channels), *deconv(channels, channels)
        )
        self.predict = nn.Conv2d(channels, heatmaps, 1)
        he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        c5 = self.backbone(x)[-1]
        return self.predict(self.deconvs(c5))
