"""The names of ``torch.ao.pruning``'s pruning functions, as values of a ``patterns`` dict.

A pattern with one of them asks for what ``prune`` does anyway: what goes with a row is found by running the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def _named(name: str) -> Callable[..., None]:
    def function(*modules: Any) -> None:
        raise RuntimeError(f"{name}: is a name for patterns, got a call; pruner.prune() prunes every layer at once")

    function.__name__ = function.__qualname__ = name
    return function


prune_linear = _named("prune_linear")
prune_linear_linear = _named("prune_linear_linear")
prune_linear_activation_linear = _named("prune_linear_activation_linear")
prune_conv2d = _named("prune_conv2d")
prune_conv2d_padded = _named("prune_conv2d_padded")
prune_conv2d_conv2d = _named("prune_conv2d_conv2d")
prune_conv2d_activation_conv2d = _named("prune_conv2d_activation_conv2d")
prune_conv2d_pool_activation_conv2d = _named("prune_conv2d_pool_activation_conv2d")
prune_conv2d_activation_pool_conv2d = _named("prune_conv2d_activation_pool_conv2d")
prune_conv2d_pool_flatten_linear = _named("prune_conv2d_pool_flatten_linear")
prune_lstm_output_linear = _named("prune_lstm_output_linear")
prune_lstm_output_layernorm_linear = _named("prune_lstm_output_layernorm_linear")
