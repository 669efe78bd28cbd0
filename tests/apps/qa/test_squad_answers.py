"""From logits to answers: cases made by hand, and a slow double loop over all pairs of tokens."""

from __future__ import annotations

import json
import math
import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.common.errors import BadInput
from apps.qa.answers import Answer, Window, answer, check_options

CONTEXT = "Ada met Bob in Rome"
WORDS = [(0, 3), (4, 7), (8, 11), (12, 14), (15, 19)]
OUT = (-1, -1)


def window(start: dict[int, float], end: dict[int, float], *, words: list = WORDS, **others) -> Window:
    """[CLS] question [SEP] words [SEP]: the words are the tokens from 3 on. Other logits are -10."""
    offsets = np.array([OUT, OUT, OUT, *words, OUT], dtype=np.int32)
    logits = np.full((2, len(offsets)), -10, dtype=np.float32)
    for side, given_logits in zip(logits, (start, end), strict=True):
        for token, logit in given_logits.items():
            side[token] = logit
    return Window(**{"example": 0, "offsets": offsets, "start": logits[0], "end": logits[1], **others})


def ask(*windows: Window, context: str = CONTEXT, **options) -> Answer:
    usual = {"n_best": 20, "max_answer_length": 30, "unanswerable": False, "null_threshold": 0.0}
    return answer(context, windows, **{**usual, **options})


def test_golden_span():
    found = ask(window({3: 1, 5: 3}, {5: 2, 7: 1}), n_best=2)
    assert (found.text, found.span) == ("Bob", "Bob")
    assert [(entry["text"], entry["start"], entry["end"]) for entry in found.n_best] == [
        ("Bob", 8, 11),
        ("Bob in Rome", 8, 19),
    ]
    best, second = found.n_best
    assert (best["start_logit"], best["end_logit"], second["end_logit"]) == (3, 2, 1)
    assert best["probability"] == pytest.approx(1 / (1 + math.exp(-1)))  # scores 5 and 4
    assert second["probability"] == pytest.approx(1 / (1 + math.exp(1)))
    assert found.null_score_difference == -20 - 5


def test_n_best_is_plain_python():
    found = ask(window({3: 1}, {4: 1}), unanswerable=True)
    assert json.loads(json.dumps(found.n_best)) == found.n_best
    assert type(found.null_score_difference) is float


def test_an_end_before_the_start_is_no_answer():
    assert ask(window({7: 5, 4: 1}, {3: 5, 6: 1}), n_best=2).text == "met Bob in"


@pytest.mark.parametrize(("longest", "expected"), [(5, "Ada met Bob in Rome"), (4, "Ada met Bob in"), (1, "Ada")])
def test_length_is_counted_in_tokens(longest, expected):
    assert ask(window({3: 9}, {7: 5, 6: 4, 3: 3}), max_answer_length=longest).text == expected


def test_tokens_outside_the_context_take_their_places_among_the_best():
    """Without room for others, the best tokens of the question leave no answer."""
    asked = window({1: 9, 3: 5}, {2: 9, 4: 5})
    assert ask(asked, n_best=2).text == "Ada met"
    assert ask(asked, n_best=1) == Answer("", float("inf"), [], "")


@pytest.mark.parametrize("unanswerable", [False, True])
def test_nothing_valid_is_no_answer(unanswerable):
    nothing = Window(0, np.array([OUT, OUT], dtype=np.int32), np.zeros(2), np.zeros(2))
    found = ask(nothing, unanswerable=unanswerable, null_threshold=float("inf"))
    assert (found.text, found.span, found.null_score_difference) == ("", "", float("inf"))
    null = {"text": "", "probability": 1.0, "start_logit": 0.0, "end_logit": 0.0, "start": 0, "end": 0}
    assert found.n_best == ([null] if unanswerable else [])


def test_tokens_without_characters_are_no_answer():
    words = [(0, 0), (0, 3), (3, 3)]
    assert ask(window({3: 9, 5: 9}, {3: 9, 4: 1, 5: 2}, words=words), n_best=3).text == "Ada"
    assert ask(window({3: 9}, {3: 9}, words=words), n_best=1).span == ""


