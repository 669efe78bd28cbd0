"""Rows of files and of the hub as the model gets them, and the numbers that judge it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, DatasetDict
from torch import Tensor, nn

from apps.common.errors import BadInput
from apps.common.finetune.run import Data
from apps.text_classification.data_set import read_data
from apps.text_classification.tasks import TASKS
from tests.support import finetune_apps

APP = "text_classification"
FIRST = ("the plot is great .", "the music is dull .", "the film is fresh .")
SECOND = ("a film", "the ending", "it")
REALS = (2.5, 0.0, 4.75)


@pytest.fixture(scope="module")
def words() -> Any:
    return finetune_apps.tokenizer([*finetune_apps.TEXTS, *FIRST, *SECOND])


@pytest.fixture
def read(words) -> Callable[..., Data]:
    """What the app reads for these words of its command line."""

    def attempt(*more: str, **options: object) -> Data:
        given = [f"--{name}={value}" for name, value in options.items() if value is not None]
        return read_data(finetune_apps.parsed(APP, [*given, *more]), words)

    return attempt


@pytest.fixture
def two_files(read, tmp_path) -> Callable[..., Data]:
    """The same rows to train on and to validate with."""

    def attempt(rows: list[dict[str, Any]], *more: str, ending: str = "csv", **options: object) -> Data:
        file = finetune_apps.write(tmp_path / f"rows.{ending}", rows)
        return read(*more, train_file=file, validation_file=file, **options)

    return attempt


def texts_of(words: Any, rows: Any) -> list[list[str]]:
    """One or two texts of each row, from its tokens."""
    found = []
    for ids in rows["input_ids"]:
        assert ids[0] == words.cls_token_id
        text = " ".join(words.convert_ids_to_tokens(ids[1:])).replace(" ##", "")
        found.append([part.strip() for part in text.split("[SEP]")[:-1]])
    return found


def rows_of(task: Any, labels: Any) -> list[dict[str, Any]]:
    """With an index before and a text that is no input behind, as GLUE's files have them."""
    sides = (FIRST, SECOND)[: len(task.columns)]
    return [
        {"idx": i, **dict(zip(task.columns, texts, strict=True)), "label": label, "genre": "news"}
        for i, (*texts, label) in enumerate(zip(*sides, labels, strict=True))
    ]


# ---- GLUE -----------------------------------------------------------------------------------------------------------


def labels_of(task: Any, form: str) -> tuple[list[Any], list[Any]]:
    """As a file writes them, and as the model takes them."""
    if task.labels is None:
        return (list(REALS) if form == "numbers" else [str(real) for real in REALS]), list(REALS)
    numbers = [0, len(task.labels) - 1, 1]
    return (numbers if form == "numbers" else [task.labels[number] for number in numbers]), numbers


@pytest.mark.parametrize("form", ["numbers", "names"])
@pytest.mark.parametrize("ending", ["csv", "tsv", "json", "jsonl", "parquet"])
@pytest.mark.parametrize("name", TASKS)
def test_glue_from_files(two_files, words, name, ending, form):
    task = TASKS[name]
    written, expected = labels_of(task, form)
    data = two_files(rows_of(task, written), ending=ending, task_name=name)
    sides = [list(texts) for texts in zip(*(FIRST, SECOND)[: len(task.columns)], strict=True)]
    for rows in (data.train, *(loader.dataset for loader in data.validation.values())):
        assert texts_of(words, rows) == sides
        assert rows["labels"] == expected
        assert set(rows.column_names) == {"input_ids", "token_type_ids", "attention_mask", "labels"}
    assert list(data.validation) == [name]
    assert (data.name, data.main, data.metrics, data.embedded) == (name, task.main, task.metrics, False)
    if task.labels is None:
        assert data.config == {"num_labels": 1, "problem_type": "regression"}
    else:
        ids = dict(enumerate(task.labels))
        assert data.config == {
            "num_labels": len(ids),
            "problem_type": "single_label_classification",
            "id2label": ids,
            "label2id": {label: i for i, label in ids.items()},
        }


