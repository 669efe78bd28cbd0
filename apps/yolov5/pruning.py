"""What pruning means for a YOLOv5: what is not trained is not pruned, and where the head is."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import nn

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
    chosen = pruning.without_layers(recipe, _frozen_layers(model))
    return pruning.begin_pruning(
        chosen, model, optimizer, window, total_steps, say, hint=lambda message: _head_hint(message, model)
    )


def _frozen_layers(model: nn.Module) -> list[str]:
    """``--freeze``, and the constants 0, 1, 2, ... that turn bins into distances."""
    layers = {name.rpartition(".")[0] for name, weight in model.named_parameters() if not weight.requires_grad}
    modules = dict(model.named_modules())
    return [layer for layer in sorted(layers) if isinstance(modules[layer], nn.Conv2d | nn.Linear)]


def _head_hint(message: str, model: adapter.Model) -> str:
    """``model.33.m.*`` was the head in the old yolov5 repository: say what it is called in this model."""
    pattern = re.search(r"'(.*)' matches no layer", message)
    if pattern is None or not re.match(r"\^?model\\?\.\d+", pattern[1]):
        return ""
    head = adapter.head_of(model)
    return f"; the detection head of this model is {head}: to keep it dense write '^{head}.'"
