"""Criteria: what a weight contributes to the score of its unit, and how the unit finishes the sum. Larger = kept.

A criterion is one class and one registry line. It serves masks and channels alike and knows neither pattern nor graph::

    score(unit) = finish( sum over steps of each_step( sum over the unit of score(weight, gradient) ) )
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from pruning_core.registry import Registry


@dataclass(frozen=True)
class Slices:
    """One axis of a tensor of a model, as a criterion of whole channels sees it.

    ``reads``: the axis takes channels in, it makes none. ``norm_scale``: the tensor is the weight of a batch norm.
    ``activations``: float64 (channels,), the mean absolute value that layers read, or None.
    """

    tensor: Tensor
    dim: int
    reads: bool
    norm_scale: bool
    activations: Tensor | None = None

    def lines(self) -> Tensor:
        """float64 (channels, weights of each)."""
        return fold_lines(self.tensor.detach().double(), self.dim)


def fold_lines(x: Tensor, dim: int) -> Tensor:
    """(channels, weights of each): ``dim`` first, the rest flat."""
    return x.movedim(dim, 0).reshape(x.shape[dim], -1)


class Criterion(ABC):
    """A criterion: ``score`` per weight, ``finish`` per unit. Subclass it and register with ``@CRITERIA.add(name)``.

    ``needs_gradient``: ``score`` is read in the step, before the optimizer; otherwise when masks change.

    ``elementwise``: each number that ``score``, ``each_step`` and ``finish`` return depends on the same place of their
    arguments alone, so that a large weight may be scored in parts. It is not inherited by a class that overrides one of
    them.

    ``accumulates``: the running score ``S <- a S + b x`` over all steps up to the last mask change counts, not the last
    step alone (masks; ``a`` and ``b`` are the options ``momentum_decay`` and ``momentum_gain``). Channels always add up
    the batches that they are given. ``degree``: the power of the gradient in a step's score, by which a loss scale is
    undone. ``needs``: what it needs beyond weights and gradients, which masks cannot give; such a criterion has
    ``of_slices``. Channels prefer ``each_example`` where there is one.
    """

    needs_gradient: bool = True
    elementwise: bool = False
    accumulates: bool = False
    degree: int = 1
    needs: str = ""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def __init_subclass__(cls) -> None:
        own = vars(cls)
        if "elementwise" not in own and not own.keys().isdisjoint(["score", "each_step", "finish"]):
            cls.elementwise = False

    @abstractmethod
    def score(self, weight: Tensor, gradient: Tensor | None) -> Tensor:
        """What each weight contributes: a new tensor of its shape, at least float32. No argument is changed."""

    def each_step(self, total: Tensor) -> Tensor:
        """The value of a unit's sum in one step, before it is added to other steps."""
        return total

    def finish(self, total: Tensor) -> Tensor:
        """The score of a unit; a new tensor where it is not ``total`` itself."""
        return total

    def of_slices(self, slices: Slices) -> Tensor | None:
        """Channels only, instead of summing ``score``: float64 (channels,), or None to skip this axis."""
        raise NotImplementedError

    def each_example(self, change: Tensor) -> Tensor:
        """Channels only: what one example says, whose loss changes by ``change`` to first order, the sum of ``w g``
        over all that reads a channel; the score is the mean over the examples."""
        raise NotImplementedError


CRITERIA: Registry[Criterion] = Registry("criterion")


