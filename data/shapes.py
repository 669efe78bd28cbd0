"""Small grey images of one shape each, made on the spot: the same seed gives the same bits."""

from __future__ import annotations

import torch
from torch import Tensor

CLASSES = ("circle", "square", "triangle", "cross")


def shapes(count: int, *, size: int = 20, noise: float = 0.35, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images (count, 1, size, size) and labels (count,): one shape per image, at a random place, size and contrast."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, len(CLASSES), (count,), generator=generator)
    radius = size * (0.15 + 0.15 * torch.rand(count, 1, 1, generator=generator))
    center = radius + (size - 2 * radius) * torch.rand(count, 1, 2, generator=generator)
    axis = torch.arange(size).float()
    x = (axis.view(1, 1, size) - center[..., :1]) / radius
    y = (axis.view(1, size, 1) - center[..., 1:]) / radius
    inside = torch.stack([_circle(x, y), _square(x, y), _triangle(x, y), _cross(x, y)])
    picked = inside[labels, torch.arange(count)].float()
    contrast = 0.6 + 0.8 * torch.rand(count, 1, 1, generator=generator)
    images = contrast * picked + noise * torch.randn(count, size, size, generator=generator)
    return images.unsqueeze(1), labels


def _circle(x: Tensor, y: Tensor) -> Tensor:
    return x**2 + y**2 < 1


def _square(x: Tensor, y: Tensor) -> Tensor:
    return (x.abs() < 0.85) & (y.abs() < 0.85)


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    return (y < 0.9) & (y > -1) & (x.abs() < (y + 1) / 2)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    return ((x.abs() < 0.3) & (y.abs() < 1)) | ((y.abs() < 0.3) & (x.abs() < 1))
