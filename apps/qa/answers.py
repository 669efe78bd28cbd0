"""From the start and end logits of an example's windows to its answer: a piece of the context, or nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from apps.common.errors import BadInput


@dataclass(frozen=True, eq=False)
class Window:
    """The tokens of a question and of a stretch of its context, as the model saw them."""

    example: int
    offsets: np.ndarray  # (tokens, 2) int32: first character and the one after the last; -1 outside the context
    start: np.ndarray  # (tokens,) logits
    end: np.ndarray
    best_context: np.ndarray | None = None  # (tokens,) bool: no other window shows more around this token
    cls: int = 0  # the token that stands for no answer

    def __post_init__(self) -> None:
        tokens = len(self.offsets)
        for logits in (self.start, self.end, self.start if self.best_context is None else self.best_context):
            if logits.shape != (tokens,):
                raise ValueError(f"a window of {tokens} tokens needs one logit for each, got {logits.shape}")


@dataclass(frozen=True)
class Answer:
    """``text`` is empty for no answer. ``span`` is the best piece of context, whatever the score of no answer.

    ``n_best`` has the keys text, probability, start_logit, end_logit, start and end, these two in characters.
    """

    text: str
    null_score_difference: float  # no answer minus the best span; inf where there is no span
    n_best: list[dict[str, Any]]
    span: str


def answer(
    context: str,
    windows: Sequence[Window],
    *,
    n_best: int,
    max_answer_length: int,
    unanswerable: bool,
    null_threshold: float,
) -> Answer:
    """``start logit + end logit`` ranks spans; no answer wins by more than ``null_threshold``.

    Its score is ``start logit + end logit`` of the cls token, in the window least sure of it: the answer may
    lie in one window, and the others rightly see none.
    """
    check_options(n_best, max_answer_length)
    if len({window.example for window in windows}) != 1:
        raise ValueError(f"the windows of one example are needed, got {[window.example for window in windows]}")
    spans = _best_spans(windows, n_best, max_answer_length)
    span = _text(context, spans[0]) if len(spans) else ""
    null = _null(windows)
    scores, null_score = _scores(spans), float(_scores(null))
    difference = null_score - float(scores[0]) if len(spans) else float("inf")
    if unanswerable:
        rank = int((scores >= null_score).sum())
        spans = np.insert(spans, rank, null, axis=0)[: max(n_best, rank + 1)]  # no answer is never dropped
    text = "" if unanswerable and difference > null_threshold else span
    return Answer(text, difference, _entries(context, spans), span)


def check_options(n_best: int, max_answer_length: int) -> None:
    if n_best < 1:
        raise BadInput(f"--n_best_size: must be at least 1, got {n_best}; 20 is usual")
    if max_answer_length < 1:
        raise BadInput(f"--max_answer_length: must be at least 1 token, got {max_answer_length}; 30 is usual")


def _best_spans(windows: Sequence[Window], n_best: int, max_answer_length: int) -> np.ndarray:
    """Equal scores: the earliest start, then the shortest, then the first window: the sort is stable."""
    spans = np.concatenate([_spans(window, n_best, max_answer_length) for window in windows])
    return spans[np.lexsort((spans[:, 1], spans[:, 0], -_scores(spans)))[:n_best]]


def _null(windows: Sequence[Window]) -> np.ndarray:
    """No answer as a span without characters, from the window where its score is lowest, of equal ones the first."""
    rows = [[0, 0, window.start[window.cls], window.end[window.cls]] for window in windows]
    nulls = np.array(rows, dtype=np.float64)
    return nulls[_scores(nulls).argmin()]


def _scores(spans: np.ndarray) -> np.ndarray:
    return spans[..., 2] + spans[..., 3]


def _spans(window: Window, n_best: int, max_answer_length: int) -> np.ndarray:
    """(spans, 4): first character, the one after the last, start logit, end logit; in the order of tokens.

    The best tokens are chosen first and those outside the context dropped then, as usual: published numbers do so.
    """
    first, last = _highest(window.start, n_best), _highest(window.end, n_best)
    inside = window.offsets[:, 0] >= 0
    starts = inside if window.best_context is None else inside & window.best_context
    first, last = first[starts[first]], last[inside[last]]
    begin, stop = window.offsets[first, 0], window.offsets[last, 1]
    length = last - first[:, None] + 1
    # A tokenizer may have tokens of no characters: their text is empty, which means no answer.
    fits = (length >= 1) & (length <= max_answer_length) & (stop > begin[:, None])
    i, j = fits.nonzero()
    # In double precision, the sum of two logits of half or single precision makes no new ties.
    spans = np.stack([begin[i], stop[j], window.start[first[i]], window.end[last[j]]], axis=1, dtype=np.float64)
    return spans[np.isfinite(spans).all(axis=1)]  # -inf is a masked token


def _highest(logits: np.ndarray, count: int) -> np.ndarray:
    """The tokens of the highest logits, in their order in the text; of equal ones the first."""
    return np.sort(np.argsort(-logits, kind="stable")[:count])


def _text(context: str, span: np.ndarray) -> str:
    return context[int(span[0]) : int(span[1])]


def _entries(context: str, spans: np.ndarray) -> list[dict[str, Any]]:
    """With softmax over the scores of the list, in plain Python numbers, as JSON needs them."""
    if not len(spans):
        return []
    scores = _scores(spans)
    weights = np.exp(scores - scores.max())
    return [
        {
            "text": _text(context, span),
            "probability": float(probability),
            "start_logit": float(span[2]),
            "end_logit": float(span[3]),
            "start": int(span[0]),
            "end": int(span[1]),
        }
        for span, probability in zip(spans, weights / weights.sum(), strict=True)
    ]