def test_masked_tokens_are_no_answer():
    masked = window({3: -np.inf, 4: 1}, {3: 9, 4: 1}, words=WORDS[:2])
    assert [entry["text"] for entry in ask(masked).n_best] == ["met"]


# ---- ties -----------------------------------------------------------------------------------------------------------


def test_ties_are_the_earliest_start_then_the_shortest():
    flat = dict.fromkeys(range(3, 8), 0.0)
    texts = [entry["text"] for entry in ask(window(flat, flat), n_best=5, max_answer_length=2).n_best]
    assert texts == ["Ada", "Ada met", "met", "met Bob", "Bob"]
    assert ask(window(dict.fromkeys(range(9), 1.0), dict.fromkeys(range(9), 1.0)), n_best=4).text == "Ada"


def test_ties_of_single_precision_sums_are_none():
    """``16777216 + 1`` is no number of single precision: the sum would be equal to ``16777216 + 0``."""
    found = ask(window({3: 0, 4: 1}, {4: 16777216}))
    assert found.text == "met"


def test_ties_go_to_the_first_window():
    one, two = window({3: 1}, {3: 2}), window({3: 2}, {3: 1})
    assert ask(one, two).n_best[0]["start_logit"] == 1
    assert ask(two, one).n_best[0]["start_logit"] == 2


def test_ties_of_tokens_of_one_character_go_to_the_first():
    """A byte-level tokenizer cuts an emoji into tokens that all have its offsets."""
    found = ask(window({3: 1, 4: 2}, {3: 2, 4: 1}, words=[(0, 1), (0, 1)]), context="🌍")
    assert [entry["start_logit"] for entry in found.n_best] == [1, 2, 1]


# ---- windows --------------------------------------------------------------------------------------------------------


def test_the_best_of_all_windows_wins():
    left = window({3: 2}, {4: 2}, words=WORDS[:3])
    right = window({4: 3}, {5: 3}, words=WORDS[2:])
    found = ask(left, right, n_best=2)
    assert found.text == "in Rome"
    assert [entry["text"] for entry in found.n_best] == ["in Rome", "Ada met"]


def test_a_token_starts_only_where_it_has_most_context():
    left = window({5: 9}, {5: 9}, words=WORDS[:3], best_context=np.array([False] * 3 + [True, True, False, False]))
    right = window({3: 1}, {4: 1}, words=WORDS[2:], best_context=np.array([False] * 3 + [True] * 3 + [False]))
    assert ask(left, right).text == "Bob in"
    right = Window(0, right.offsets, right.start, right.end)
    assert ask(window({5: 9}, {5: 9}, words=WORDS[:3]), right).text == "Bob"  # without the rule: where it is surest


def test_windows_are_of_one_example():
    one = window({3: 1}, {3: 1})
    with pytest.raises(ValueError, match=r"the windows of one example are needed, got \[0, 1\]"):
        ask(one, Window(1, one.offsets, one.start, one.end))
    with pytest.raises(ValueError, match=r"the windows of one example are needed, got \[\]"):
        ask()


def test_a_window_has_one_logit_per_token():
    with pytest.raises(ValueError, match=r"a window of 2 tokens needs one logit for each, got \(3,\)"):
        Window(0, np.zeros((2, 2), dtype=np.int32), np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match=r"a window of 2 tokens needs one logit for each, got \(1,\)"):
        Window(0, np.zeros((2, 2), dtype=np.int32), np.zeros(2), np.zeros(2), best_context=np.zeros(1, dtype=bool))


# ---- no answer ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("threshold", "expected"), [(0.0, ""), (1.99, ""), (2.0, "Ada"), (3.0, "Ada"), (-1.0, ""), (float("inf"), "Ada")]
)
def test_no_answer_wins_by_more_than_the_threshold(threshold, expected):
    found = ask(window({0: 3, 3: 2}, {0: 3, 3: 2}), unanswerable=True, null_threshold=threshold)
    assert (found.text, found.span, found.null_score_difference) == (expected, "Ada", 2.0)


