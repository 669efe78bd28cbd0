"""Distillation for anchor-free detection heads: the maths on plain tensors; no detector is known here.

A kind of divergence is one class and one registry line: ``scores`` for the classes, ``bins`` for the box sides.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from pruning_core.registry import Registry

_SIDES = 4
# One point with the teacher's logit at -10 already weighs 4.5e-5: only a teacher that sees nothing at all comes below
# this, and then the loss fades to 0 instead of being 0 / 0. A level of teacher features all zero is caught likewise.
_EPS = 1e-6


class Distillation(ABC):
    """How far the student is from the teacher at each point; 0 and without gradient where they are equal.

    Both are logits, at least float32, and the teacher's carry no gradient.
    """

    @abstractmethod
    def scores(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """(B, C, A), one sigmoid per class -> (B, A), summed over the classes."""

    @abstractmethod
    def bins(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """(B, S, R, A), one softmax over the R distance bins of each side -> (B, A), the mean of the S sides."""


DISTILLATIONS: Registry[Distillation] = Registry("distillation")


@DISTILLATIONS.add("l2")
class L2(Distillation):
    """Squared differences of what the head means; the temperature is not used."""

    def scores(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """``sum_c (sigmoid(s_c) - sigmoid(t_c))^2``."""
        return (student.sigmoid() - teacher.sigmoid()).square().sum(1)

    def bins(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """``mean_sides (E_s - E_t)^2`` with ``E = sum_r r softmax_r``, the expected distance in grid cells."""
        distance = torch.arange(student.shape[2], device=student.device, dtype=student.dtype)[:, None]
        return ((student.softmax(2) - teacher.softmax(2)) * distance).sum(2).square().mean(1)


@DISTILLATIONS.add("kl")
class KL(Distillation):
    """``T^2 KL(teacher || student)`` of logits / T (Hinton et al. 2015, arXiv:1503.02531).

    The gradient of the KL alone falls with ``1 / T^2``.

    Both are written so that the gradient is the student's probability less the teacher's, each from the same
    operations: it is exactly 0 at equality, which the textbook form with two logarithms misses by rounding.
    """

    def scores(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """``T^2 sum_c KL(Bernoulli(sigmoid(t_c / T)) || Bernoulli(sigmoid(s_c / T)))``: cross entropy less entropy."""
        s, t = student / temperature, teacher / temperature
        p = t.sigmoid()
        crossed = binary_cross_entropy_with_logits(s, p, reduction="none")
        own = binary_cross_entropy_with_logits(t, p, reduction="none")
        return temperature**2 * (crossed - own).sum(1)

    def bins(self, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """``T^2 mean_sides KL(softmax(t / T) || softmax(s / T))``, as ``sum_r p_r (t_r - s_r) + lse(s) - lse(t)``."""
        s, t = student / temperature, teacher / temperature
        lse = t.logsumexp(2, keepdim=True)
        p = (t - lse).exp()
        divergence = (p * (t - s)).sum(2) + s.logsumexp(2) - lse.squeeze(2)
        return temperature**2 * divergence.mean(1)


class Detections(NamedTuple):
    """What a head gives for B images at A points, before any sigmoid or softmax."""

    scores: Tensor  # (B, C, A)
    bins: Tensor  # (B, 4 R, A), side by side as DFL heads give them: reads as (B, 4, R, A)
    features: Sequence[Tensor] = ()  # (B, C_l, H_l, W_l) per level, in the order of the points; A = sum of H_l W_l


class DetectionDistillation:
    """``sum_a w_a d_a / sum_a w_a`` over all points of the batch, for each term ``d`` of (B, A).

    ``w = max_c sigmoid(t_c)``: a point counts as much as the teacher is sure of it. Without the weight the background,
    nearly all points of an image, is most of the loss.
    """

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

    def __call__(self, student: Detections, teacher: Detections) -> dict[str, Tensor]:
        """The scalars ``cls`` and ``box``, and ``feature`` times its weight when that is above 0."""
        _check_head(student, teacher)
        student_scores, teacher_scores = _wide(student.scores), _wide(teacher.scores).detach()
        student_bins, teacher_bins = _by_side(_wide(student.bins)), _by_side(_wide(teacher.bins).detach())
        weight = teacher_scores.amax(1).sigmoid()
        terms = {
            "cls": self.divergence.scores(student_scores, teacher_scores, self.temperature),
            "box": self.divergence.bins(student_bins, teacher_bins, self.temperature),
        }
        if self.feature_weight > 0:
            _check_features(student, teacher)
            terms["feature"] = self.feature_weight * _feature_error(student.features, teacher.features)
        total = weight.sum().clamp(min=_EPS)
        return {name: (weight * term).sum() / total for name, term in terms.items()}


def _wide(x: Tensor) -> Tensor:
    """Autocast hands over half precision, in which squares overflow and small differences are lost."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _by_side(bins: Tensor) -> Tensor:
    return bins.unflatten(1, (_SIDES, -1))


def _feature_error(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """``mean_c (s - t)^2 / mean(t^2)``, the latter over the level: has no unit. Levels -> (B, A)."""
    points = []
    for s, t in zip(student, teacher, strict=True):
        s, t = _wide(s), _wide(t).detach()
        points.append((s - t).square().mean(1).flatten(1) / t.square().mean().clamp(min=_EPS))
    return torch.cat(points, 1)


def _check_head(student: Detections, teacher: Detections) -> None:
    for name, ours, theirs in (
        ("scores", student.scores, teacher.scores),
        ("bins", student.bins, teacher.bins),
    ):
        if ours.shape != theirs.shape:
            raise ValueError(
                f"{name}: student and teacher differ, got {tuple(ours.shape)} and {tuple(theirs.shape)}; "
                "use a teacher with the same classes and head"
            )
        if ours.dim() != 3:
            raise ValueError(f"{name}: must be (batch, channels, points), got {tuple(ours.shape)}; join the levels")
    scores, bins = tuple(student.scores.shape), tuple(student.bins.shape)
    if (bins[0], bins[2]) != (scores[0], scores[2]):
        raise ValueError(
            f"bins: need the images and points of the scores {scores}, got {bins}; pass one head's outputs"
        )
    # One bin is a softmax of 1 whatever its logit: the box term would be 0 and teach nothing.
    if bins[1] % _SIDES or bins[1] < 2 * _SIDES:
        raise ValueError(f"bins: must be 4 sides of 2 or more bins each, got {bins[1]} channels; use a head with DFL")


def _check_features(student: Detections, teacher: Detections) -> None:
    ours, theirs = ([tuple(level.shape) for level in each.features] for each in (student, teacher))
    if ours != theirs:
        raise ValueError(
            f"features: student and teacher differ, got {ours} and {theirs}; use a teacher with the same layers"
        )
    points, wanted = sum(math.prod(shape[2:]) for shape in ours), student.scores.shape[2]
    if points != wanted:
        raise ValueError(
            f"features: need one point for each of the {wanted} of the scores, got {points}; "
            "pass every level, in the order of the points"
        )
