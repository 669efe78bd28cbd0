"""Exact match and F1 of SQuAD: numbers made by hand, and a second, slower reading of the official definition."""

from __future__ import annotations

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.qa.metrics import evaluate, evaluate_v2, normalize, token_f1, token_f1_v2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat, a dog; an  owl!", "cat dog owl"),
        ("theatre another Athens a1", "theatre another athens a1"),  # articles are whole words
        ("the-atre", "theatre"),  # punctuation goes first
        ("a.b. the. A", "ab"),
        ("U.S.A.", "usa"),
        ("$1,000.50", "100050"),
        ("The", ""),
        (" \t\n", ""),
        ("...", ""),
        ("tab\tnew\nline\u00a0hard\u3000wide", "tab new line hard wide"),
        ("Éclair À LA carte", "éclair à la carte"),
        ("a\u0301 la", "\u0301 la"),  # a decomposed accent is no letter: the a before it stands alone
        ("“The” cat\u2019s", "“ ” cat\u2019s"),  # curly quotes are no ASCII punctuation
        ("東京、日本。", "東京、日本。"),
        ("the東京 the 東京", "the東京 東京"),
        ("STRASSE straße", "strasse straße"),  # lower, not casefold
        ("İ", "i\u0307"),
        ("x_the_y", "xthey"),
    ],
)
def test_golden_normalization(text, expected):
    assert normalize(text) == expected


@pytest.mark.parametrize(
    ("prediction", "gold", "v1", "v2"),
    [
        ("x y", "x y", 1, 1),
        ("x y z", "x", 1 / 2, 1 / 2),  # P 1/3, R 1
        ("x x x", "x x y", 2 / 3, 2 / 3),  # two shared x of three each
        ("x x", "x", 2 / 3, 2 / 3),  # P 1/2, R 1
        ("x", "y", 0, 0),
        ("", "y", 0, 0),
        ("x", "", 0, 0),
        ("", "", 0, 1),  # what v1.1 and v2.0 differ in
    ],
)
def test_golden_f1(prediction, gold, v1, v2):
    assert token_f1(prediction.split(), gold.split()) == pytest.approx(v1)
    assert token_f1_v2(prediction.split(), gold.split()) == pytest.approx(v2)


def test_golden_v1():
    golds = {
        "one": ["The Eiffel Tower", "tower"],  # equal to the second: 1 and 1
        "two": ["Paris, France", "the city of Paris"],  # P 1, R 1/2 against P 1, R 1/3: F1 2/3
        "three": ["42"],  # empty prediction: 0
        "four": ["東京"],  # Chinese is not cut into characters: 0
    }
    predictions = {"one": "Tower.", "two": "paris", "three": "", "four": "東京都", "not asked": "x"}
    assert evaluate(predictions, golds) == {"exact_match": 25.0, "f1": pytest.approx(100 * (1 + 2 / 3) / 4)}


def test_exact_match_and_f1_may_come_from_different_gold_answers():
    assert evaluate({"q": "x y"}, {"q": ["z", "x"]}) == {"exact_match": 0, "f1": pytest.approx(200 / 3)}


def test_two_empty_answers_are_an_exact_match_without_f1_in_v1():
    assert evaluate({"q": "the"}, {"q": ["a"]}) == {"exact_match": 100, "f1": 0}


GOLDS = {"a": ["x y"], "b": ["z", "the z z"], "c": [], "d": [], "e": ["The"]}
SPANS = {"a": "x", "b": "z", "c": "w", "d": "", "e": "v"}
SURENESS = {"a": 0.1, "b": 0.7, "c": 0.6, "d": 0.9, "e": 0.8}


def test_golden_v2():
    # a: P 1, R 1/2: F1 2/3. b right. c should be empty. d right. e: no gold answer stays, so that only "" is right.
    assert evaluate_v2(SPANS, GOLDS) == {
        **{"exact": 40, "f1": pytest.approx(100 * (2 / 3 + 1 + 1) / 5), "total": 5},
        **{"HasAns_exact": pytest.approx(100 / 3), "HasAns_f1": pytest.approx(100 * (5 / 3) / 3), "HasAns_total": 3},
        **{"NoAns_exact": 50, "NoAns_f1": 50, "NoAns_total": 2},
    }


def test_golden_v2_with_a_threshold():
    # Above 0.65 are b, now wrong, d, still right, and e: it has an answer, even if nothing is left of it.
    result = evaluate_v2(SPANS, GOLDS, SURENESS, threshold=0.65)
    assert (result["exact"], result["f1"]) == (20, pytest.approx(100 * (2 / 3 + 1) / 5))
    assert (result["HasAns_exact"], result["NoAns_exact"], result["NoAns_f1"]) == (0, 50, 50)


def test_the_threshold_itself_still_answers():
    assert evaluate_v2({"q": "x"}, {"q": ["x"]}, {"q": 0.5}, threshold=0.5)["exact"] == 100
    assert evaluate_v2({"q": "x"}, {"q": ["x"]}, {"q": 0.5}, threshold=0.49)["exact"] == 0


def test_golden_v2_best_thresholds():
    # All empty: 2 (c, d). By rising score: a +0 exact, +2/3 F1; c -1; b +1; e +0; d is empty anyway.
    result = evaluate_v2(SPANS, GOLDS, SURENESS)
    assert (result["best_exact"], result["best_exact_thresh"]) == (40, 0.0)
    assert (result["best_f1"], result["best_f1_thresh"]) == (pytest.approx(100 * (2 + 2 / 3) / 5), 0.1)