def test_both_texts_have_their_own_type(two_files, words):
    rows = two_files(rows_of(TASKS["mrpc"], [0, 1, 0]), task_name="mrpc").train
    ids, types = rows[0]["input_ids"], rows[0]["token_type_ids"]
    assert types == [0] * (ids.index(words.sep_token_id) + 1) + [1] * (len(ids) - ids.index(words.sep_token_id) - 1)


def test_mnli_has_two_validation_files(read, tmp_path, words):
    rows = rows_of(TASKS["mnli"], [0, 1, 2])
    files = [finetune_apps.write(tmp_path / f"{i}.csv", rows[: i + 1]) for i in range(3)]
    data = read(task_name="mnli", train_file=files[2], validation_file=files[1], validation_mismatched_file=files[0])
    assert {name: len(loader.dataset) for name, loader in data.validation.items()} == {"mnli": 2, "mnli_mm": 1}
    assert data.metrics == ("accuracy", "accuracy_mm")
    assert data.summary == "mnli: 3 training and 2 + 1 validation rows, 3 labels"
    assert scored(data, lambda i: [9 * (i != 1), 9 * (i == 1), 0]) == {"accuracy": 1.0, "accuracy_mm": 1.0}
    assert scored(data, lambda i: [9 * (i == 2), 9 * (i < 2), 0]) == {"accuracy": 0.5, "accuracy_mm": 0.0}


