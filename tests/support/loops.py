"""A small network, data that depends on the step alone, and a plain training loop."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def small_net() -> nn.Sequential:
    """A convolution with 3 inputs, a grouped one, odd sizes, and two linear layers."""
    return nn.Sequential(
        nn.Conv2d(3, 10, 3),
        nn.ReLU(),
        nn.Conv2d(10, 12, 3, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12 * 4 * 4, 18),
        nn.ReLU(),
        nn.Linear(18, 5),
    )


def batch(step: int, size: int = 6) -> tuple[Tensor, Tensor]:
    """Data that depends on the step alone, so that an interrupted run sees what an uninterrupted one sees."""
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randn(size, 3, 8, 8, generator=generator), torch.randint(0, 5, (size,), generator=generator)


def loss_of(model: nn.Module, step: int) -> Tensor:
    images, labels = batch(step)
    return nn.functional.cross_entropy(model(images), labels)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, after: Callable[[int], None] | None = None):
    """A plain loop that knows nothing of pruning."""
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        if after is not None:
            after(step)


def sparsity(weight: Tensor) -> float:
    return (weight == 0).float().mean().item()
