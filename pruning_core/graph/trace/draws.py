"""Random numbers that a model draws in evaluation mode. A cut draws fewer, so both runs get fixed ones instead."""

from __future__ import annotations

from typing import Any

import torch

DROPOUTS = frozenset(
    (
        "dropout dropout_ feature_dropout feature_dropout_ alpha_dropout alpha_dropout_ feature_alpha_dropout "
        "feature_alpha_dropout_"
    ).split()
)
DRAWN = frozenset("rand_like randn_like bernoulli".split())
WRITTEN = frozenset("bernoulli_ normal_ uniform_ exponential_ log_normal_ cauchy_ geometric_".split())


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """The result of an operation, with nothing dropped and 0.5 for each number that would be drawn for a channel."""
    name = func.overloadpacket.__name__
    if name in DROPOUTS:
        return args[0]
    if name == "native_dropout":
        return args[0], torch.ones_like(args[0], dtype=torch.bool)
    if name in DRAWN:
        return torch.full_like(args[0], 0.5, dtype=kwargs.get("dtype"))
    if name == "randint_like":
        return torch.zeros_like(args[0], dtype=kwargs.get("dtype"))
    if name in WRITTEN:
        return args[0].fill_(0.5)
    if name == "scaled_dot_product_attention" and len(args) > 4:
        args = (*args[:4], 0.0, *args[5:])
    return func(*args, **kwargs)
