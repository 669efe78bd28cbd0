"""What pruning means for a YOLOv5: where its head is."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch

from apps.common import pruning
from apps.yolov5 import ultralytics_adapter as adapter
from pruning_core import Pruning, WeightPruningConfig


def begin_pruning(
    recipe: WeightPruningConfig,
    model: adapter.Model,
    optimizer: torch.optim.Optimizer,
    window: tuple[int, int],
    total_steps: int,
    say: Callable[[str], None],
) -> Pruning:
    return pruning.begin_pruning(
        recipe, model, optimizer, window, total_steps, say, hint=lambda message: _head_hint(message, model)
    )


def _head_hint(message: str, model: adapter.Model) -> str:
    """``model.33.m.*`` was the head in the old yolov5 repository: say what it is called in this model."""
    pattern = re.search(r"'(.*)' matches no layer", message)
    if pattern is None or not re.match(r"\^?model\\?\.\d+", pattern[1]):
        return ""
    head = adapter.head_of(model)
    return f"; the detection head of this model is {head}: to keep it dense write '^{head}.'"
