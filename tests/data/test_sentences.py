"""Film reviews from a grammar: true labels, as many of each, nothing in both splits, the same rows every time."""

from __future__ import annotations

import csv
import json
import os
import random
import re
import subprocess
import sys
from typing import Any

import pytest

from data import sentences
from data.sentences import BAD, DENIALS, GOOD, LIKED, LOATHED, PARTS, Fact, main, paraphrase, sentiment
from tests.support import ROOT

SETS = {"sentiment": sentiment, "paraphrase": paraphrase}
MOOD = {
    **{word: mood for mood, table in ((1, GOOD), (0, BAD)) for meaning in table for word in meaning},
    **{word: mood for mood, table in ((1, LIKED), (0, LOATHED)) for m in table for verb in m for word in verb},
}


@pytest.fixture(scope="module")
def made() -> dict[str, dict[str, list[dict[str, Any]]]]:
    return {name: {split: rows(split) for split in sentences.SPLITS} for name, rows in SETS.items()}


def texts(row: dict[str, Any]) -> frozenset[str]:
    return frozenset(value for name, value in row.items() if name != "label")


def mood(clause: str) -> int:
    """Of a clause with one word of mood: the mood of the word, or the other one where it is denied."""
    (word,) = [MOOD[word] for word in clause.split() if word in MOOD]
    return word ^ any(denial in clause for denial in (*DENIALS, "nothing about"))


def judged(sentence: str) -> int:
    """The label by the rules of English, not by those that made the sentence."""
    sentence = sentence.replace("anything but", "never")
    if sentence.startswith("it is not true that "):
        return 1 - mood(sentence.removeprefix("it is not true that "))
    if sentence.startswith(("although ", "despite ")):
        return mood(sentence.split(" , ")[1])
    return mood(re.split(" and ", sentence.split(" but ")[-1].split(" even though ")[0])[-1])


@pytest.mark.parametrize("name", SETS)
def test_the_same_rows_every_time_without_touching_the_global_generator(made, name):
    state = random.getstate()
    assert SETS[name]("train") == made[name]["train"]
    assert SETS[name]("validation") == made[name]["validation"]
    assert random.getstate() == state


def test_another_process_gives_the_same(made):
    code = (
        "import json; from data.sentences import *; print(json.dumps([sentiment('validation'), paraphrase('train')]))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [made["sentiment"]["validation"], made["paraphrase"]["train"]]


@pytest.mark.parametrize("name", SETS)
def test_the_splits_share_nothing_and_no_row_is_there_twice(made, name):
    train, validation = ([texts(row) for row in made[name][split]] for split in sentences.SPLITS)
    assert len(set(train)) == len(train)
    assert len(set(validation)) == len(validation)
    assert not set(train) & set(validation)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("split", sentences.SPLITS)
def test_as_many_of_each_label(made, name, split):
    labels = [row["label"] for row in made[name][split]]
    assert labels.count(0) == labels.count(1) == len(labels) // 2
    columns = {"sentiment": ["sentence", "label"], "paraphrase": ["sentence1", "sentence2", "label"]}[name]
    assert all(list(row) == columns for row in made[name][split])


@pytest.mark.parametrize(
    ("sentence", "label"),
    [
        ("the plot is dull but the acting is wonderful", 1),
        ("critics found the plot so clever but the music was far from great", 0),
        ("although the music is great , i did not enjoy the film", 0),
        ("nothing about the script is weak", 1),
        ("it is not true that the script is never dull", 0),
        ("despite the dull plot , we loved the film", 1),
        ("i hated the ending even though the plot was fresh", 0),
    ],
)
def test_the_judge_of_these_tests_knows_english(sentence, label):
    assert judged(sentence) == label


def test_every_review_has_the_label_that_a_reader_gives(made):
    for rows in made["sentiment"].values():
        for row in rows:
            assert judged(row["sentence"]) == row["label"], row


def test_words_alone_do_not_tell_the_mood(made):
    """Of the sentences with a word of only one mood, some mean the other."""
    rows = made["sentiment"]["validation"]
    moods = [({MOOD[word] for word in row["sentence"].split() if word in MOOD}, row["label"]) for row in rows]
    assert sum(len(found) == 2 for found, _ in moods) > len(rows) / 5
    assert sum(found == {1 - label} for found, label in moods) > len(rows) / 10


def test_a_review_is_about_different_parts(made):
    for row in made["sentiment"]["validation"]:
        parts = [part for part in PARTS if re.search(rf"\b({'|'.join(part)})\b", row["sentence"])]
        named = sum(len(re.findall(rf"\b({'|'.join(part)})\b", row["sentence"])) for part in parts)
        assert len(parts) == named


def meaning(sentence: str) -> frozenset[Fact]:
    """What the sentence says, read back from its words."""
    return frozenset(fact(clause) for clause in re.split(" and | while | , ", sentence.removeprefix("while ")))


def fact(clause: str) -> Fact:
    names = {word: who for who in sentences.WHO for word in who} | {"me": ("i",), "us": ("we",)}
    (part,) = [part for part in PARTS if any(f"the {word}" in clause for word in part)]
    words = clause.split()
    named = [who for word, who in names.items() if clause.startswith(f"{word} ") or clause.endswith(f" by {word}")]
    table = LIKED + LOATHED if named else GOOD + BAD
    (what,) = [m for m in table if any(word in words for verb in m for word in ((verb,) if not named else verb))]
    return Fact(part, what, named[0] if named else None, "not" in words)


def test_a_paraphrase_says_the_same_and_the_others_do_not(made):
    for rows in made["paraphrase"].values():
        for row in rows[:2000]:
            assert (meaning(row["sentence1"]) == meaning(row["sentence2"])) == row["label"], row


def test_some_pairs_differ_in_one_word_only_or_in_none(made):
    rows = [row for row in made["paraphrase"]["train"] if not row["label"]]
    one, two = ([set(row[name].split()) for row in rows] for name in ("sentence1", "sentence2"))
    assert sum(len(a ^ b) <= 2 for a, b in zip(one, two, strict=True)) > len(rows) / 20
    assert any(a == b for a, b in zip(one, two, strict=True))


def test_words_are_lower_case_and_few(made):
    found = {
        word
        for sets in made.values()
        for rows in sets.values()
        for row in rows
        for t in texts(row)
        for word in t.split()
    }
    assert all(re.fullmatch("[a-z]+|,", word) for word in found)
    assert len(found) < 200
    longest = max(len(text.split()) for sets in made.values() for row in sets["train"] for text in texts(row))
    assert longest <= 26


@pytest.mark.parametrize("rows", SETS.values())
def test_an_unknown_split_is_refused(rows):
    with pytest.raises(ValueError, match=r"^split: unknown, got 'test'; use one of train, validation$"):
        rows("test")


def test_the_command_writes_four_files(tmp_path, capsys, made):
    main(["--output", str(tmp_path)])
    for name in SETS:
        for split in sentences.SPLITS:
            with (tmp_path / name / f"{split}.csv").open(newline="") as file:
                rows = [{**row, "label": int(row["label"])} for row in csv.DictReader(file)]
            assert rows == made[name][split]
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{tmp_path}/sentiment/train.csv: 4,000 rows, 2,000 of label 1"
    assert said[-1] == (
        f"try: python apps/text_classification/train_prune.py --train_file {tmp_path}/paraphrase/train.csv "
        f"--validation_file {tmp_path}/paraphrase/validation.csv"
    )
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 4
