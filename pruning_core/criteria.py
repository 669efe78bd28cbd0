"""What a weight is worth. Scores have the weight's shape; larger = kept. No criterion knows a pattern.

A criterion is one class and one registry line: ``score(weight, gradient)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from pruning_core.registry import Registry


class Criterion(ABC):
    """``needs_gradient``: read in the step, before the optimizer; otherwise read when the masks change.

    ``accumulates``: the running score ``S <- a S + b score`` over all steps up to the last mask change counts, not the
    last step alone. ``a`` and ``b`` are the options ``momentum_decay`` and ``momentum_gain``.
    """

    needs_gradient: bool = True
    accumulates: bool = False

    @abstractmethod
    def score(self, weight: Tensor, gradient: Tensor | None) -> Tensor:
        """A new tensor of the weight's shape, at least float32. Neither argument is changed."""


CRITERIA: Registry[Criterion] = Registry("criterion")


def _wide(x: Tensor) -> Tensor:
    """Half precision scores would tie and overflow."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


@CRITERIA.add("magnitude")
class Magnitude(Criterion):
    """``|w|`` at the moment of the cut."""

    needs_gradient = False

    def score(self, weight: Tensor, gradient: Tensor | None) -> Tensor:
        return _wide(weight).abs()


@CRITERIA.add("gradient")
class Gradient(Criterion):
    """``|g|`` of the last step before the cut."""

    def score(self, weight: Tensor, gradient: Tensor | None) -> Tensor:
        assert gradient is not None
        return _wide(gradient).abs()


@CRITERIA.add("snip")
class Snip(Criterion):
    """``|w g|`` of the last step before the cut (Lee, Ajanthan & Torr 2019, arXiv:1810.02340, eq. 6)."""

    def score(self, weight: Tensor, gradient: Tensor | None) -> Tensor:
        assert gradient is not None
        return (_wide(weight) * _wide(gradient)).abs_()


@CRITERIA.add("snip_momentum")
class SnipMomentum(Snip):
    """``S <- a S + b |w g|`` over the steps; a = 1.0 and b = 0.9 unless configured."""

    accumulates = True