def test_without_unanswerable_questions_no_answer_is_never_one():
    found = ask(window({0: 9, 3: 2}, {0: 9, 3: 2}), unanswerable=False, null_threshold=-100)
    assert found.text == "Ada"
    assert all(entry["text"] for entry in found.n_best)


def test_no_answer_has_its_place_in_n_best():
    found = ask(window({0: 2, 3: 4, 4: 0}, {0: 3, 3: 4, 4: 0}), unanswerable=True, n_best=3)
    # Ada 8, no answer 5, Ada met 4: the fourth, met with 0, is beyond the list.
    assert [entry["text"] for entry in found.n_best] == ["Ada", "", "Ada met"]
    expected = np.exp([8, 5, 4]) / np.exp([8, 5, 4]).sum()
    assert [entry["probability"] for entry in found.n_best] == pytest.approx(expected)
    assert (found.n_best[1]["start_logit"], found.n_best[1]["end_logit"]) == (2, 3)


def test_no_answer_is_added_where_it_is_not_among_the_best():
    found = ask(window({0: -3, 3: 4, 4: 0}, {0: -3, 3: 4, 4: 0}), unanswerable=True, n_best=2)
    assert [entry["text"] for entry in found.n_best] == ["Ada", "Ada met", ""]
    found = ask(window({0: 5, 3: 4}, {0: 5, 3: 4}), unanswerable=True, n_best=1, null_threshold=50)
    assert [entry["text"] for entry in found.n_best] == [""]  # only cls is among the best tokens
    assert found.text == ""


def test_the_window_least_sure_of_no_answer_counts():
    sure, unsure = window({0: 9}, {0: 9}, words=WORDS[:2]), window({0: 1, 3: 2}, {0: 0, 4: 2}, words=WORDS[3:])
    for windows in ((sure, unsure), (unsure, sure)):
        found = ask(*windows, unanswerable=True)
        assert (found.text, found.null_score_difference) == ("in Rome", 1 - 4)


def test_cls_may_stand_at_the_end():
    found = ask(window({8: 5, 3: 2}, {8: 5, 3: 2}, cls=8), unanswerable=True)
    assert (found.text, found.null_score_difference) == ("", 6)


# ---- characters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        ("Émile naît à Genève en été", "Genève en"),
        ("東京 は 日本 の 首都 です", "の 首都"),
        ("“the” 👩‍🚀 flew\u2019s to 🌍🌎 high", "to 🌍🌎"),
        ("e\u0301 n\u0303 o\u0308 u\u0302 i\u0301 y", "u\u0302 i\u0301"),
    ],
)
def test_offsets_are_characters(context, expected):
    words = [match.span() for match in re.finditer(r"\S+", context)]
    found = ask(window({6: 5}, {7: 5}, words=words), context=context)
    assert found.text == expected
    assert context[found.n_best[0]["start"] : found.n_best[0]["end"]] == expected


# ---- a slow double loop ---------------------------------------------------------------------------------------------


def slow_best_tokens(logits: np.ndarray, count: int) -> list[int]:
    return sorted(range(len(logits)), key=lambda token: (-float(logits[token]), token))[:count]


def slow_answer(context, windows, *, n_best, max_answer_length, unanswerable, null_threshold):
    spans, null = [], None
    for number, each in enumerate(windows):
        logits = float(each.start[each.cls]), float(each.end[each.cls])
        if null is None or sum(logits) < sum(null):
            null = logits
        for first in slow_best_tokens(each.start, n_best):
            for last in slow_best_tokens(each.end, n_best):
                (begin, _), (_, stop) = each.offsets[first].tolist(), each.offsets[last].tolist()
                if begin < 0 or stop < 0 or last < first or last - first + 1 > max_answer_length:
                    continue
                if each.best_context is not None and not each.best_context[first]:
                    continue
                if context[begin:stop] == "":
                    continue
                start, end = float(each.start[first]), float(each.end[last])
                spans.append((-(start + end), begin, stop, number, first, last, start, end))
    spans.sort()
    rows = [(context[span[1] : span[2]], *span[6:8], span[1], span[2]) for span in spans[:n_best]]
    best, text = (rows[0][0], rows[0][0]) if rows else ("", "")
    difference = sum(null) - (rows[0][1] + rows[0][2]) if rows else float("inf")
    if unanswerable:
        rows.append(("", *null, 0, 0))
        rows.sort(key=lambda row: -(row[1] + row[2]))  # stable: behind equal spans
        if rows.index(("", *null, 0, 0)) < n_best:
            rows = rows[:n_best]
        text = "" if difference > null_threshold else text
    total = sum(math.exp(row[1] + row[2]) for row in rows)
    return text, best, difference, [(*row, math.exp(row[1] + row[2]) / total) for row in rows]


