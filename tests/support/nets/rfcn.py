"""R-FCN (Dai et al. 2016): a region proposal network and position-sensitive score maps that vote."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms, ps_roi_pool

from .backbone import Backbone, he_init

STRIDE = 16
MAX_LOG_SCALE = math.log(1000 / 16)


def base_anchors(sizes: Sequence[float], ratios: Sequence[float]) -> Tensor:
    """Boxes around the origin, one for each size and each ratio of height to width: (anchors, 4)."""
    corners = [(size / math.sqrt(ratio) / 2, size * math.sqrt(ratio) / 2) for size in sizes for ratio in ratios]
    return torch.tensor([(-x, -y, x, y) for x, y in corners])


def place_anchors(base: Tensor, height: int, width: int) -> Tensor:
    """The base anchors at the middle of every cell: (height * width * anchors, 4)."""
    ys = (torch.arange(height, device=base.device) + 0.5) * STRIDE
    xs = (torch.arange(width, device=base.device) + 0.5) * STRIDE
    y, x = torch.meshgrid(ys, xs, indexing="ij")
    centres = torch.stack([x, y, x, y], dim=-1).to(base.dtype)
    return (centres[:, :, None] + base).reshape(-1, 4)


def decode(anchors: Tensor, deltas: Tensor) -> Tensor:
    """Boxes (..., 4) from anchors and (dx, dy, dw, dh)."""
    size = anchors[..., 2:] - anchors[..., :2]
    centre = anchors[..., :2] + size / 2 + deltas[..., :2] * size
    half = size * deltas[..., 2:].clamp(max=MAX_LOG_SCALE).exp() / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def take(values: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (N, K) of ``values`` (N, M, 4)."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))


class RPN(nn.Module):
    """Objectness (N, M) and box deltas (N, M, 4) for the M anchors of a feature map."""

    def __init__(self, in_channels: int, channels: int, anchors: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.objectness = nn.Conv2d(channels, anchors, 1)
        self.deltas = nn.Conv2d(channels, anchors * 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.relu(self.conv(x))
        objectness = self.objectness(x).permute(0, 2, 3, 1).flatten(1)
        deltas = self.deltas(x).permute(0, 2, 3, 1).flatten(1)
        return objectness, deltas.unflatten(1, (-1, 4))


class Proposals(nn.Module):
    """Always ``keep`` boxes an image, best first: those that survive NMS, then as many others as are missing."""

    def __init__(self, sizes: Sequence[float], ratios: Sequence[float], candidates: int, keep: int) -> None:
        super().__init__()
        self.base: Tensor
        self.register_buffer("base", base_anchors(sizes, ratios), persistent=False)
        self.candidates, self.keep = candidates, keep

    @torch.no_grad()
    def forward(self, features: Tensor, objectness: Tensor, deltas: Tensor) -> Tensor:
        """(N, keep, 4), in pixels."""
        height, width = features.shape[-2:]
        scores, best = objectness.topk(min(self.candidates, objectness.shape[1]))
        anchors = place_anchors(self.base, height, width).expand_as(deltas)
        boxes = decode(take(anchors, best), take(deltas, best))
        limit = torch.tensor([width, height, width, height], device=boxes.device) * STRIDE
        boxes = boxes.clamp(min=0).minimum(limit.to(boxes.dtype))
        image = torch.arange(len(boxes), device=boxes.device)[:, None].expand_as(scores)
        survivors = batched_nms(boxes.flatten(0, 1), scores.flatten(), image.flatten(), 0.7)
        dropped = torch.ones(scores.numel(), dtype=torch.long, device=boxes.device)
        dropped[survivors] = 0
        order = dropped.view_as(scores).argsort(dim=1, stable=True)
        return take(boxes, order[:, : self.keep])


class RFCN(nn.Module):
    """Raw outputs for ``keep`` proposals an image, in train and in eval mode."""

    def __init__(
        self,
        width: int = 64,
        layers: Sequence[int] = (3, 4, 23, 3),
        channels: int = 1024,
        rpn_channels: int = 512,
        num_classes: int = 20,
        bins: int = 7,
        anchor_sizes: Sequence[float] = (128, 256, 512),
        candidates: int = 6000,
        keep: int = 300,
    ) -> None:
        super().__init__()
        ratios = (0.5, 1.0, 2.0)
        self.bins = bins
        self.backbone = Backbone(width, layers, dilate_last=True)
        self.rpn = RPN(self.backbone.channels[2], rpn_channels, len(anchor_sizes) * len(ratios))
        self.proposals = Proposals(anchor_sizes, ratios, candidates, keep)
        self.reduce = nn.Conv2d(self.backbone.channels[3], channels, 1)
        self.relu = nn.ReLU(inplace=True)
        self.class_maps = nn.Conv2d(channels, bins * bins * (num_classes + 1), 1)
        self.box_maps = nn.Conv2d(channels, bins * bins * 4, 1)
        he_init(self)
        nn.init.normal_(self.rpn.deltas.weight, std=0.01)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        _, _, c4, c5 = self.backbone(x)
        objectness, deltas = self.rpn(c4)
        proposals = self.proposals(c4, objectness, deltas)
        features = self.relu(self.reduce(c5))
        return {
            "objectness": objectness,
            "anchor_deltas": deltas,
            "proposals": proposals,
            "class_scores": self.vote(self.class_maps(features), proposals),
            "box_deltas": self.vote(self.box_maps(features), proposals),
        }

    def vote(self, maps: Tensor, proposals: Tensor) -> Tensor:
        """Pools each bin of a proposal from its own maps and averages the bins: (N, keep, maps / bins**2)."""
        pooled = ps_roi_pool(maps, list(proposals.unbind()), self.bins, 1 / STRIDE)
        return pooled.mean(dim=(2, 3)).unflatten(0, proposals.shape[:2])
