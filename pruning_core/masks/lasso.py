"""Applies the group lasso to a group of weights, just before the optimizer steps."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.optim import Optimizer

from pruning_core.masks.basic import MaskGroup
from pruning_core.patterns import Block
from pruning_core.regularizers import shrink_factor
from pruning_core.sharding import agree


def shrink_(group: MaskGroup, params: Collection[int] | None, optimizer: Optimizer, bad: bool | Tensor) -> None:
    """``w -= lr * reg_coeff * w / ||w_unit||`` for the weights in ``params`` (ids; None: all)."""
    rates = {id(p): each["lr"] for each in optimizer.param_groups for p in each["params"]}
    weights = [w for w in group.weights if params is None or id(w.target.parameter) in params]
    squares = []
    for weight in weights:
        square = weight.view(weight.weight().square())
        squares.append(weight.pattern.fold(square, weight.place.region, "sum"))
    agree(squares, [weight.place for weight in weights], "sum")
    for weight, square in zip(weights, squares, strict=True):
        amount = rates.get(id(weight.target.parameter), 0.0) * group.options.reg_coeff
        factor = shrink_factor(square.sqrt(), amount)
        if isinstance(bad, Tensor):
            factor = torch.where(bad, torch.ones_like(factor), factor)
        assert isinstance(weight.pattern, Block)
        wide = weight.pattern.stretch(factor, weight.place.region)
        weight.weight().mul_(weight.place.layout.store(wide, weight.shape))