def _wide(x: Tensor) -> Tensor:
    """Half precision scores would tie and overflow."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


@CRITERIA.add("magnitude")
class Magnitude(Criterion):
    """``|w|``; a unit has the sum (l1)."""

    needs_gradient = False
    elementwise = True

    def score(self, weight: Tensor, gradient: Tensor | None) -> Tensor:
        return _wide(weight).abs()


@CRITERIA.add("l2")
class L2(Criterion):
    """``w^2``; a unit has the sum, its squared l2 norm."""

    needs_gradient = False
    elementwise = True

    def score(self, weight: Tensor, gradient: Tensor | None) -> Tensor:
        return _wide(weight).square()


@CRITERIA.add("gradient")
class Gradient(Criterion):
    """``|g|`` of the last step before the cut."""

    elementwise = True

    def score(self, weight: Tensor, gradient: Tensor | None) -> Tensor:
        assert gradient is not None
        return _wide(gradient).abs()


@CRITERIA.add("snip")
class Snip(Criterion):
    """``|w g|`` of the last step before the cut (Lee, Ajanthan & Torr 2019, arXiv:1810.02340, eq. 6)."""

    elementwise = True

    def score(self, weight: Tensor, gradient: Tensor | None) -> Tensor:
        assert gradient is not None
        return (_wide(weight) * _wide(gradient)).abs_()


@CRITERIA.add("snip_momentum")
class SnipMomentum(Snip):
    """``S <- a S + b |w g|`` over the steps; a = 1.0 and b = 0.9 unless configured."""

    accumulates = True


@CRITERIA.add("taylor")
class Taylor(Criterion):
    """``|sum_t sum_unit w g|``: how much the loss changes, to first order, when the unit becomes zero.

    Molchanov et al. 2017, arXiv:1611.06440, eq. 8. Signs count: weights of one unit may cancel. Of a channel it is the
    mean over the examples of what the loss of each changes by.
    """

    accumulates = True
    elementwise = True

    def score(self, weight: Tensor, gradient: Tensor | None) -> Tensor:
        assert gradient is not None
        return _wide(weight) * _wide(gradient)

    def finish(self, total: Tensor) -> Tensor:
        return total.abs()

    def each_example(self, change: Tensor) -> Tensor:
        return change.abs()


@CRITERIA.add("fisher")
class Fisher(Taylor):
    """``sum_t (sum_unit w g)^2``: like ``taylor``, but what raises the loss here and lowers it there counts too.

    Theis et al. 2018, arXiv:1801.05787. Where scores are kept weight by weight (N:M, ``max``, progressive), each weight
    is a unit of its own and the sum is over the squares.
    """

    degree = 2
    elementwise = True

    def each_step(self, total: Tensor) -> Tensor:
        return total.square()

    def finish(self, total: Tensor) -> Tensor:
        return total

    def each_example(self, change: Tensor) -> Tensor:
        return change.square()


@CRITERIA.add("random")
class Random(Criterion):
    """Uniform in [0, 1): the baseline that any other criterion has to beat.

    A weight's number is a hash of its value and the seed, so it stays the same while the weight does; a channel's is
    drawn by a generator.
    """

    needs_gradient = False
    elementwise = True

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self._generator = torch.Generator().manual_seed(seed)

    def score(self, weight: Tensor, gradient: Tensor | None) -> Tensor:
        bits = weight.float().contiguous().view(torch.int32).long() + self.seed * 0x9E3779B9
        for _ in range(2):
            bits = ((bits ^ (bits >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
        return (bits ^ (bits >> 16)).double().div_(1 << 32).float()

    def of_slices(self, slices: Slices) -> Tensor | None:
        return torch.rand(slices.tensor.shape[slices.dim], generator=self._generator, dtype=torch.float64)


class _Whole(Criterion):
    """A criterion that looks at whole channels."""

    needs_gradient = False

    def score(self, weight: Tensor, gradient: Tensor | None) -> Tensor:
        raise NotImplementedError


@CRITERIA.add("bn_scale")
class NormScale(_Whole):
    """``|gamma|`` of the batch norms behind a channel (Liu et al. 2017, arXiv:1708.06519); without one it stays."""

    needs = "the batch norms behind a channel"

    def of_slices(self, slices: Slices) -> Tensor | None:
        return slices.tensor.detach().double().abs() if slices.norm_scale else None


@CRITERIA.add("geometric_median")
class GeometricMedian(_Whole):
    """``sum_j ||w_i - w_j||``: a filter near all others can be replaced by them (He et al. 2019, arXiv:1811.00250)."""

    needs = "the distances between whole filters"

    def of_slices(self, slices: Slices) -> Tensor | None:
        if slices.tensor.dim() < 2 or slices.reads:
            return None
        lines = slices.lines()
        return torch.cdist(lines, lines).sum(1)


@CRITERIA.add("activation")
class Activation(_Whole):
    """``mean |x|`` of what the layers behind a channel read."""

    needs = "the activations that layers read"

    def of_slices(self, slices: Slices) -> Tensor | None:
        return slices.activations if slices.activations is not None and slices.activations.any() else None
