"""``pruning_core`` in an app: begun with the app's steps, its warnings as lines, its shares as numbers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from apps.common.errors import BadInput
from pruning_core import PrunerOptions, Pruning, WeightPruningConfig


def read_recipe(source: Any, flags: Mapping[str, tuple[str, Any]] | None = None) -> WeightPruningConfig:
    """A yaml, a dict, a list of dicts or nothing, checked.

    ``flags``: option -> (its flag on the command line, value); they win over what the recipe says for any layer.
    """
    flags = flags or {}
    try:
        recipe = WeightPruningConfig(source)
    except ValueError as error:
        raise BadInput(f"--pruning_config: {error}") from error
    if not flags:
        return recipe
    try:
        return recipe.updated(**{option: value for option, (_, value) in flags.items()})
    except ValueError as error:
        message = str(error)
        for option, (flag, _) in flags.items():
            message = message.replace(f"update_items_for_all_pruners.{option}:", f"{flag}:")
        raise BadInput(message if message.startswith("--") else f"--pruning_config: {message}") from error


def begin_pruning(
    recipe: WeightPruningConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    window: tuple[int, int],
    total_steps: int,
    say: Callable[[str], None],
    *,
    frequency: int | None = None,
    hint: Callable[[str], str] = lambda message: "",
) -> Pruning:
    """A pruner whose masks change from the first to the last step of ``window``, whatever steps its recipe names.

    ``frequency`` is for the pruners whose recipe gives none. ``hint`` adds to the warnings that come.
    """
    try:
        pruner = Pruning([_with_steps(options, window, frequency) for options in recipe.pruners])
        pruner.model, pruner.optimizer = model, optimizer
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pruner.on_train_begin(total_steps=total_steps)
    except ValueError as error:
        raise BadInput(f"--pruning_config: {error}") from error
    for warning in caught:
        say(f"--pruning_config: {warning.message}{hint(str(warning.message))}")
    return pruner


def _with_steps(options: PrunerOptions, window: tuple[int, int], frequency: int | None) -> dict[str, Any]:
    chosen: dict[str, Any] = options.model_dump(exclude_unset=True)
    if options.kind != "pattern_lock":
        chosen |= {"start_step": window[0], "end_step": window[1]}
        if frequency is not None:
            chosen.setdefault("pruning_frequency", frequency)
    return chosen


def end_pruning(pruner: Pruning, say: Callable[[str], None]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pruner.on_train_end()
    for warning in caught:
        say(str(warning.message))


def reached(pruner: Pruning, model: nn.Module) -> float:
    """The share of zeros that ``model`` has in the weights that take part, counted."""
    parameters = dict(model.named_parameters())
    weights = [parameters[name] for each in pruner.pruners for name in each.names]
    return 1 - sum(int(weight.count_nonzero()) for weight in weights) / sum(weight.numel() for weight in weights)
