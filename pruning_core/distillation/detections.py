"""Distillation for anchor-free detection heads, on plain tensors; no detector class is known here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pruning_core.distillation.divergences import EPS, Losses, wide

_SIDES = 4


class Detections(NamedTuple):
    """Raw outputs of a head for B images at A points, before sigmoid and softmax."""

    scores: Tensor  # (B, C, A)
    bins: Tensor  # (B, 4 R, A), R distance bins per side, as DFL heads give them: (B, 4, R, A) flattened
    features: Sequence[Tensor] = ()  # (B, C_l, H_l, W_l) per level in the order of the points; A = sum H_l W_l


class DetectionDistillation(Losses):
    """``sum_a w_a d_a / sum_a w_a`` over all points of the batch, for each term ``d`` of shape (B, A).

    ``w = max_c sigmoid(t_c)`` is the teacher's confidence. Without it the background, nearly all points of an image,
    would be most of the loss. ``kind``: "l2" or "kl"; ``temperature``: of "kl"; ``feature_weight``: 0 for no feature
    term.

    >>> losses = DetectionDistillation(kind="kl")(student, teacher)  # two Detections
    >>> sum(losses.values()).backward()
    """

    def __call__(self, student: Detections, teacher: Detections) -> dict[str, Tensor]:
        """The scalars ``cls`` and ``box``, and the weighted ``feature`` when ``feature_weight`` is above 0.

        The teacher gets no gradient. ValueError where the shapes of student and teacher differ.
        """
        _check_head(student, teacher)
        student_scores, teacher_scores = wide(student.scores), wide(teacher.scores).detach()
        student_bins, teacher_bins = _by_side(wide(student.bins)), _by_side(wide(teacher.bins).detach())
        weight = teacher_scores.amax(1).sigmoid()
        terms = {
            "cls": self.divergence.scores(student_scores, teacher_scores, self.temperature),
            "box": self.divergence.bins(student_bins, teacher_bins, self.temperature),
        }
        if self.feature_weight > 0:
            _check_features(student, teacher)
            terms["feature"] = self.feature_weight * _feature_error(student.features, teacher.features)
        total = weight.sum().clamp(min=EPS)
        return {name: (weight * term).sum() / total for name, term in terms.items()}


def _by_side(bins: Tensor) -> Tensor:
    return bins.unflatten(1, (_SIDES, -1))


def _feature_error(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Levels -> (B, A): ``mean_c (s - t)^2 / mean(t^2)``, the denominator over the whole level; scale-free."""
    points = []
    for s, t in zip(student, teacher, strict=True):
        s, t = wide(s), wide(t).detach()
        points.append((s - t).square().mean(1).flatten(1) / t.square().mean().clamp(min=EPS))
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
