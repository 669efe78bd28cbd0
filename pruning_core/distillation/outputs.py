"""Distillation for logits over classes, or over the positions where a span starts and ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pruning_core.distillation.divergences import EPS, Losses, wide


class Outputs(NamedTuple):
    """Raw outputs of a model for B inputs of L tokens, before softmax."""

    logits: Sequence[Tensor]  # (B, C) per head: one for classes, two for start and end of a span
    counts: Tensor | None = None  # bool (B, C): classes or positions that take part; None: all
    features: Sequence[Tensor] = ()  # (B, L, D) hidden states per layer
    tokens: Tensor | None = None  # bool (B, L): tokens that are not padding; None: all


class LogitDistillation(Losses):
    """The mean over batch and heads of the divergence of class or span logits, and of hidden states.

    ``kind``: "l2" or "kl"; ``temperature``: of "kl"; ``feature_weight``: 0 for no feature term.

    >>> student, teacher = Outputs([torch.randn(8, 3)]), Outputs([torch.randn(8, 3)])
    >>> LogitDistillation(kind="kl", temperature=4.0)(student, teacher)["logits"].shape
    torch.Size([])
    """

    def __call__(self, student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
        """The scalar ``logits``, and the weighted ``feature`` when ``feature_weight`` is above 0.

        The teacher gets no gradient. ``counts`` and ``tokens`` are read from the student.
        """
        _check("logits", student.logits, teacher.logits, 2, "use a teacher with the same classes and positions")
        terms = []
        for s, t in zip(student.logits, teacher.logits, strict=True):
            counts = torch.ones_like(s, dtype=torch.bool) if student.counts is None else student.counts
            terms.append(self.divergence.classes(wide(s), wide(t).detach(), self.temperature, counts).mean())
        losses = {"logits": torch.stack(terms).mean()}
        if self.feature_weight > 0:
            do = "use a teacher with the same layers and width"
            _check("features", student.features, teacher.features, 3, do)
            error = _feature_error(student.features, teacher.features, student.tokens)
            losses["feature"] = self.feature_weight * error
        return losses


def _feature_error(student: Sequence[Tensor], teacher: Sequence[Tensor], tokens: Tensor | None) -> Tensor:
    """``mean_layers sum (s - t)^2 / sum t^2`` over the tokens that are not padding; scale-free."""
    errors = []
    for s, t in zip(student, teacher, strict=True):
        s, t = wide(s), wide(t).detach()
        here = torch.ones_like(s[..., :1]) if tokens is None else tokens.unsqueeze(-1).to(s.dtype)
        errors.append(((s - t).square() * here).sum() / (t.square() * here).sum().clamp(min=EPS))
    return torch.stack(errors).mean()


def _check(what: str, student: Sequence[Tensor], teacher: Sequence[Tensor], dims: int, do: str) -> None:
    ours, theirs = ([tuple(each.shape) for each in outputs] for outputs in (student, teacher))
    if ours != theirs or not ours:
        raise ValueError(f"{what}: student and teacher differ, got {ours} and {theirs}; {do}")
    if any(len(shape) != dims for shape in ours):
        axes = "(batch, classes)" if dims == 2 else "(batch, tokens, width)"
        raise ValueError(f"{what}: must be {axes} each, got {ours}; pass every head or layer by itself")
