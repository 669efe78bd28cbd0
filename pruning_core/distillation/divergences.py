"""Divergences of a student's outputs from a teacher's. A kind is one class and one registry line."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from pruning_core.registry import Registry

# Lower bound of denominators, against 0 / 0 where teacher scores or features vanish. One point with a teacher logit of
# -10 already weighs 4.5e-5, so only a teacher without any detection comes below it; its loss fades to 0.
EPS = 1e-6


class Distillation(ABC):
    """Divergence of student from teacher at each point; value and gradient are 0 where they are equal.

    Both are logits in at least float32; the teacher's carry no gradient.
    """

    @abstractmethod
    def scores(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """(B, C, A) logits, one sigmoid per class -> (B, A), summed over the classes."""

    @abstractmethod
    def bins(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """(B, S, R, A) logits, one softmax over the R distance bins of each side -> (B, A), the mean of the S sides."""

    @abstractmethod
    def classes(self, student: Tensor, teacher: Tensor, temperature: float, counts: Tensor) -> Tensor:
        """(B, C) logits, one softmax over classes or over span positions -> (B,).

        ``counts``: bool (B, C); False entries (padding) take no part. Each row has at least one True.
        """


DISTILLATIONS: Registry[Distillation] = Registry("distillation")


@DISTILLATIONS.add("l2")
class SquaredDifference(Distillation):
    """Squared differences of probabilities, expected distances or logits; the temperature is not used."""

    def scores(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """``sum_c (sigmoid(s_c) - sigmoid(t_c))^2``."""
        return (student.sigmoid() - teacher.sigmoid()).square().sum(1)

    def bins(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """``mean_sides (E_s - E_t)^2`` with ``E = sum_r r softmax_r``, the expected distance in grid cells."""
        distance = torch.arange(student.shape[2], device=student.device, dtype=student.dtype)[:, None]
        return ((student.softmax(2) - teacher.softmax(2)) * distance).sum(2).square().mean(1)

    def classes(self, student: Tensor, teacher: Tensor, temperature: float, counts: Tensor) -> Tensor:
        """``mean_c (s_c - t_c)^2`` of the logits, which serves regression as well."""
        return ((student - teacher).square() * counts).sum(1) / counts.sum(1)


@DISTILLATIONS.add("kl")
class KLDivergence(Distillation):
    """``T^2 KL(teacher || student)`` of ``logits / T`` (Hinton et al. 2015, arXiv:1503.02531).

    ``T^2`` makes up for the gradient of the KL, which falls with ``1 / T^2``.

    The gradient is computed as the student's probability minus the teacher's, both from the same operations: it is
    exactly 0 at equality, which the textbook form with two logarithms misses by rounding.
    """

    def scores(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """``T^2 sum_c KL(Bernoulli(sigmoid(t_c / T)) || Bernoulli(sigmoid(s_c / T)))``: cross entropy minus entropy."""
        s, t = student / temperature, teacher / temperature
        p = t.sigmoid()
        crossed = binary_cross_entropy_with_logits(s, p, reduction="none")
        own = binary_cross_entropy_with_logits(t, p, reduction="none")
        return temperature**2 * (crossed - own).sum(1)

    def bins(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """``T^2 mean_sides KL(softmax(t / T) || softmax(s / T))``."""
        return temperature**2 * _softmax_kl(student / temperature, teacher / temperature, 2).mean(1)

    def classes(self, student: Tensor, teacher: Tensor, temperature: float, counts: Tensor) -> Tensor:
        """``T^2 KL(softmax(t / T) || softmax(s / T))``."""
        lowest = torch.finfo(student.dtype).min  # not -inf: its difference from itself is NaN
        s, t = (x.div(temperature).masked_fill(~counts, lowest) for x in (student, teacher))
        return temperature**2 * _softmax_kl(s, t, 1)


def _softmax_kl(s: Tensor, t: Tensor, dim: int) -> Tensor:
    """``sum_r p_r (t_r - s_r) + lse(s) - lse(t)`` with ``p = softmax(t)``."""
    lse = t.logsumexp(dim, keepdim=True)
    p = (t - lse).exp()
    return (p * (t - s)).sum(dim) + s.logsumexp(dim) - lse.squeeze(dim)


class Losses:
    """Options of a distillation: ``kind`` of divergence, ``temperature`` of kl, ``feature_weight`` (0: no term)."""

    def __init__(self, *, kind: str, temperature: float = 2.0, feature_weight: float = 0.0) -> None:
        try:
            self.divergence = DISTILLATIONS[kind]()
        except ValueError as error:
            raise ValueError(f"dist_loss: {error}") from None
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"temperature: must be finite and above 0, got {temperature!r}; use for example 2.0")
        if not (math.isfinite(feature_weight) and feature_weight >= 0):
            raise ValueError(
                f"feature_weight: must be finite and at least 0, got {feature_weight!r}; use 0 for no feature term"
            )
        self.temperature, self.feature_weight = temperature, feature_weight


def wide(x: Tensor) -> Tensor:
    """Casts to at least float32: in half precision, as from autocast, squares overflow and small differences vanish."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
