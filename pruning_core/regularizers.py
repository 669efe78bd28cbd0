"""Group lasso: shrinks whole units, so that whole units become unimportant."""

from __future__ import annotations

from torch import Tensor


def shrink_factor(norm: Tensor, amount: Tensor | float) -> Tensor:
    """``1 - amount / ||w_unit||``, at least 0; 1 where the norm is 0.

    ``w * factor`` is ``w - amount * w / ||w_unit||``, the proximal step of ``amount * sum ||w_unit||`` with
    ``amount = lr * reg_coeff`` (Yuan & Lin 2006): a step never carries a unit past zero.
    """
    return (1 - amount / norm).clamp_(min=0).where(norm > 0, 1.0)