@st.composite
def window_lists(draw: st.DrawFn) -> tuple[str, list[Window]]:
    """Windows over a context of words and gaps, some words cut into tokens without characters or of the same ones."""
    context = "".join(draw(st.lists(st.sampled_from(["é", "東", "🌍", "a", " "]), min_size=1, max_size=12)))
    cuts = sorted(draw(st.lists(st.integers(0, len(context)), min_size=2, max_size=10)))
    words = list(pairwise(cuts))
    if draw(st.booleans()):
        words = [word for word in words for _ in range(draw(st.integers(1, 2)))]  # bytes of one character
    windows = []
    # Few values: ties. Sums of halves are exact, in single precision too.
    logits = st.integers(-6, 6).map(lambda value: value / 2) | st.just(0.0)
    for _ in range(draw(st.integers(1, 3))):
        first = draw(st.integers(0, len(words)))
        last = draw(st.integers(first, len(words)))
        before, after = draw(st.integers(1, 3)), draw(st.integers(0, 2))
        tokens = [OUT] * before + words[first:last] + [OUT] * after
        size = {"min_size": len(tokens), "max_size": len(tokens)}
        start, end = (np.array(draw(st.lists(logits, **size)), dtype=np.float32) for _ in range(2))
        rule = np.array(draw(st.lists(st.booleans(), **size))) if draw(st.booleans()) else None
        cls = draw(st.sampled_from([0, len(tokens) - 1]))
        windows.append(Window(7, np.array(tokens, dtype=np.int32), start, end, rule, cls))
    return context, windows


@given(
    window_lists(), st.integers(1, 8), st.integers(1, 6), st.booleans(), st.integers(-8, 8).map(lambda value: value / 2)
)
@settings(deadline=None, max_examples=400)
def test_agrees_with_the_slow_double_loop(drawn, n_best, longest, unanswerable, threshold):
    context, windows = drawn
    options = {"n_best": n_best, "max_answer_length": longest, "unanswerable": unanswerable}
    options["null_threshold"] = threshold
    found = answer(context, windows, **options)
    text, best, difference, rows = slow_answer(context, windows, **options)
    assert (found.text, found.span, found.null_score_difference) == (text, best, difference)
    keys = ("text", "start_logit", "end_logit", "start", "end")
    assert [tuple(entry[key] for key in keys) for entry in found.n_best] == [row[:-1] for row in rows]
    assert [entry["probability"] for entry in found.n_best] == pytest.approx([row[-1] for row in rows])


def test_large_logits_do_not_overflow():
    found = ask(window({3: 5000}, {3: 5000, 4: -5000}))
    assert found.n_best[0]["probability"] == pytest.approx(1)


# ---- what the user may ask for --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_best", "longest", "message"),
    [
        (0, 30, r"--n_best_size: must be at least 1, got 0; .*"),
        (20, 0, r"--max_answer_length: must be at least 1 token, got 0; .*"),
    ],
)
def test_options_that_cannot_be(n_best, longest, message):
    with pytest.raises(BadInput) as caught:
        check_options(n_best, longest)
    assert re.fullmatch(message, str(caught.value))
    with pytest.raises(BadInput):
        ask(window({3: 1}, {3: 1}), n_best=n_best, max_answer_length=longest)
