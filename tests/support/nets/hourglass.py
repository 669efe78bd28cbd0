"""Stacked hourglass (Newell et al. 2016) for heatmaps."""

from torch import Tensor, nn


class Residual(nn.Module):
    """A pre-activation bottleneck at half width; a projection of the raw input where the width changes."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        half = out_channels // 2
        self.branch = nn.Sequential(
            nn.BatchNorm2d(in_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(in_channels, half, 1),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
            nn.Conv2d(half, half, 3, padding=1),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
            nn.Conv2d(half, out_channels, 1),
        )
        same = in_channels == out_channels
        self.skip: nn.Module = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.branch(x)


class Hourglass(nn.Module):
    """Pools, goes down ``depth`` levels, comes up again and adds the branch kept at each resolution."""

    def __init__(self, depth: int, features: int) -> None:
        super().__init__()
        self.keep = Residual(features, features)
        self.pool = nn.MaxPool2d(2)
        self.down = Residual(features, features)
        self.inner = Hourglass(depth - 1, features) if depth > 1 else Residual(features, features)
        self.up = Residual(features, features)
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")

    def forward(self, x: Tensor) -> Tensor:
        low = self.up(self.inner(self.down(self.pool(x))))
        return self.keep(x) + self.upsample(low)


class Stack(nn.Module):
    """One hourglass with its features and its prediction."""

    def __init__(self, depth: int, features: int, heatmaps: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            Hourglass(depth, features),
            Residual(features, features),
            nn.Conv2d(features, features, 1),
            nn.BatchNorm2d(features),
            nn.ReLU(inplace=True),
        )
        self.predict = nn.Conv2d(features, heatmaps, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(x)
        return features, self.predict(features)


class StackedHourglass(nn.Module):
    """One heatmap tensor a stack, at a quarter of the input; sides are multiples of ``4 * 2**depth``."""

    def __init__(self, stacks: int = 2, depth: int = 4, features: int = 256, heatmaps: int = 16) -> None:
        super().__init__()
        quarter, half = features // 4, features // 2
        self.stem = nn.Sequential(
            nn.Conv2d(3, quarter, 7, 2, padding=3),
            nn.BatchNorm2d(quarter),
            nn.ReLU(inplace=True),
            Residual(quarter, half),
            nn.MaxPool2d(2),
            Residual(half, half),
            Residual(half, features),
        )
        self.stacks = nn.ModuleList(Stack(depth, features, heatmaps) for _ in range(stacks))
        self.merge_features = nn.ModuleList(nn.Conv2d(features, features, 1) for _ in range(stacks - 1))
        self.merge_heatmaps = nn.ModuleList(nn.Conv2d(heatmaps, features, 1) for _ in range(stacks - 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        predictions = []
        for index, stack in enumerate(self.stacks):
            features, heatmaps = stack(x)
            predictions.append(heatmaps)
            if index < len(self.merge_features):
                x = x + self.merge_features[index](features) + self.merge_heatmaps[index](heatmaps)
        return predictions