class Hub:
    """In place of ``datasets.load_dataset``: GLUE as the hub has it."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str | None]] = []

    def __call__(self, name: str, config: str | None = None, **others: Any) -> DatasetDict:
        self.asked.append((name, config))
        assert config is not None
        task, splits = TASKS[config], {}
        for split in ("train", *task.validation, *(each.replace("validation", "test") for each in task.validation)):
            hidden = split.startswith("test")
            numbers = labels_of(task, "numbers")[0] if not hidden else [-1] * 3
            rows = [{key: value for key, value in row.items() if key != "genre"} for row in rows_of(task, numbers)]
            made = Dataset.from_list(rows)
            kind = datasets.Value("float32") if task.labels is None else ClassLabel(names=list(task.labels))
            splits[split] = made if hidden and task.labels else made.cast_column("label", kind)
        return DatasetDict(splits)


@pytest.mark.parametrize("name", TASKS)
def test_glue_from_the_hub(read, words, monkeypatch, name):
    hub, task = Hub(), TASKS[name]
    monkeypatch.setattr(datasets, "load_dataset", hub)
    data = read(task_name=name)
    assert hub.asked == [("nyu-mll/glue", name)]
    sides = [list(texts) for texts in zip(*(FIRST, SECOND)[: len(task.columns)], strict=True)]
    assert texts_of(words, data.train) == sides
    assert data.train["labels"] == labels_of(task, "numbers")[1]
    mnli = name == "mnli"
    assert list(data.validation) == (["mnli", "mnli_mm"] if mnli else [name])
    assert data.metrics == (("accuracy", "accuracy_mm") if mnli else task.metrics)


def test_a_task_in_capitals_is_the_same(two_files):
    assert two_files(rows_of(TASKS["cola"], [0, 1, 0]), task_name="CoLA").name == "cola"


# ---- other files ----------------------------------------------------------------------------------------------------

NAMED = ("LABEL_0", "LABEL_1", "LABEL_2")
CUSTOM = [
    # labels of the file, their names, their numbers
    ([1, 0, 1], NAMED[:2], [1, 0, 1]),
    ([2, 0, 1], NAMED, [2, 0, 1]),
    ([1, 2, 1], ("1", "2"), [0, 1, 0]),
    ([10, 9, 100], ("9", "10", "100"), [1, 0, 2]),
    ([-1, 1, 1], ("-1", "1"), [0, 1, 1]),
    (["b", "a", "c"], ("a", "b", "c"), [1, 0, 2]),
    (["yes", "no", "yes"], ("no", "yes"), [1, 0, 1]),
    ([1.5, -0.25, 3.0], None, [1.5, -0.25, 3.0]),
    ([1.0, 0.0, 1.0], None, [1.0, 0.0, 1.0]),
]


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(("labels", "names", "numbers"), CUSTOM, ids=[str(labels) for labels, *_ in CUSTOM])
def test_labels_of_a_file(two_files, words, labels, names, numbers, ending):
    rows = [{"review": text, "label": label} for text, label in zip(FIRST, labels, strict=True)]
    data = two_files(rows, ending=ending)
    assert texts_of(words, data.train) == [[text] for text in FIRST]
    assert data.train["labels"] == numbers
    assert data.config.get("id2label") == (None if names is None else dict(enumerate(names)))
    many = ("accuracy",) if names and len(names) > 2 else ("accuracy", "f1")
    assert data.metrics == (("pearson", "spearmanr", "mse") if names is None else many)
    assert data.name == "local files"


def test_labels_of_json_may_be_true_and_false(two_files):
    data = two_files([{"text": "a", "label": True}, {"text": "b", "label": False}], ending="jsonl")
    assert [type(label) for label in data.train["labels"]] == [int, int]
    assert data.config["num_labels"] == 2


def test_the_labels_of_the_training_file_number_those_of_the_other(read, tmp_path):
    train = finetune_apps.write(tmp_path / "train.csv", [{"text": "x", "label": label} for label in "cab"])
    other = finetune_apps.write(tmp_path / "other.csv", [{"text": "x", "label": label} for label in "bb"])
    data = read(train_file=train, validation_file=other)
    assert data.validation["custom"].dataset["labels"] == [1, 1]
    assert data.config["label2id"] == {"a": 0, "b": 1, "c": 2}


def test_two_text_columns_are_a_pair_in_the_order_of_the_file(two_files, words):
    rows = [
        {"n": i, "b": one, "weight": 0.5, "label": i % 2, "a": two}
        for i, (one, two) in enumerate(zip(FIRST, SECOND, strict=True))
    ]
    assert texts_of(words, two_files(rows).train) == [list(texts) for texts in zip(FIRST, SECOND, strict=True)]


@pytest.mark.parametrize("text", ["NA", "null", "None"])
@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_words_that_mean_nothing_elsewhere_are_text(two_files, text, ending):
    data = two_files([{"text": text, "label": "a"}, {"text": "film", "label": text}], ending=ending)
    assert set(data.config["label2id"]) == {"a", text}


def test_quotes_commas_and_lines_in_a_csv(two_files, words):
    rows = [{"text": 'the "film" , it', "label": 0}, {"text": "the\nplot", "label": 1}]
    assert texts_of(words, two_files(rows).train) == [['the " film " , it'], ["the plot"]]


def test_a_quote_in_a_tsv_is_a_character(read, tmp_path):
    file = tmp_path / "rows.tsv"
    file.write_text('sentence\tlabel\n" a film\t0\nthe plot\t1\nit is " fresh\t0\n')
    assert read(task_name="sst2", train_file=file, validation_file=file).train["labels"] == [0, 1, 0]


def test_a_byte_order_mark_is_no_part_of_the_first_column(read, tmp_path):
    file = tmp_path / "rows.csv"
    file.write_bytes("\ufeffsentence,label\na,0\nb,1\n".encode())
    assert len(read(task_name="sst2", train_file=file, validation_file=file).train) == 2


# ---- lengths --------------------------------------------------------------------------------------------------------


def test_what_is_longer_than_max_length_is_cut(two_files, words):
    rows = two_files(rows_of(TASKS["mrpc"], [0, 1, 0]), task_name="mrpc", max_length=8).train
    assert [len(ids) for ids in rows["input_ids"]] == [8, 8, 8]
    expected = [("the plot is", "a film"), ("the music is", "the ending"), ("the film is fresh", "it")]
    assert texts_of(words, rows) == [list(pair) for pair in expected]


def test_rows_are_padded_to_the_longest_of_a_batch(two_files):
    rows = [{"text": text, "label": i} for i, text in enumerate(["film", "the film", "the film is great"])]
    data = two_files(rows, per_device_eval_batch_size=2)
    assert [len(ids) for ids in data.train["input_ids"]] == [3, 4, 6]
    assert [batch["input_ids"].shape for batch in data.validation["custom"]] == [(2, 4), (1, 6)]
    batch = data.collate([data.train[0], data.train[2]])
    assert batch["attention_mask"].sum(1).tolist() == [3, 6]
    assert batch["labels"].tolist() == [0, 2]


def test_pad_to_max_length_makes_all_rows_alike(two_files, words):
    rows = [{"text": text, "label": i} for i, text in enumerate(["film", "the film is great"])]
    train = two_files(rows, "--pad_to_max_length", max_length=9).train
    assert [len(ids) for ids in train["input_ids"]] == [9, 9]
    assert [sum(mask) for mask in train["attention_mask"]] == [3, 6]
    assert train[0]["input_ids"][3:] == [words.pad_token_id] * 6


@pytest.mark.parametrize(("most", "expected"), [(1, 1), (3, 3), (99, 3)])
def test_the_first_rows_only(two_files, words, most, expected):
    rows = [{"text": text, "label": i} for i, text in enumerate(FIRST)]
    data = two_files(rows, max_train_samples=most, max_eval_samples=most)
    held_out = data.validation["custom"].dataset
    assert texts_of(words, data.train) == texts_of(words, held_out) == [[text] for text in FIRST[:expected]]
    assert data.config["num_labels"] == 3  # of the whole file


def test_tokenizing_in_two_processes_and_anew_gives_the_same(two_files):
    rows = [{"text": text, "label": i} for i, text in enumerate(FIRST)]
    plain = two_files(rows).train
    again = two_files(rows, "--overwrite_cache", preprocessing_num_workers=2).train
    assert again.to_dict() == plain.to_dict()


def test_another_row_length_or_tokenizer_is_other_data(two_files, words):
    rows = [{"text": text, "label": i} for i, text in enumerate(FIRST)]
    same = [two_files(rows).identity for _ in range(2)]
    assert same[0] == same[1]
    others = [
        two_files([*rows[:2], {"text": FIRST[2], "label": 0}]).identity,
        two_files([*rows[:2], {"text": "it", "label": 2}]).identity,
        two_files(rows[::-1]).identity,
        two_files(rows, max_length=4).identity,
    ]
    assert all(other != same[0] for other in others)


# ---- embedded -------------------------------------------------------------------------------------------------------


def test_without_data_it_reads_the_film_reviews(read):
    data = read(max_train_samples=20, max_eval_samples=10)
    assert (data.name, data.embedded, data.metrics) == ("film reviews", True, ("accuracy", "f1"))
    assert len(data.train) == 20
    assert len(data.validation["custom"].dataset) == 10
    assert data.summary == "film reviews: 20 training and 10 validation rows, 2 labels"


# ---- scores ---------------------------------------------------------------------------------------------------------


class Stub(nn.Module):
    """Gives row ``i`` of each validation set the logits of ``answer(i)``. It must not be shown the labels."""

    def __init__(self, answer: Callable[[int], list[float]]) -> None:
        super().__init__()
        self.answer, self.seen = answer, 0

    def forward(self, **batch: Tensor) -> SimpleNamespace:
        assert "labels" not in batch
        first, self.seen = self.seen, self.seen + len(batch["input_ids"])
        return SimpleNamespace(logits=torch.tensor([self.answer(i) for i in range(first, self.seen)]).float())


class Each(dict):
    """Validation sets, each of which the stub counts from 0."""

    def __init__(self, sets: dict[str, Any], stub: Stub) -> None:
        super().__init__(sets)
        self.stub = stub

    def values(self) -> Iterator[Any]:  # type: ignore[override]
        for loader in super().values():
            self.stub.seen = 0
            yield loader


def scored(data: Data, answer: Callable[[int], list[float]]) -> dict[str, float]:
    finetune_apps.forget_accelerate()
    accelerator, stub = Accelerator(cpu=True), Stub(answer)
    run: Any = SimpleNamespace(model=stub, accelerator=accelerator)
    prepared = {name: accelerator.prepare(loader) for name, loader in data.validation.items()}
    try:
        return data.score(run, Each(prepared, stub))
    finally:
        finetune_apps.forget_accelerate()


def glue(name: str, references: list[Any], two_files: Any, **options: object) -> Data:
    task = TASKS[name]
    rows = [{**dict.fromkeys(task.columns, "the film"), "label": label} for label in references]
    return two_files(rows, task_name=name, **options)


def picks(*numbers: int, labels: int = 2) -> Callable[[int], list[float]]:
    return lambda i: [float(label == numbers[i]) for label in range(labels)]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_the_last_batch_counts_its_rows_once(two_files, size):
    """2 TP, 1 FP, 1 FN, 1 TN: a row that counts twice changes accuracy or F1."""
    data = glue("mrpc", [1, 1, 0, 1, 0], two_files, per_device_eval_batch_size=size)
    assert scored(data, picks(1, 1, 1, 0, 0)) == {"accuracy": 3 / 5, "f1": pytest.approx(2 / 3)}


@pytest.mark.parametrize(
    ("name", "predictions", "references", "expected"),
    [
        ("cola", [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], {"matthews_correlation": 1 / 6}),
        ("sst2", [1, 0, 1], [1, 1, 1], {"accuracy": 2 / 3}),
        ("qqp", [1, 1, 1, 0], [1, 0, 0, 0], {"accuracy": 2 / 4, "f1": 1 / 2}),
        ("mnli", [0, 1, 2, 2], [0, 2, 2, 1], {"accuracy": 2 / 4}),
        ("qnli", [0, 1], [0, 1], {"accuracy": 1.0}),
        ("rte", [0, 1], [1, 0], {"accuracy": 0.0}),
        ("wnli", [0, 0, 0], [0, 1, 0], {"accuracy": 2 / 3}),
    ],
)
def test_scores_of_classes(two_files, name, predictions, references, expected):
    labels = len(TASKS[name].labels or ())
    data = glue(name, references, two_files, per_device_eval_batch_size=3)
    assert scored(data, picks(*predictions, labels=labels)) == pytest.approx(expected)


def test_scores_of_a_regression(two_files):
    """Deviations -1 0 1 and -3 -1 4: 7 / sqrt(2 * 26); a batch of one row keeps its dimension."""
    expected = {"pearson": 7 / math.sqrt(52), "spearmanr": 1.0}
    data = glue("stsb", [1.0, 3.0, 8.0], two_files, per_device_eval_batch_size=2)
    assert scored(data, lambda i: [float(i)]) == pytest.approx(expected)
    rows = [{"text": "the film", "label": label} for label in (1.0, 3.0, 8.0)]
    found = scored(two_files(rows), lambda i: [float(i)])
    assert found == pytest.approx({**expected, "mse": (1 + 4 + 36) / 3})


def test_whole_numbers_may_be_the_labels_of_a_regression(two_files):
    assert glue("stsb", [1, 3, 5], two_files).train["labels"] == [1.0, 3.0, 5.0]


def test_a_split_that_the_hub_has_not(read, monkeypatch):
    def nowhere(*args: Any, **others: Any) -> DatasetDict:
        raise FileNotFoundError("no such data set\nwith a second line")

    monkeypatch.setattr(datasets, "load_dataset", nowhere)
    with pytest.raises(BadInput) as caught:
        read(task_name="rte")
    assert str(caught.value) == (
        "--task_name: is not in the hub's cache, and the hub does not answer (no such data set), got rte; "
        "give --train_file and --validation_file"
    )


def test_unknown_files_are_not_looked_for(read, tmp_path):
    with pytest.raises(BadInput, match=r"--train_file: no such file, got .*"):
        read(train_file=tmp_path / "no.csv", validation_file=Path(__file__))
