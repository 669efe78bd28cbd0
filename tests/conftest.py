import atexit
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

torch.set_num_threads(1)

# Nothing of the hub is asked for and no cache of the user is read or filled: set before huggingface_hub is imported.
CACHE = tempfile.mkdtemp(prefix="pruning-core-hub-")
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_ASSETS_CACHE", "HF_TOKEN", "HF_TOKEN_PATH"):
    os.environ.pop(name, None)
os.environ |= {"HF_HOME": CACHE, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


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


@pytest.fixture
def quiet():
    """For tests that leave a schedule unfinished on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*stopped at step")
        yield
