"""Questions and texts: every answer where it is said to be, one answer to a question, the same set every time."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from typing import Any

import pytest

from data.questions import FAMILIES, PERSONS, SIZES, main, squad
from tests.support import ROOT


@pytest.fixture(scope="module")
def sets() -> dict[tuple[str, bool], dict[str, Any]]:
    return {(split, second): squad(split, unanswerable=second) for split in SIZES for second in (False, True)}


def paragraphs(made: dict[str, Any]) -> list[dict[str, Any]]:
    return [paragraph for article in made["data"] for paragraph in article["paragraphs"]]


def questions(made: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(context, question)"""
    return [(paragraph["context"], row) for paragraph in paragraphs(made) for row in paragraph["qas"]]


def read(question: str, context: str) -> list[str]:
    """Every answer to the question that somebody finds who knows what its words mean and reads sentence by sentence."""
    found = []
    for family in FAMILIES:
        for relation in family.relations:
            who = [name for name in PERSONS if question in [form.format(name) for form in relation.asked]]
            for form in relation.told if who else ():
                pattern = re.escape(form.replace("{0}", who[0]).replace("{1}", "@")).replace("@", "(.+)")
                said = (re.fullmatch(pattern, sentence) for sentence in re.split(r"\. |\.$", context))
                found += [match[1] for match in said if match]
    return found


def test_the_same_set_every_time(sets):
    state = random.getstate()
    assert squad("train") == sets["train", False]
    assert squad("validation", unanswerable=True) == sets["validation", True]
    assert random.getstate() == state


def test_another_process_gives_the_same(sets):
    code = "import json; from data.questions import squad; print(json.dumps(squad('validation')))"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == sets["validation", False]


def test_the_layout_is_that_of_squad(sets):
    for (_, second), made in sets.items():
        assert list(made) == ["version", "data"]
        assert made["version"] == ("v2.0" if second else "1.1")
        assert all(list(article) == ["title", "paragraphs"] for article in made["data"])
        assert all(list(paragraph) == ["context", "qas"] for paragraph in paragraphs(made))
        for _, row in questions(made):
            empty = not row["answers"]
            more = ["is_impossible"] if second else []
            assert list(row) == ["id", "question", "answers", *more, *(["plausible_answers"] if empty else [])]
            assert row.get("is_impossible", False) == empty
            assert not empty or second


def test_every_answer_is_where_it_is_said_to_be(sets):
    for made in sets.values():
        for context, row in questions(made):
            for answer in row["answers"] + row.get("plausible_answers", []):
                start = answer["answer_start"]
                assert context[start : start + len(answer["text"])] == answer["text"]


def test_a_question_has_one_answer_or_none(sets):
    for made in sets.values():
        for context, row in questions(made)[:500]:
            assert read(row["question"], context) == [answer["text"] for answer in row["answers"]]


def test_ids_are_unique(sets):
    ids = [row["id"] for made in sets.values() for _, row in questions(made)]
    assert len(set(ids)) == len(ids)


def test_the_splits_share_no_text(sets):
    train, validation = ({paragraph["context"] for paragraph in paragraphs(sets[split, False])} for split in SIZES)
    assert (len(train), len(validation)) == (SIZES["train"], SIZES["validation"])
    assert not train & validation


def test_both_versions_ask_about_the_same_texts(sets):
    for split in SIZES:
        one, two = ([paragraph["context"] for paragraph in paragraphs(sets[split, kind])] for kind in (False, True))
        assert one == two


def test_texts_are_short_and_other_facts_have_answers_of_the_same_kind(sets):
    rows, stranger, rival = questions(sets["validation", False]), 0, 0
    for context, row in rows:
        assert 3 <= context.count(". ") + 1 <= 4
        assert len(re.findall(r"\w+|[^\w\s]", context + row["question"])) < 60
        names = {name for name in PERSONS if re.search(rf"(^|\. ){name} ", context)}
        stranger += len(names) > 1
        asked = [row["question"].replace(name, "{0}") for name in names if name in row["question"]]
        others = [name for name in names if read(asked[0].format(name), context)]
        rival += len(others) > 1
    assert 0.4 < stranger / len(rows) < 0.65
    assert 0.03 < rival / len(rows) < 0.15  # only the name tells which answer is right


def test_some_answers_are_long_and_some_have_punctuation(sets):
    texts = {row["answers"][0]["text"] for _, row in questions(sets["validation", False])}
    for pattern in (r"\w+ \w+", r"\d+:\d+", r"\$\d+\.\d+", r"\d+"):
        assert any(re.fullmatch(pattern, text) for text in texts), pattern


def test_a_third_has_no_answer_in_the_second_version(sets):
    for split in SIZES:
        rows = [row for _, row in questions(sets[split, True])]
        assert 0.30 < sum(row["is_impossible"] for row in rows) / len(rows) < 0.36


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match=r"^split: unknown, got 'test'; use one of train, validation$"):
        squad("test")


def test_the_command_writes_four_files(tmp_path, capsys, sets):
    main(["--output", str(tmp_path / "set")])
    for ending, second in (("", False), ("-v2", True)):
        for split in SIZES:
            assert json.loads((tmp_path / f"set/{split}{ending}.json").read_text()) == sets[split, second]
    said = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r".*/set/train\.json: [\d,]+ questions about 6,000 texts, 0 without an answer", said[0])
    assert said[-1].startswith("try: python apps/qa/train_prune.py --train_file ")
    assert len(list((tmp_path / "set").iterdir())) == 4
