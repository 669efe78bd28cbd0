"""Rows of a user's file: csv, tsv, json, jsonl or parquet. What is wrong with it is one line."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset

from apps.common.errors import BadInput
from apps.common.finetune import hub

KINDS = {"csv": "csv", "tsv": "csv", "json": "json", "jsonl": "json", "parquet": "parquet"}


def read_rows(path: str, option: str) -> Dataset:
    if not Path(path).is_file():
        raise BadInput(f"{option}: no such file, got {path!r}; give a csv, json or parquet file")
    ending = Path(path).suffix.lstrip(".").lower()
    if ending not in KINDS:
        raise BadInput(f"{option}: must end with one of {', '.join(KINDS)}, got {path!r}; convert it")
    if not Path(path).stat().st_size:
        raise BadInput(f"{option}: is an empty file, got {path!r}")
    more: dict[str, Any] = {}
    if KINDS[ending] == "csv":  # only what is empty is missing: "NA" and "None" are words
        more = {"keep_default_na": False, "na_values": [""]}
    if ending == "tsv":  # as GLUE's own files: a quote is a character
        more |= {"sep": "\t", "quoting": csv.QUOTE_NONE}
    try:
        rows = datasets.load_dataset(KINDS[ending], data_files={"rows": path}, split="rows", **more)
    except Exception as error:  # pandas, pyarrow and datasets each have their own
        cause = error.__cause__ or error
        if "corresponds to no data" in str(cause):
            raise BadInput(f"{option}: holds no rows, got {path!r}") from error
        message = " ".join(str(cause).split())[:200]
        raise BadInput(f"{option}: cannot be read as {ending} ({message}), got {path!r}") from error
    if not len(rows):
        raise BadInput(f"{option}: holds no rows, got {path!r}")
    return rows


def from_hub(name: str, config: str | None, option: str) -> Any:
    """All splits of a data set of the hub, or of the hub's cache."""
    online = hub.answers()
    try:
        return datasets.load_dataset(name, config)
    except Exception as error:
        message = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        place = "is not on the hub" if online else "is not in the hub's cache, and the hub does not answer"
        do = "give --train_file and --validation_file"
        raise BadInput(f"{option}: {place} ({message}), got {name if config is None else config}; {do}") from error


def first_rows(rows: Dataset, most: int | None) -> Dataset:
    return rows if most is None or most >= len(rows) else rows.select(range(most))


def digest(rows: Dataset, sample: int = 200) -> str:
    """Of the number of rows, the first and the last of them: enough to notice another file or tokenizer."""
    ends = rows.select([*range(min(sample, len(rows))), *range(max(len(rows) - sample, 0), len(rows))])
    text = json.dumps([len(rows), ends.to_list()], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
