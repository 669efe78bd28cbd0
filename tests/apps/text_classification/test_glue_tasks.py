"""The GLUE table, and its metrics against numbers made by hand."""

from __future__ import annotations

import math
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.common.errors import BadInput
from apps.text_classification.tasks import TASKS, compute_metrics, custom_task
from tests.support import ROOT

PAIR = ("sentence1", "sentence2")
ENTAILED = ("entailment", "not_entailment")


def metric(name: str, predictions: list, references: list) -> float:
    result = compute_metrics([name], np.array(predictions), np.array(references))
    assert list(result) == [name]
    assert type(result[name]) is float
    return result[name]


@pytest.mark.parametrize(
    ("name", "columns", "labels", "metrics"),
    [
        ("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",)),
        ("sst2", ("sentence",), ("negative", "positive"), ("accuracy",)),
        ("mrpc", PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1")),
        ("stsb", PAIR, None, ("pearson", "spearmanr")),
        ("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
        ("mnli", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), ("accuracy",)),
        ("qnli", ("question", "sentence"), ENTAILED, ("accuracy",)),
        ("rte", PAIR, ENTAILED, ("accuracy",)),
        ("wnli", PAIR, ENTAILED[::-1], ("accuracy",)),
    ],
)
def test_golden_table(name, columns, labels, metrics):
    task = TASKS[name]
    assert (task.name, task.columns, task.labels, task.metrics) == (name, columns, labels, metrics)


def test_the_table_is_complete():
    assert list(TASKS) == ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"]
    for task in TASKS.values():
        assert task.main == task.metrics[0]
        two_sets = ("validation_matched", "validation_mismatched")
        assert task.validation == (two_sets if task.name == "mnli" else ("validation",))


# ---- golden numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "predictions", "references", "expected"),
    [
        ("accuracy", [0, 1, 1, 2], [0, 1, 2, 2], 3 / 4),
        # 2 TP, 1 FP, 1 FN, 1 TN: P = R = 2/3. Class 0 would give 1/2, the mean of both 7/12.
        ("f1", [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], 2 / 3),
        # 1 TP, 2 FP, 0 FN: P = 1/3, R = 1.
        ("f1", [1, 1, 1, 0], [1, 0, 0, 0], 1 / 2),
        ("f1", [0, 0, 0], [1, 0, 0], 0),
        ("f1", [0, 0, 0], [0, 0, 0], 0),
        # (2*1 - 1*1) / sqrt(3 * 3 * 2 * 2)
        ("matthews_correlation", [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], 1 / 6),
        ("matthews_correlation", [1, 0, 1, 0], [0, 1, 0, 1], -1),
        ("matthews_correlation", [1, 1, 1], [0, 1, 1], 0),
        ("matthews_correlation", [1, 1, 1], [1, 1, 1], 0),
        # Deviations -1 0 1 and -3 -1 4: 7 / sqrt(2 * 26).
        ("pearson", [1, 2, 3], [1.0, 3.0, 8.0], 7 / math.sqrt(52)),
        ("spearmanr", [1, 2, 3], [1.0, 3.0, 8.0], 1),
        # Ranks 1 2.5 2.5 4 and 1 2 3 4: deviations -1.5 0 0 1.5 and -1.5 -0.5 0.5 1.5.
        ("spearmanr", [1, 2, 2, 9], [1.0, 3.0, 5.0, 8.0], 4.5 / math.sqrt(4.5 * 5)),
        ("mse", [1, 2, 5], [1.0, 4.0, 4.0], 5 / 3),
    ],
)
def test_golden_metrics(name, predictions, references, expected):
    assert metric(name, predictions, references) == pytest.approx(expected, abs=1e-12)


def test_several_metrics_keep_their_order():
    result = compute_metrics(("f1", "accuracy"), np.array([1, 0]), np.array([1, 1]))
    assert list(result.items()) == [("f1", pytest.approx(2 / 3)), ("accuracy", 0.5)]
    assert all(type(value) is float for value in result.values())


@pytest.mark.parametrize("name", ["pearson", "spearmanr", "matthews_correlation"])
@pytest.mark.parametrize(
    ("predictions", "references"), [([1, 1, 1], [0, 1, 2]), ([0, 1, 2], [1, 1, 1]), ([3, 3], [3, 3]), ([1], [1])]
)
def test_a_constant_correlates_with_nothing(name, predictions, references):
    assert metric(name, predictions, references) == 0.0  # a warning is an error in this suite


@pytest.mark.parametrize("name", ["pearson", "spearmanr", "mse"])
def test_nan_predictions_are_not_hidden(name):
    assert math.isnan(metric(name, [1.0, math.nan, 3.0], [1.0, 2.0, 3.0]))


def test_half_precision_is_summed_in_double():
    predictions, references = np.array([300, 0], dtype=np.float16), np.array([0, 0], dtype=np.float16)
    assert compute_metrics(["mse"], predictions, references) == {"mse": 45000.0}
    rising = np.arange(2048, dtype=np.float16)
    assert compute_metrics(["pearson"], rising, rising)["pearson"] == pytest.approx(1)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=30))
@settings(deadline=None, max_examples=30)
def test_binary_metrics_are_their_formulas(pairs):
    predictions, references = (list(side) for side in zip(*pairs, strict=True))
    tp, fp, fn, tn = (pairs.count(pair) for pair in [(1, 1), (1, 0), (0, 1), (0, 0)])
    assert metric("accuracy", predictions, references) == pytest.approx((tp + tn) / len(pairs))
    assert metric("f1", predictions, references) == pytest.approx(2 * tp / max(2 * tp + fp + fn, 1))
    under = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    expected = (tp * tn - fp * fn) / under if under else 0
    assert metric("matthews_correlation", predictions, references) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("predictions", "references"), [(np.zeros((3, 1)), np.zeros(3)), (np.zeros(2), np.zeros(3)), ([], [])]
)
def test_one_prediction_per_reference(predictions, references):
    with pytest.raises(ValueError, match="one prediction per reference is needed"):
        compute_metrics(["accuracy"], np.array(predictions), np.array(references))


# ---- local files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "labels", "metrics", "main"),
    [
        (["text"], ["no", "yes"], ("accuracy", "f1"), "accuracy"),
        (["a", "b"], ["x", "y", "z"], ("accuracy",), "accuracy"),
        (["a", "b"], None, ("pearson", "spearmanr", "mse"), "pearson"),
    ],
)
def test_custom_tasks(columns, labels, metrics, main):
    task = custom_task(columns, labels)
    assert (task.name, task.columns, task.metrics, task.main) == ("custom", tuple(columns), metrics, main)
    assert task.labels == (None if labels is None else tuple(labels))
    hash(task)  # nothing in it can be changed


@pytest.mark.parametrize(
    ("columns", "labels", "message"),
    [
        ([], None, r"--train_file: must have one or two text columns .*, got \[\]; .*"),
        (["a", "b", "c"], ["x", "y"], r"--train_file: must have one or two text columns .*, got \['a', 'b', 'c'\]; .*"),
        (["a"], ["x"], r"--train_file: must have at least two labels, got \['x'\]; .*"),
        (["a"], [], r"--train_file: must have at least two labels, got \[\]; .*"),
    ],
)
def test_files_that_are_no_task(columns, labels, message):
    with pytest.raises(BadInput) as caught:
        custom_task(columns, labels)
    assert re.fullmatch(message, str(caught.value))


def test_the_table_is_read_without_the_slow_imports():
    code = "import sys, apps.text_classification.tasks; print({'sklearn', 'scipy', 'torch'} & set(sys.modules))"
    root = ROOT
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
