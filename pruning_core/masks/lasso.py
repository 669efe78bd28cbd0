"""Group lasso: shrinks whole units before each optimizer step, so that whole units become unimportant."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.optim import Optimizer

from pruning_core.masks.groups import MaskGroup
from pruning_core.masks.sharding import agree
from pruning_core.patterns import Block


def shrink_(group: MaskGroup, params: Collection[int] | None, optimizer: Optimizer, bad: bool | Tensor) -> None:
    """``w -= lr * reg_coeff * w / ||w_unit||`` in place, for the weights in ``params`` (ids; None: all).

    Norms of units that span shard borders are all-reduced. Where the flag ``bad`` is True, nothing changes.
    """
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


def shrink_factor(norm: Tensor, amount: Tensor | float) -> Tensor:
    """``1 - amount / ||w_unit||``, at least 0; 1 where the norm is 0.

    ``w * factor`` is ``w - amount * w / ||w_unit||``, the proximal step of ``amount * sum ||w_unit||`` with
    ``amount = lr * reg_coeff`` (Yuan & Lin 2006): a step never carries a unit past zero.
    """
    return (1 - amount / norm).clamp_(min=0).where(norm > 0, 1.0)
