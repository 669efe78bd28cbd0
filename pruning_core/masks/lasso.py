"""Group lasso: shrinks whole units before each optimizer step, so that whole units become unimportant."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from pruning_core.masks.groups import MaskGroup
from pruning_core.masks.sharding import agree
from pruning_core.patterns import stretch_blocks


def shrink_(group: MaskGroup, params: Collection[int] | None, optimizer: Optimizer, bad: bool | Tensor) -> None:
    """``w -= lr * reg_coeff * w / ||w_unit||`` in place, for the weights in ``params`` (ids; None: all).

    Norms of units that span shard borders are all-reduced. Where the flag ``bad`` is True, nothing changes.
    """
    rates = {id(p): each["lr"] for each in optimizer.param_groups for p in each["params"]}
    weights = [w for w in group.weights if params is None or id(w.target.parameter) in params]
    squares = []
    for weight in weights:
        square = weight.place.layout.view(weight.weight().square())
        squares.append(weight.pattern.fold(square, weight.place.region, "sum"))
    agree(squares, [weight.place for weight in weights], "sum")
    for weight, square in zip(weights, squares, strict=True):
        amount = rates.get(id(weight.target.parameter), 0.0) * group.options.reg_coeff
        factor = shrink_factor(square.sqrt(), amount)
        if isinstance(bad, Tensor):
            factor = torch.where(bad, torch.ones_like(factor), factor)
        wide = stretch_blocks(factor, weight.place.region)
        weight.weight().mul_(weight.place.layout.store(wide, weight.shape))


class ShrinkAtStep:
    """Shrinks groups when the optimizers that hold their weights step, for a loop that named no optimizer.

    From when it is made until ``end``, or until it is dropped, it hears of every optimizer in the process; those that
    hold no weight of the groups change nothing.
    """

    def __init__(self, groups: Sequence[MaskGroup], bad: bool | Tensor) -> None:
        self._groups, self._bad = groups, bad
        self._waiting = {id(weight.target.parameter) for group in groups for weight in group.weights}
        self._seen = isinstance(bad, Tensor)  # a loss scaler may skip the step; not known here without a host sync
        this = weakref.ref(self)  # the hook must not keep the model alive

        def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            waiting = this()
            if waiting is not None:
                waiting._shrink(optimizer)

        self._remove = weakref.finalize(self, register_optimizer_step_pre_hook(hook).remove)

    @torch.no_grad()
    def _shrink(self, optimizer: Optimizer) -> None:
        held = {id(p) for param_group in optimizer.param_groups for p in param_group["params"]}
        mine = held & self._waiting
        if not mine:
            return
        self._seen = True
        self._waiting -= mine
        for group in self._groups:
            shrink_(group, mine, optimizer, self._bad)

    def end(self, known: bool) -> None:
        """No step is waited for any more; RuntimeError when none was seen, unless that was ``known`` to work."""
        self._remove()
        if not self._seen and not known:
            raise RuntimeError(
                "reg_type: group_lasso reads the learning rate from the optimizer that holds the pruned weights, got "
                "no step of one between on_before_optimizer_step and on_after_optimizer_step; set pruner.optimizer "
                "before training"
            )


def shrink_factor(norm: Tensor, amount: Tensor | float) -> Tensor:
    """``1 - amount / ||w_unit||``, at least 0; 1 where the norm is 0.

    ``w * factor`` is ``w - amount * w / ||w_unit||``, the proximal step of ``amount * sum ||w_unit||`` with
    ``amount = lr * reg_coeff`` (Yuan & Lin 2006): a step never carries a unit past zero.
    """
    return (1 - amount / norm).clamp_(min=0).where(norm > 0, 1.0)
