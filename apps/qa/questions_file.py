"""Questions from a file, the hub or the embedded grammar: the original SQuAD layout, or one row a question."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset

from apps.common.errors import BadInput
from apps.common.finetune.files import from_hub, read_rows
from data import questions

COLUMNS = ("id", "question", "context", "answers")
LAYOUT = "a SQuAD file, or rows of id, question, context and answers {text: [...], answer_start: [...]}"
EMBEDDED = "made-up stories"


def read_questions(options: Namespace) -> tuple[str, list[tuple[str, Dataset]]]:
    """What the data are called; and (the option or split that they came from, rows), the training rows first."""
    files = {"--train_file": options.train_file, "--validation_file": options.validation_file}
    given = {option: path for option, path in files.items() if path is not None}
    if given and options.dataset_name:
        raise BadInput(f"--dataset_name: the questions come from {next(iter(given))}, got both; leave one out")
    for option in files if given else ():
        if option not in given:
            raise BadInput(f"{option}: is missing beside {next(iter(given))}; give both")
    unanswerable = options.version_2_with_negative
    if given:
        name, found = "local files", [(option, _from_file(path, option)) for option, path in given.items()]
    elif options.dataset_name:
        splits = from_hub(options.dataset_name, options.dataset_config_name, "--dataset_name")
        name, found = options.dataset_name, [(split, _hub_split(splits, split)) for split in ("train", "validation")]
    else:
        made = {split: questions.squad(split, unanswerable=unanswerable) for split in ("train", "validation")}
        name, found = EMBEDDED, [(split, Dataset.from_list(list(_flat(content)))) for split, content in made.items()]
    for source, rows in found:
        check(rows, source, unanswerable=unanswerable)
    return name, found


def _hub_split(splits: Any, split: str) -> Dataset:
    if split not in splits:
        raise BadInput(f"--dataset_name: has no split {split!r}, got {', '.join(splits)}; use files")
    return splits[split]


def _from_file(path: str, option: str) -> Dataset:
    if Path(path).suffix.lower() != ".json" or not Path(path).is_file():
        rows = read_rows(path, option)
    else:
        rows = _from_json(path, option)
    missing = [name for name in COLUMNS if name not in rows.column_names]
    if missing:
        raise BadInput(f"{option}: has no column {missing[0]!r}, got {rows.column_names}; it must be {LAYOUT}")
    return rows.select_columns(list(COLUMNS))


def _from_json(path: str, option: str) -> Dataset:
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    if not text.strip():
        raise BadInput(f"{option}: is an empty file, got {path!r}")
    try:
        content = json.loads(text)
    except ValueError:
        return read_rows(path, option)  # a row a line
    inner = content.get("data") if isinstance(content, dict) else content
    if not isinstance(inner, list):
        raise BadInput(f"{option}: must be {LAYOUT}, got {path!r}")
    try:
        original = bool(inner) and isinstance(inner[0], dict) and "paragraphs" in inner[0]
        rows = list(_flat({"data": inner})) if original else inner
        made = Dataset.from_list(rows)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        message = f"{type(error).__name__} {error}".replace("\n", " ")[:100]
        raise BadInput(f"{option}: must be {LAYOUT} ({message}), got {path!r}") from error
    if not len(made):
        raise BadInput(f"{option}: holds no questions, got {path!r}")
    return made


def _flat(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The original layout: articles, their paragraphs, and the questions to each."""
    for article in content["data"]:
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"]:
                answers = asked["answers"] if not asked.get("is_impossible", False) else []
                yield {
                    "id": str(asked["id"]),
                    "question": asked["question"],
                    "context": paragraph["context"],
                    "answers": {
                        "text": [each["text"] for each in answers],
                        "answer_start": [each["answer_start"] for each in answers],
                    },
                }


def check(rows: Dataset, source: str, *, unanswerable: bool) -> None:
    """Every question has its own id, texts are texts, and every answer stands in its context where it says."""
    seen = set()
    for row in rows:
        where = f"{source}: question {row['id']!r}"
        if row["id"] is None:
            raise BadInput(f"{source}: a question has no id, got {str(row['question'])[:60]!r}; give it one")
        if row["id"] in seen:
            raise BadInput(f"{where} is there twice; give each its own id")
        seen.add(row["id"])
        for name in ("question", "context"):
            if not isinstance(row[name], str) or not row[name].strip():
                raise BadInput(f"{where} has no {name}, got {row[name]!r}; fill or remove it")
        answers = row["answers"]
        if not _are_answers(answers):
            do = "write {text: [...], answer_start: [...]}, as many of each"
            raise BadInput(f"{where} has answers of another kind, got {str(answers)[:80]!r}; {do}")
        if not answers["text"] and not unanswerable:
            raise BadInput(f"{where} has no answer; add --version_2_with_negative, or remove it")
        for text, start in zip(answers["text"], answers["answer_start"], strict=True):
            if not text.strip() or start < 0:
                raise BadInput(
                    f"{where} has an empty answer or one before the context, got {text!r} at {start}; mend the file"
                )
            if row["context"][start : start + len(text)] != text:
                found = row["context"].find(text)
                do = f"it is at {found}" if found >= 0 else "it is nowhere in the context"
                raise BadInput(
                    f"{where}: its answer is not at answer_start {start}, got {text[:60]!r}; {do}, mend the file"
                )


def _are_answers(answers: Any) -> bool:
    if not isinstance(answers, dict):
        return False
    texts, starts = answers.get("text"), answers.get("answer_start")
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        return False
    return all(isinstance(text, str) for text in texts) and all(type(start) is int for start in starts)
