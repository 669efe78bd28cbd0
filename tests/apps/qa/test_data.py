"""Questions of files and of the hub, their windows, and the answers that are read out of a model's logits."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from apps.common.errors import BadInput
from apps.common.finetune.run import Data
from apps.common.ranks import Ranks
from apps.qa.data_set import read_data
from apps.qa.questions_file import read_questions
from apps.qa.windows import check_lengths, training_windows, validation_windows
from tests.support import finetune_apps

APP = "qa"
V2 = "--version_2_with_negative"


@pytest.fixture(scope="module")
def words() -> Any:
    return finetune_apps.tokenizer()


def options_of(*more: str, **options: object) -> Any:
    chosen = {"max_seq_length": 40, "doc_stride": 8, **options}
    return finetune_apps.parsed(APP, [*(f"--{name}={value}" for name, value in chosen.items()), *more])


@pytest.fixture
def read(words) -> Callable[..., Data]:
    def attempt(*more: str, **options: object) -> Data:
        return read_data(options_of(*more, **options), words)

    return attempt


# ---- where questions come from --------------------------------------------------------------------------------------


def _flat(path: Path, rows: list[dict[str, Any]]) -> Path:
    return finetune_apps.write(path.with_suffix(".json"), rows)


def _data(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.with_suffix(".json").write_text(json.dumps({"version": 3, "data": rows}))
    return path.with_suffix(".json")


def _lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    return finetune_apps.write(path.with_suffix(".jsonl"), rows)


def _lines_in_json(path: Path, rows: list[dict[str, Any]]) -> Path:
    return _lines(path, rows).rename(path.with_suffix(".json"))


def _marked(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.with_suffix(".json").write_bytes(b"\xef\xbb\xbf" + json.dumps(rows).encode())
    return path.with_suffix(".json")


def _parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    return finetune_apps.write(path.with_suffix(".parquet"), rows)


def _v1(path: Path, rows: list[dict[str, Any]]) -> Path:
    return finetune_apps.write_squad(path.with_suffix(".json"), rows)


def _v2(path: Path, rows: list[dict[str, Any]]) -> Path:
    return finetune_apps.write_squad(path.with_suffix(".json"), rows, version="v2.0")


LAYOUTS = (_v1, _v2, _flat, _data, _lines, _lines_in_json, _marked, _parquet)


@pytest.mark.parametrize("unanswerable", [False, True])
@pytest.mark.parametrize("write", LAYOUTS, ids=[each.__name__.strip("_") for each in LAYOUTS])
def test_every_layout_gives_the_same_rows(tmp_path, write, unanswerable):
    rows = finetune_apps.questions(7, unanswerable=unanswerable)
    extra = [{"title": "notes", **row} for row in rows]  # what is not read does not matter
    train, held_out = write(tmp_path / "train", extra), write(tmp_path / "validation", extra[:3])
    more = [V2] if unanswerable else []
    name, found = read_questions(options_of(*more, train_file=train, validation_file=held_out))
    assert name == "local files"
    assert [source for source, _ in found] == ["--train_file", "--validation_file"]
    assert found[0][1].to_list() == rows
    assert found[1][1].to_list() == rows[:3]


def test_an_impossible_question_has_no_answers_whatever_stands_there(tmp_path, read):
    content = finetune_apps.squad(finetune_apps.questions(3), version="v2.0")
    asked = content["data"][1]["paragraphs"][0]["qas"][0]
    asked |= {"is_impossible": True, "plausible_answers": asked["answers"]}
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(content))
    _, ((_, rows), _) = read_questions(options_of(V2, train_file=file, validation_file=file))
    assert [len(row["answers"]["text"]) for row in rows] == [1, 0, 1]


def test_articles_have_paragraphs_and_these_questions(tmp_path):
    context = "Anna lives in Dover. Boris lives in Perth."
    asked = [
        {"id": name, "question": f"Where does {name} live?", "answers": [{"text": town, "answer_start": start}]}
        for name, town, start in (("Anna", "Dover", 14), ("Boris", "Perth", 36))
    ]
    articles = [{"title": "x", "paragraphs": [{"context": context, "qas": asked}, {"context": "y", "qas": []}]}] * 1
    (tmp_path / "a.json").write_text(json.dumps({"data": [*articles, {"title": "z", "paragraphs": []}]}))
    _, ((_, rows), _) = read_questions(options_of(train_file=tmp_path / "a.json", validation_file=tmp_path / "a.json"))
    assert [(row["id"], row["context"], row["answers"]["text"]) for row in rows] == [
        ("Anna", context, ["Dover"]),
        ("Boris", context, ["Perth"]),
    ]


def test_numbers_as_ids(tmp_path, read):
    asked = [{**row, "id": i} for i, row in enumerate(finetune_apps.questions(3))]
    file = finetune_apps.write(tmp_path / "a.json", asked)
    data = read(train_file=file, validation_file=file)
    scored(data, nothing_known)
    data.write(tmp_path)
    assert list(json.loads((tmp_path / "predictions.json").read_text())) == ["0", "1", "2"]


class Hub:
    """In place of ``datasets.load_dataset``."""

    def __init__(self, **splits: list[dict[str, Any]]) -> None:
        self.splits, self.asked = splits, list[tuple[str, str | None]]()

    def __call__(self, name: str, config: str | None = None, **others: Any) -> DatasetDict:
        self.asked.append((name, config))
        rows = {split: [{"title": "notes", **row} for row in rows] for split, rows in self.splits.items()}
        return DatasetDict({split: Dataset.from_list(each) for split, each in rows.items()})


@pytest.mark.parametrize(("name", "config", "more"), [("squad", None, []), ("squad_v2", "plain", [V2])])
def test_the_hub(read, monkeypatch, name, config, more):
    train, held_out = (finetune_apps.questions(count, unanswerable=bool(more)) for count in (5, 3))
    hub = Hub(train=train, validation=held_out, test=[])
    monkeypatch.setattr(datasets, "load_dataset", hub)
    options = {} if config is None else {"dataset_config_name": config}
    data = read(*more, dataset_name=name, **options)
    assert hub.asked == [(name, config)]
    assert (data.name, list(data.validation)) == (name, [name])
    assert len(data.train) == 5
    assert data.summary == f"{name}: 5 training and 3 validation questions in 5 and 3 windows"


def test_a_data_set_of_the_hub_without_validation(read, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", Hub(train=finetune_apps.questions(5), test=[]))
    with pytest.raises(BadInput) as caught:
        read(dataset_name="squad")
    assert str(caught.value) == "--dataset_name: has no split 'validation', got train, test; use files"


@pytest.mark.parametrize("unanswerable", [False, True])
def test_without_data_it_reads_the_made_up_stories(read, unanswerable):
    more = {"max_train_samples": 12, "max_eval_samples": 8, "max_seq_length": 128}
    data = read(*[V2] * unanswerable, **more)
    assert (data.name, data.embedded) == ("made-up stories", True)
    assert data.metrics == (("exact" if unanswerable else "exact_match"), "f1")
    assert data.summary.startswith("made-up stories: 12 training and 8 validation questions in ")


# ---- windows --------------------------------------------------------------------------------------------------------

PIECES = (
    *("Anna", "lives", "in", "Dover", "Lake", "zq7", "café", "Zürich"),
    *("数", "ß€", "🌍", "don't", "$12.50", "(x)", "-"),
)
BLANKS = (" ", "  ", "\n", " \t")


@st.composite
def rows(draw: st.DrawFn) -> dict[str, Any]:
    """A question with blanks around it, and a context of words and blanks with an answer of whole words."""
    pieces = draw(st.lists(st.sampled_from(PIECES), min_size=1, max_size=30))
    context, places = draw(st.sampled_from(("", *BLANKS))), []
    for piece in pieces:
        places.append((len(context), len(context) + len(piece)))
        context += piece + draw(st.sampled_from(BLANKS))
    context = context if draw(st.booleans()) else context.rstrip()
    first = draw(st.integers(0, len(pieces) - 1))
    last = draw(st.integers(first, len(pieces) - 1))
    start, end = places[first][0], places[last][1]
    question = draw(st.sampled_from(("", " ", "\n  "))) + "Where?" + draw(st.sampled_from(("", "  ")))
    return {
        "id": "1",
        "question": question,
        "context": context,
        "answers": {"text": [context[start:end]], "answer_start": [start]},
    }


def windows_of(words: Any, row: dict[str, Any], length: int, stride: int, *more: str) -> tuple[Dataset, Dataset]:
    options = options_of(*more, max_seq_length=length, doc_stride=stride)
    made = Dataset.from_list([row])
    check_lengths(options, words, made, "--train_file")
    return training_windows(options, words, made), validation_windows(options, words, made)


def offsets_of(windows: Dataset) -> list[list[tuple[int, int]]]:
    return [list(zip(flat[::2], flat[1::2], strict=True)) for flat in windows["offsets"]]


@given(rows(), st.integers(1, 12), st.integers(0, 10), st.booleans())
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_windows(words, row, room, stride, pad):
    """``room`` more tokens of context in each window than two of them share."""
    question = words(row["question"].strip(), add_special_tokens=False)["input_ids"]
    length = max(len(question) + 3 + stride + room, 8)
    training, held_out = windows_of(words, row, length, stride, *["--pad_to_max_length"] * pad)
    context, answer = row["context"], row["answers"]["text"][0]
    start, end = row["answers"]["answer_start"][0], row["answers"]["answer_start"][0] + len(answer)
    whole = list(words(context, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"])

    places = offsets_of(held_out)
    assert training["input_ids"] == held_out["input_ids"]
    shown = []
    for ids, offsets in zip(held_out["input_ids"], places, strict=True):
        assert len(ids) == len(offsets) <= length
        assert not pad or len(ids) == length
        inside = [i for i, (first, _) in enumerate(offsets) if first >= 0]
        assert inside == list(range(len(question) + 2, len(question) + 2 + len(inside)))
        assert ids[: len(question) + 2] == [words.cls_token_id, *question, words.sep_token_id]
        assert all(offset == (-1, -1) for i, offset in enumerate(offsets) if i not in inside)
        shown.append([offsets[i] for i in inside])

    assert shown[0] + [offset for window in shown[1:] for offset in window[stride:]] == whole
    for before, after in pairwise(shown):
        assert len(before) == length - len(question) - 3  # full
        assert before[len(before) - stride :] == after[:stride]
    assert held_out["example"] == [0] * len(shown)

    found = False
    for offsets, first, last in zip(places, training["start_positions"], training["end_positions"], strict=True):
        inside = [offset for offset in offsets if offset[0] >= 0]
        if inside[0][0] <= start and end <= inside[-1][1]:
            assert context[offsets[first][0] : offsets[last][1]] == answer
            found = True
        else:
            assert (first, last) == (0, 0)
    tokens = sum(start <= first and last <= end for first, last in whole)
    assert found or tokens > stride + 1  # what is not longer than the overlap is whole in some window


def learned(words: Any, context: str, *answers: str) -> str:
    """What the tokens that are learned stand for."""
    asked = {"text": list(answers), "answer_start": [context.index(answer) for answer in answers]}
    training, held_out = windows_of(
        words, {"id": "1", "question": "Where?", "context": context, "answers": asked}, 60, 8
    )
    assert len(training) == 1
    first, last = training[0]["start_positions"], training[0]["end_positions"]
    return "" if first == 0 else context[offsets_of(held_out)[0][first][0] : offsets_of(held_out)[0][last][1]]


@pytest.mark.parametrize("answer", ["Anna", "Dover", ".", "Dover.", "Anna lives in Dover."])
def test_answers_at_the_edges(words, answer):
    assert learned(words, "Anna lives in Dover.", answer) == answer


def test_the_first_of_several_answers_is_learned(words):
    assert learned(words, "Anna lives in Dover.", "in Dover", "Dover") == "in Dover"


def test_an_answer_that_ends_inside_a_token_takes_the_whole_token(words):
    assert learned(words, "Anna lives in Dover.", "Dov") == "Dover"
    assert learned(words, "Anna lives in Dover.", "ives in") == "lives in"


@pytest.mark.parametrize("answer", [" Anna", "Dover ", "Perth "])
def test_blanks_around_an_answer_are_no_part_of_it(words, answer):
    assert learned(words, " Anna lives in Dover . Boris lives in Perth ", answer) == answer.strip()


def test_no_answer_is_the_first_token(words):
    row = {"id": "1", "question": "Where?", "context": "Anna " * 60, "answers": {"text": [], "answer_start": []}}
    training, held_out = windows_of(words, row, 20, 4)
    assert len(training) > 3
    assert set(training["start_positions"]) == set(training["end_positions"]) == {0}
    assert set(held_out["cls"]) == {0}


def test_rows_become_windows_in_order(words):
    many = [
        {**row, "context": row["context"] * repeats}
        for row, repeats in zip(finetune_apps.questions(4), (1, 6, 1, 4), strict=True)
    ]
    held_out = validation_windows(options_of(max_seq_length=30, doc_stride=4), words, Dataset.from_list(many))
    examples = held_out["example"]
    assert examples == sorted(examples)
    assert set(examples) == {0, 1, 2, 3}
    assert [examples.count(i) > 1 for i in range(4)] == [False, True, False, True]


@pytest.mark.parametrize(("length", "stride"), [(16, 7), (40, 31), (9, 0)])
def test_windows_must_go_on(words, length, stride):
    """``Where does Anna live ?`` and three special tokens are 8: the rest must be more than two windows share."""
    made = Dataset.from_list(finetune_apps.questions(1))
    check_lengths(options_of(max_seq_length=length, doc_stride=stride), words, made, "--train_file")
    with pytest.raises(BadInput) as caught:
        check_lengths(options_of(max_seq_length=length, doc_stride=stride + 1), words, made, "--train_file")
    assert str(caught.value) == (
        f"--doc_stride: question 'q0-0' in --train_file takes 5 tokens: it must be below {stride + 1}, "
        f"or --max_seq_length at least {length + 1}, got {stride + 1}"
    )


def test_the_longest_question_decides(words):
    asked = finetune_apps.questions(3)
    asked[1]["question"] = " ".join(["Where"] * 20)
    with pytest.raises(BadInput, match=r"--doc_stride: question 'q0-1' in here takes 20 tokens: .*"):
        check_lengths(options_of(max_seq_length=30, doc_stride=8), words, Dataset.from_list(asked), "here")


def test_a_tokenizer_that_pads_on_the_left(words):
    left = finetune_apps.tokenizer()
    left.padding_side = "left"
    with pytest.raises(BadInput, match=r"--tokenizer_name: pads on the left, got an autoregressive model; .*"):
        read_data(options_of(), left)


def test_the_first_questions_only(read, tmp_path):
    file = finetune_apps.write(tmp_path / "a.json", finetune_apps.questions(9))
    data = read(train_file=file, validation_file=file, max_train_samples=4, max_eval_samples=2)
    assert data.summary == "local files: 4 training and 2 validation questions in 4 and 2 windows"


def test_another_answer_or_length_is_other_data(read, tmp_path):
    asked = finetune_apps.questions(5)

    def identity(rows: list[dict[str, Any]], **options: object) -> dict[str, Any]:
        file = finetune_apps.write(tmp_path / "a.json", rows)
        return read(train_file=file, validation_file=file, **options).identity

    first = identity(asked)
    assert identity(asked) == first
    other = json.loads(json.dumps(asked))
    other[4]["answers"] = {"text": ["lives"], "answer_start": [other[4]["context"].index("lives")]}
    assert identity(other)["training windows"] != first["training windows"]
    assert identity(other)["validation questions"] != first["validation questions"]
    assert identity(asked[::-1]) != first
    assert identity(asked, max_seq_length=16, doc_stride=4)["training windows"] != first["training windows"]


def test_windows_are_cached_for_runs_that_write_elsewhere(tmp_path):
    file = finetune_apps.write(tmp_path / "a.parquet", finetune_apps.questions(5))
    places = {"train_file": file, "validation_file": file}

    def fingerprint(folder: str) -> str:
        return read_data(options_of(**places, output_dir=folder), finetune_apps.tokenizer()).train._fingerprint

    assert fingerprint("here") == fingerprint("here")
    assert fingerprint("here") == fingerprint("there")


# ---- answers --------------------------------------------------------------------------------------------------------

Knowledge = Callable[[list[int], int], tuple[int, int]]
"""Ids of a window and its number -> the tokens where its answer starts and ends."""


def nothing_known(ids: list[int], number: int) -> tuple[int, int]:
    return 0, 0


def knows(data: Data, options: Any, words: Any) -> Knowledge:
    """What the training windows of the same rows say. Windows come in their order."""
    file = json.loads(Path(options.validation_file).read_text())
    windows = training_windows(options, words, Dataset.from_list(file))
    places = list(zip(windows["start_positions"], windows["end_positions"], strict=True))
    assert len(windows) == len(next(iter(data.validation.values())).dataset)
    return lambda ids, number: places[number]


class Stub(nn.Module):
    """+10 at the start and the end of what is known of each window, 0 elsewhere; -inf where there is only padding."""

    def __init__(self, known: Knowledge) -> None:
        super().__init__()
        self.known, self.seen = known, 0

    def forward(self, **batch: Tensor) -> SimpleNamespace:
        assert set(batch) == {"input_ids", "token_type_ids", "attention_mask"}
        logits = torch.zeros(2, *batch["input_ids"].shape)
        for row, ids in enumerate(batch["input_ids"].tolist()):
            for side, token in zip(logits, self.known(ids, self.seen), strict=True):
                side[row, token] = 10
            self.seen += 1
        return SimpleNamespace(start_logits=logits[0], end_logits=logits[1])


def scored(data: Data, known: Knowledge) -> dict[str, float]:
    finetune_apps.forget_accelerate()
    accelerator = Accelerator(cpu=True)
    ranks = Ranks(rank=0, size=1, local=0, device=torch.device("cpu"))
    run: Any = SimpleNamespace(model=Stub(known), accelerator=accelerator, ranks=ranks)
    prepared = {name: accelerator.prepare(loader) for name, loader in data.validation.items()}
    try:
        return data.score(run, prepared)
    finally:
        finetune_apps.forget_accelerate()


def long_questions(count: int, *, unanswerable: bool = False) -> list[dict[str, Any]]:
    """With other text before and behind, so that most have several windows."""
    made = finetune_apps.questions(count, unanswerable=unanswerable)
    for i, row in enumerate(made):
        before, behind = "Rome is not here . " * (i % 4), " Who else ?" * (i % 3)
        row["context"] = before + row["context"] + behind
        row["answers"]["answer_start"] = [start + len(before) for start in row["answers"]["answer_start"]]
    return made


@pytest.mark.parametrize("unanswerable", [False, True])
@pytest.mark.parametrize("more", [[], ["--pad_to_max_length"], ["--per_device_eval_batch_size=3"]])
def test_whoever_knows_all_answers_has_100(read, words, tmp_path, unanswerable, more):
    more = [*more, *[V2] * unanswerable]
    asked = long_questions(10, unanswerable=unanswerable)
    file = finetune_apps.write(tmp_path / "a.json", asked)
    place = {"train_file": file, "validation_file": file, "max_seq_length": 26, "doc_stride": 6}
    data = read(*more, **place)
    assert len(next(iter(data.validation.values())).dataset) > 12
    result = scored(data, knows(data, options_of(*more, **place), words))
    data.write(tmp_path)
    predictions = json.loads((tmp_path / "predictions.json").read_text())
    assert predictions == {row["id"]: "".join(row["answers"]["text"]) for row in asked}
    if not unanswerable:
        assert result == {"exact_match": 100.0, "f1": 100.0}
        return
    full = ("exact", "f1", "HasAns_exact", "HasAns_f1", "NoAns_exact", "best_exact", "best_f1")
    assert {name: result[name] for name in full} == dict.fromkeys(full, 100.0)
    assert (result["total"], result["HasAns_total"], result["NoAns_total"]) == (10, 7, 3)


def test_half_an_answer(read, tmp_path):
    """Of ``Lake View`` only ``View``: P 1, R 1/2, F1 2/3; the other question is wrong."""
    rows = [
        {
            "id": str(i),
            "question": "Where?",
            "context": "Anna lives in Lake View.",
            "answers": {"text": [text], "answer_start": [start]},
        }
        for i, (text, start) in enumerate([("Lake View", 14), ("Anna", 0)])
    ]
    file = finetune_apps.write(tmp_path / "a.json", rows)
    data = read(train_file=file, validation_file=file)
    view = finetune_apps.tokenizer().convert_tokens_to_ids("view")
    found = scored(data, lambda ids, number: (ids.index(view), ids.index(view)))
    assert found == {"exact_match": 0.0, "f1": pytest.approx(100 / 3)}
    data.write(tmp_path)
    assert json.loads((tmp_path / "predictions.json").read_text()) == {"0": "View", "1": "View"}
    assert not (tmp_path / "null_odds.json").exists()


@pytest.fixture
def unanswered(tmp_path) -> dict[str, Path]:
    rows = [{"id": "é", "question": "Where?", "context": "数 Dover", "answers": {"text": [], "answer_start": []}}]
    file = finetune_apps.write(tmp_path / "a.json", rows)
    return {"train_file": file, "validation_file": file}


def test_the_written_files(read, tmp_path, unanswered):
    data = read(V2, **unanswered)
    scored(data, nothing_known)
    data.write(tmp_path)
    assert (tmp_path / "predictions.json").read_text() == '{\n  "é": ""\n}\n'
    assert json.loads((tmp_path / "null_odds.json").read_text()) == {"é": 20.0}
    best = json.loads((tmp_path / "nbest_predictions.json").read_text())["é"]
    assert [entry["text"] for entry in best] == ["", "数", "数 Dover", "Dover"]
    assert best[0].keys() == {"text", "probability", "start_logit", "end_logit", "start", "end"}
    assert sum(entry["probability"] for entry in best) == pytest.approx(1)


def test_null_odds_are_numbers_where_no_span_is_among_the_best(read, tmp_path, unanswered):
    data = read(V2, **unanswered, n_best_size=1)
    scored(data, nothing_known)
    data.write(tmp_path)
    assert "Infinity" not in (tmp_path / "null_odds.json").read_text()


@pytest.mark.parametrize(("threshold", "expected"), [(19.9, ""), (20.1, "数"), (-20.1, "")])
def test_the_threshold_of_no_answer(read, tmp_path, unanswered, threshold, expected):
    """No answer has 20, every span 0: the first and shortest of them wins."""
    data = read(V2, **unanswered, null_score_diff_threshold=threshold)
    result = scored(data, nothing_known)
    data.write(tmp_path)
    assert json.loads((tmp_path / "predictions.json").read_text()) == {"é": expected}
    assert result["exact"] == (0.0 if expected else 100.0)


@pytest.mark.parametrize(
    ("longest", "expected"), [(3, {"exact_match": 100.0, "f1": 100.0}), (2, {"exact_match": 0.0, "f1": 50.0})]
)
def test_max_answer_length(read, tmp_path, longest, expected):
    """Three tokens are known. Where only two may be, of all spans that begin well the shortest wins: 1 word of 3."""
    answers = {"text": ["Anna lives in"], "answer_start": [0]}
    row = {"id": "1", "question": "Where?", "context": "Anna lives in Dover", "answers": answers}
    file = finetune_apps.write(tmp_path / "a.json", [row])
    data = read(train_file=file, validation_file=file, max_answer_length=longest)
    anna, into = finetune_apps.tokenizer().convert_tokens_to_ids(["anna", "in"])
    assert scored(data, lambda ids, number: (ids.index(anna), ids.index(into))) == expected
