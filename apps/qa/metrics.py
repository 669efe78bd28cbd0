"""SQuAD's numbers as its official evaluation scripts define them: v1.1, and v2.0 with unanswerable questions.

They are meant to be compared with published ones, so that the scripts' quirks are kept and named here.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping

# ASCII only, as in the official scripts: curly quotes and the marks of other scripts stay, and are part of their word.
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")

Scores = dict[str, float]  # question -> 0..1


def normalize(text: str) -> str:
    """Lower case, no punctuation, no articles, single blanks. In this order: ``the-atre`` is a theatre."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def token_f1(prediction: list[str], gold: list[str]) -> float:
    """``2 P R / (P + R)``, P and R the shared tokens over the tokens of the prediction and of the gold answer.

    A token counts as often as both have it. Nothing shared is 0, two empty answers too.
    """
    shared = sum((Counter(prediction) & Counter(gold)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(prediction), shared / len(gold)
    return 2 * precision * recall / (precision + recall)


def token_f1_v2(prediction: list[str], gold: list[str]) -> float:
    """As v1.1, but where one is empty the answers are equal or not."""
    return token_f1(prediction, gold) if prediction and gold else float(prediction == gold)


def evaluate(predictions: Mapping[str, str], golds: Mapping[str, list[str]]) -> dict[str, float]:
    """v1.1, in percent: the mean over questions of the best over gold answers."""
    _check(golds, predictions, "prediction")
    exact, f1 = 0.0, 0.0
    for question, answers in golds.items():
        if not answers:
            raise ValueError(f"question {question!r} has no gold answer; v1.1 has no unanswerable questions")
        prediction = normalize(predictions[question])
        texts = [normalize(answer) for answer in answers]
        exact += prediction in texts
        f1 += max(token_f1(prediction.split(), text.split()) for text in texts)
    return {"exact_match": 100 * exact / len(golds), "f1": 100 * f1 / len(golds)}


def evaluate_v2(
    predictions: Mapping[str, str],
    golds: Mapping[str, list[str]],
    no_answer_scores: Mapping[str, float] | None = None,
    threshold: float = math.inf,
) -> dict[str, float]:
    """v2.0, in percent. A question without gold answers is unanswerable, and its answer is empty.

    A prediction whose no-answer score is above ``threshold`` counts as empty; without one, predictions count as given.
    With scores also the best that a threshold reaches: for that ``predictions`` should be spans, not emptied before.
    """
    _check(golds, predictions, "prediction")
    if no_answer_scores is not None:
        _check(golds, no_answer_scores, "no-answer score")
    raw_exact, raw_f1 = _scores(predictions, golds)
    exact = _emptied(raw_exact, golds, no_answer_scores, threshold)
    f1 = _emptied(raw_f1, golds, no_answer_scores, threshold)
    result = _means("", exact, f1, golds)
    result |= _means("HasAns_", exact, f1, [question for question in golds if golds[question]])
    result |= _means("NoAns_", exact, f1, [question for question in golds if not golds[question]])
    if no_answer_scores is not None:
        for name, scores in (("best_exact", raw_exact), ("best_f1", raw_f1)):
            result[name], result[f"{name}_thresh"] = _best(scores, predictions, golds, no_answer_scores)
    return result


def _scores(predictions: Mapping[str, str], golds: Mapping[str, list[str]]) -> tuple[Scores, Scores]:
    exact: Scores = {}
    f1: Scores = {}
    for question, answers in golds.items():
        prediction = normalize(predictions[question])
        texts = [text for text in map(normalize, answers) if text] or [""]
        exact[question] = float(prediction in texts)
        f1[question] = max(token_f1_v2(prediction.split(), text.split()) for text in texts)
    return exact, f1


def _emptied(
    scores: Scores, golds: Mapping[str, list[str]], no_answer_scores: Mapping[str, float] | None, threshold: float
) -> Scores:
    """Above the threshold the answer is empty: right if and only if the question is unanswerable."""
    if no_answer_scores is None:
        return scores
    return {
        question: float(not golds[question]) if no_answer_scores[question] > threshold else score
        for question, score in scores.items()
    }


def _means(prefix: str, exact: Scores, f1: Scores, questions: Iterable[str]) -> dict[str, float]:
    """Nothing for no questions: a set of answerable ones has no ``NoAns_``."""
    asked = list(questions)
    if not asked:
        return {}
    total = len(asked)
    return {
        f"{prefix}exact": 100 * sum(exact[question] for question in asked) / total,
        f"{prefix}f1": 100 * sum(f1[question] for question in asked) / total,
        f"{prefix}total": total,
    }


def _best(
    scores: Scores,
    predictions: Mapping[str, str],
    golds: Mapping[str, list[str]],
    no_answer_scores: Mapping[str, float],
) -> tuple[float, float]:
    """The best percentage, and the lowest no-answer score that reaches it as a threshold.

    All answers are empty at first and filled one by one, by rising no-answer score. As in the official script the start
    is called 0.0, which is below every score if they are probabilities, and equal scores are filled one by one as well.
    """
    current = best = float(sum(not answers for answers in golds.values()))
    threshold = 0.0
    for question in sorted(no_answer_scores, key=no_answer_scores.__getitem__):
        if question not in golds:
            continue
        if golds[question]:
            current += scores[question]
        elif predictions[question]:
            current -= 1
        if current > best:
            best, threshold = current, no_answer_scores[question]
    return 100 * best / len(golds), threshold


def _check(golds: Mapping[str, list[str]], given: Mapping[str, object], what: str) -> None:
    """The official scripts count a question without prediction as 0 or leave it out: here it is a mistake."""
    if not golds:
        raise ValueError("there are no questions")
    missing = next((question for question in golds if question not in given), None)
    if missing is not None:
        raise ValueError(f"question {missing!r} has no {what}")
