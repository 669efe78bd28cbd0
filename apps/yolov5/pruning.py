"""``pruning_core`` in this app: begun with the app's steps, its warnings as lines, its shares as numbers."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from apps.common.errors import BadInput
from apps.yolov5 import ultralytics_adapter as adapter
from pruning_core import Pruning, WeightPruningConfig
from pruning_core.options import LOCK


def read_recipe(source: Any) -> dict[str, Any]:
    """A yaml, a dict, a list of dicts or nothing, checked, with all defaults."""
    try:
        return WeightPruningConfig(source).to_dict()
    except ValueError as error:
        raise BadInput(f"--pruning_config: {error}") from error


def begin_pruning(
    recipe: dict[str, Any],
    model: adapter.Model,
    optimizer: torch.optim.Optimizer,
    window: tuple[int, int],
    total_steps: int,
    say: Callable[[str], None],
) -> Pruning:
    """A pruner whose masks change from the first to the last step of ``window``, whatever steps its recipe names."""
    frozen = _frozen_layers(model)
    pruners = []
    for options in recipe["pruning_configs"]:
        given = options["extra_excluded_op_names"]
        chosen: dict[str, Any] = {"extra_excluded_op_names": [*given, *(name for name in frozen if name not in given)]}
        if options["pruning_type"] != LOCK:
            chosen |= {"start_step": window[0], "end_step": window[1]}
        pruners.append({**options, **chosen})
    try:
        pruner = Pruning(pruners)
        pruner.model, pruner.optimizer = model, optimizer
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pruner.on_train_begin(total_steps=total_steps)
    except ValueError as error:
        raise BadInput(f"--pruning_config: {error}") from error
    for warning in caught:
        say(f"--pruning_config: {warning.message}{_head_hint(str(warning.message), model)}")
    return pruner


def _frozen_layers(model: nn.Module) -> list[str]:
    """What is not trained is not pruned: ``--freeze``, and the constants 0, 1, 2, ... that turn bins into distances."""
    layers = {name.rpartition(".")[0] for name, weight in model.named_parameters() if not weight.requires_grad}
    modules = dict(model.named_modules())
    return [f"^{re.escape(layer)}$" for layer in sorted(layers) if isinstance(modules[layer], nn.Conv2d | nn.Linear)]


def _head_hint(message: str, model: adapter.Model) -> str:
    """``model.33.m.*`` was the head in the old yolov5 repository: say what it is called in this model."""
    pattern = re.search(r"'(.*)' matches no layer", message)
    if pattern is None or not re.match(r"\^?model\\?\.\d+", pattern[1]):
        return ""
    head = adapter.head_of(model)
    return f"; the detection head of this model is {head}: to keep it dense write '^{head}.'"


def end_pruning(pruner: Pruning, say: Callable[[str], None]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pruner.on_train_end()
    for warning in caught:
        say(str(warning.message))


def target_reached(pruner: Pruning) -> bool:
    return all(group.done for group in pruner.groups)


def asked(pruner: Pruning) -> float:
    """The share of zeros asked for at this step, over all weights that take part."""
    total = sum(group.total for group in pruner.groups)
    return sum(group.share(pruner.step) * group.total for group in pruner.groups) / total


def reached(pruner: Pruning, model: nn.Module) -> float:
    """The share of zeros that ``model`` has in the weights that take part, counted."""
    parameters = dict(model.named_parameters())
    weights = [parameters[name] for name in pruner.masks()]
    return 1 - sum(int(weight.count_nonzero()) for weight in weights) / sum(weight.numel() for weight in weights)
