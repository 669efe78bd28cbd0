"""The GLUE tasks and local files: which columns are read, what the labels are called, which numbers judge a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from apps.common.errors import BadInput


@dataclass(frozen=True)
class Task:
    """``labels`` in the order of their numbers; None for a regression."""

    name: str
    columns: tuple[str, ...]
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]
    main: str  # what a progress bar and the table of results show
    validation: tuple[str, ...] = ("validation",)  # the splits that judge a model


_PAIR = ("sentence1", "sentence2")
_ENTAILED = ("entailment", "not_entailment")
_ACCURACY, _WITH_F1 = ("accuracy",), ("accuracy", "f1")
_CORRELATIONS = ("pearson", "spearmanr")
_MNLI = ("entailment", "neutral", "contradiction")
_MNLI_SPLITS = ("validation_matched", "validation_mismatched")

# Columns and labels as the `glue` data set of the hub has them: its label numbers are positions in these tuples.
TASKS = {
    task.name: task
    for task in (
        Task("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",), "matthews_correlation"),
        Task("sst2", ("sentence",), ("negative", "positive"), _ACCURACY, "accuracy"),
        Task("mrpc", _PAIR, ("not_equivalent", "equivalent"), _WITH_F1, "accuracy"),
        Task("stsb", _PAIR, None, _CORRELATIONS, "pearson"),
        Task("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), _WITH_F1, "accuracy"),
        Task("mnli", ("premise", "hypothesis"), _MNLI, _ACCURACY, "accuracy", _MNLI_SPLITS),
        Task("qnli", ("question", "sentence"), _ENTAILED, _ACCURACY, "accuracy"),
        Task("rte", _PAIR, _ENTAILED, _ACCURACY, "accuracy"),
        Task("wnli", _PAIR, ("not_entailment", "entailment"), _ACCURACY, "accuracy"),
    )
}


def custom_task(columns: Sequence[str], labels: Sequence[str] | None) -> Task:
    """Local files: one text column or a pair; F1 needs a positive class, so that only two labels have it."""
    if not 1 <= len(columns) <= 2:
        what = "must have one or two text columns beside the label"
        raise BadInput(f"--train_file: {what}, got {list(columns)}; leave the others out of the file")
    if labels is None:
        return Task("custom", tuple(columns), None, (*_CORRELATIONS, "mse"), "pearson")
    if len(labels) < 2:
        raise BadInput(
            f"--train_file: must have at least two labels, got {list(labels)}; there is nothing to tell apart"
        )
    return Task("custom", tuple(columns), tuple(labels), _WITH_F1 if len(labels) == 2 else _ACCURACY, "accuracy")


def compute_metrics(names: Sequence[str], predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """``predictions`` are label numbers, for a regression real numbers: no logits."""
    if predictions.shape != references.shape or predictions.ndim != 1 or not len(predictions):
        # Shapes (n, 1) and (n,) would compare everything with everything.
        raise ValueError(f"one prediction per reference is needed, got {predictions.shape} and {references.shape}")
    return {name: float(_METRICS[name](predictions, references)) for name in names}


def _accuracy(predictions: np.ndarray, references: np.ndarray) -> float:
    """``right / all``."""
    return float(np.mean(predictions == references))


def _f1(predictions: np.ndarray, references: np.ndarray) -> float:
    """``2 TP / (2 TP + FP + FN)`` of class 1; 0 where neither side has it."""
    from sklearn.metrics import f1_score

    return f1_score(references, predictions, zero_division=0.0)


def _matthews_correlation(predictions: np.ndarray, references: np.ndarray) -> float:
    """``(TP TN - FP FN) / sqrt((TP + FP) (TP + FN) (TN + FP) (TN + FN))``, and its generalisation to more classes."""
    from sklearn.metrics import matthews_corrcoef

    return 0.0 if _constant(predictions, references) else matthews_corrcoef(references, predictions)


def _pearson(predictions: np.ndarray, references: np.ndarray) -> float:
    """``cov(p, r) / (std(p) std(r))``."""
    from scipy.stats import pearsonr

    return 0.0 if _constant(predictions, references) else pearsonr(_double(predictions), _double(references))[0]


def _spearmanr(predictions: np.ndarray, references: np.ndarray) -> float:
    """Pearson's of the ranks."""
    from scipy.stats import spearmanr

    return 0.0 if _constant(predictions, references) else spearmanr(_double(predictions), _double(references))[0]


def _mse(predictions: np.ndarray, references: np.ndarray) -> float:
    """``mean((p - r)^2)``."""
    return float(np.mean((_double(predictions) - _double(references)) ** 2))


def _constant(predictions: np.ndarray, references: np.ndarray) -> bool:
    """A constant has no correlation: 0 / 0, NaN and a warning.

    A model that predicts one, fresh or pruned to death, has learned nothing: 0.0 says so, and unlike NaN it can be
    compared and drawn. NaN predictions are not constant, their result stays NaN.
    """
    return bool((predictions == predictions[0]).all() or (references == references[0]).all())


def _double(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float64)


_METRICS = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews_correlation": _matthews_correlation,
    "pearson": _pearson,
    "spearmanr": _spearmanr,
    "mse": _mse,
}