def test_v2_has_parts_only_for_questions_that_are_there():
    assert set(evaluate_v2({"q": ""}, {"q": []})) == {
        *("exact", "f1", "total", "NoAns_exact", "NoAns_f1", "NoAns_total"),
    }
    assert not any(key.startswith("NoAns") for key in evaluate_v2({"q": ""}, {"q": ["x"]}))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: evaluate({"a": "x"}, {"a": ["x"], "b": ["y"]}), "question 'b' has no prediction"),
        (lambda: evaluate({"a": "x"}, {"a": []}), "question 'a' has no gold answer; v1.1 .*"),
        (lambda: evaluate({}, {}), "there are no questions"),
        (lambda: evaluate_v2({"a": ""}, {"a": [], "b": []}), "question 'b' has no prediction"),
        (lambda: evaluate_v2({"a": ""}, {"a": []}, {}), "question 'a' has no no-answer score"),
        (lambda: evaluate_v2({}, {}), "there are no questions"),
    ],
)
def test_what_cannot_be_judged(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- a second reading -----------------------------------------------------------------------------------------------


def slow_tokens(text: str) -> list[str]:
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    words = []  # a word in the sense of \b: letters, digits and nothing else, as the underscore is punctuation
    for character in kept:
        if words and words[-1][-1].isalnum() and character.isalnum():
            words[-1] += character
        else:
            words.append(character)
    return "".join(" " if word in ("a", "an", "the") else word for word in words).split()


def slow_scores(prediction: str, answers: list[str], v2: bool) -> tuple[float, float]:
    guess, exact, f1 = slow_tokens(prediction), 0.0, 0.0
    answers = ([answer for answer in answers if slow_tokens(answer)] or [""]) if v2 else answers
    for answer in answers:
        left = slow_tokens(answer)
        total = len(left) + len(guess)
        both_empty = 1.0 if v2 else 0.0
        exact = max(exact, float(left == guess))
        shared = 0
        for token in guess:
            if token in left:
                left.remove(token)
                shared += 1
        f1 = max(f1, 2 * shared / total if total else both_empty)
    return exact, f1


def slow_best(scores: dict[str, float], spans: dict, golds: dict, sureness: dict) -> list[tuple[float, float]]:
    """Every threshold between two scores, and its percentage."""
    found = []
    for threshold in [0.0, *sorted(sureness.values())]:
        right = 0.0
        for question, answers in golds.items():
            answered = sureness[question] <= threshold and (answers or spans[question])
            right += (scores[question] if answers else 0) if answered else (not answers)
        found.append((100 * right / len(golds), threshold))
    return found


PIECES = [
    "a",
    "An",
    "the",
    "The",
    "x",
    "X",
    "y",
    "theatre",
    "é",
    "e\u0301",
    "東京",
    "“",
    "\u2019",
    ".",
    "-",
    "_",
    " ",
    "  ",
    "\n",
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=7).map("".join) | st.text(max_size=8)


@given(TEXTS)
@settings(deadline=None, max_examples=300)
def test_normalization_agrees_with_the_slow_one(text):
    assert normalize(text).split() == slow_tokens(text)


@given(st.lists(st.tuples(TEXTS, st.lists(TEXTS, min_size=1, max_size=3)), min_size=1, max_size=6))
@settings(deadline=None, max_examples=200)
def test_v1_agrees_with_the_slow_one(questions):
    result = evaluate(
        {str(i): guess for i, (guess, _) in enumerate(questions)},
        {str(i): answers for i, (_, answers) in enumerate(questions)},
    )
    pairs = [slow_scores(guess, answers, v2=False) for guess, answers in questions]
    exact, f1 = (100 * sum(side) / len(pairs) for side in zip(*pairs, strict=True))
    assert result == {"exact_match": pytest.approx(exact), "f1": pytest.approx(f1)}


@given(st.lists(st.tuples(TEXTS, st.lists(TEXTS, max_size=2)), min_size=1, max_size=6), st.data())
@settings(deadline=None, max_examples=200)
def test_v2_agrees_with_the_slow_one(questions, data):
    spans = {str(i): guess for i, (guess, _) in enumerate(questions)}
    golds = {str(i): answers for i, (_, answers) in enumerate(questions)}
    # Probabilities that differ: equal ones are no thresholds between questions.
    ranks = data.draw(st.permutations(range(1, len(golds) + 1)))
    sureness = {question: rank / 10 for question, rank in zip(golds, ranks, strict=True)}
    threshold = data.draw(st.sampled_from([0.0, 0.25, 0.3, 1.0]))
    result = evaluate_v2(spans, golds, sureness, threshold)
    pairs = {question: slow_scores(spans[question], golds[question], v2=True) for question in golds}
    for side, name in enumerate(("exact", "f1")):
        raw = {question: pair[side] for question, pair in pairs.items()}
        final = {q: float(not golds[q]) if sureness[q] > threshold else raw[q] for q in golds}
        for prefix, asked in (
            ("", list(golds)),
            ("HasAns_", [question for question in golds if golds[question]]),
            ("NoAns_", [question for question in golds if not golds[question]]),
        ):
            assert result.get(f"{prefix}total", 0) == len(asked)
            if asked:
                expected = 100 * sum(final[question] for question in asked) / len(asked)
                assert result[f"{prefix}{name}"] == pytest.approx(expected)
        found = slow_best(raw, spans, golds, sureness)
        assert result[f"best_{name}"] == pytest.approx(max(found)[0])
        reached = next(value for value, at in found if at == result[f"best_{name}_thresh"])
        assert reached == pytest.approx(result[f"best_{name}"])
