"""Runs the two Transformers apps on tiny models and sets, in this process or under torchrun."""

from __future__ import annotations

import csv
import importlib
import json
import os
import random
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from tests.support import ROOT

APPS = ("text_classification", "qa")
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "ACCELERATE_USE_CPU": "true",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTHONWARNINGS": "ignore",
}
GOOD, BAD = ("great", "funny", "clever", "fresh"), ("awful", "dull", "silly", "stale")
PARTS = ("plot", "music", "ending", "film")
NAMES = ("Anna", "Boris", "Clara", "David")
TOWNS = ("Arden", "Dover", "Perth", "Corby", "Lake View")
TEXTS = (
    *(f"the {part} is {word} ." for part in PARTS for word in (*GOOD, *BAD)),
    *(f"{name} lives in {town}. Where does {name} live?" for name in NAMES for town in TOWNS),
)
"""What the vocabulary below is made of; other words are spelled in characters."""
SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
Row = dict[str, Any]


# ---- runs -----------------------------------------------------------------------------------------------------------


def arguments(train: Path | None, validation: Path | None, output: Path, *more: str, **options: object) -> list[str]:
    """A run of seconds: ``seed=2`` becomes ``--seed=2``, None leaves an option out, what is given again wins."""
    chosen: dict[str, object] = {"train_file": train, "validation_file": validation, "output_dir": output}
    chosen |= {"num_train_epochs": 1, "learning_rate": 1e-3, **options}
    return [*(f"--{name}={value}" for name, value in chosen.items() if value is not None), *more]


def parsed(app: str, words: Sequence[str]) -> Namespace:
    """The options that the app's parser makes of these words."""
    return importlib.import_module(f"apps.{app}.arguments").parser().parse_args(list(words))


def main(app: str, words: list[str]) -> int:
    """In this process: the exit code of a run on one rank."""
    made = importlib.import_module(f"apps.{app}.arguments").parser
    try:
        options, given = made().parse_args(words), made().given(words)
        module = importlib.import_module(f"apps.{app}.train_prune")
        forget_accelerate()
        with mock.patch.dict(os.environ, ACCELERATE_USE_CPU="true"):  # also where there is a GPU
            return module.main(options, given)
    except SystemExit as left:
        return int(left.code or 0)
    finally:
        forget_accelerate()


def forget_accelerate() -> None:
    """Its state is one per process: the next run would have this one's precision."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def start(app: str, words: list[str], ranks: int = 1, **environment: str) -> subprocess.Popen[str]:
    """In a process of its own, or in two under torchrun; stdout and stderr are one stream."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.Popen(
        [*launcher, str(ROOT / f"apps/{app}/train_prune.py"), *words],
        cwd=ROOT,
        env={**ENVIRONMENT, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def run(app: str, words: list[str], ranks: int = 1, **environment: str) -> tuple[int, str]:
    process = start(app, words, ranks, **environment)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


# ---- models ---------------------------------------------------------------------------------------------------------


def tokenizer(texts: Sequence[str] = TEXTS) -> Any:
    from data import wordpiece

    return wordpiece.tokenizer(texts)


def save_model(
    folder: Path, app: str, *, head: bool = True, texts: Sequence[str] = TEXTS, seed: int = 0, **config: Any
) -> Path:
    """A random BERT with its tokenizer; ``num_labels=3``, ``hidden_size=32``, ... change it, ``head=False``: none."""
    import torch
    from transformers import BertConfig, BertForQuestionAnswering, BertForSequenceClassification, BertModel

    words = tokenizer(texts)
    kind: Any = BertForQuestionAnswering if app == "qa" else BertForSequenceClassification
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        settings = {"vocab_size": len(words), "max_position_embeddings": 128, **SHAPE, **dropout, **config}
        model = (kind if head else BertModel)(BertConfig(**settings))
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


# ---- sets -----------------------------------------------------------------------------------------------------------


def write(path: Path, rows: list[Row]) -> Path:
    """csv, tsv, json (a list), jsonl or parquet, by its ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        from datasets import Dataset

        Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    return path


def reviews(count: int, seed: int = 0) -> list[Row]:
    """``{"sentence", "label"}``: one word decides, so that a tiny model learns it."""
    rng = random.Random(seed)
    return [
        {"sentence": f"the {rng.choice(PARTS)} is {rng.choice((BAD, GOOD)[i % 2])} .", "label": i % 2}
        for i in range(count)
    ]


def pairs(count: int, seed: int = 0) -> list[Row]:
    """``{"sentence1", "sentence2", "label"}``: 1 where both sentences are equal."""
    rng, rows = random.Random(seed), list[Row]()
    for i in range(count):
        one, two = rng.sample(PARTS, 2)
        same = i % 2
        rows.append({"sentence1": f"the {one} .", "sentence2": f"the {one if same else two} .", "label": same})
    return rows


def questions(count: int, seed: int = 0, *, unanswerable: bool = False) -> list[Row]:
    """Flat rows of two facts and one question; with ``unanswerable`` every third asks for somebody else."""
    rng, rows = random.Random(seed), list[Row]()
    for i in range(count):
        (one, two, third), towns = rng.sample(NAMES, 3), rng.sample(TOWNS, 2)
        context = f"{one} lives in {towns[0]}. {two} lives in {towns[1]}."
        number = rng.randrange(2)
        asked, answer = (one, two)[number], towns[number]
        answers: Row = {"text": [answer], "answer_start": [context.index(f" in {answer}.") + 4]}
        if unanswerable and i % 3 == 2:
            asked, answers = third, {"text": [], "answer_start": []}
        question = f"Where does {asked} live?"
        rows.append({"id": f"q{seed}-{i}", "question": question, "context": context, "answers": answers})
    return rows


def squad(rows: list[Row], *, version: str = "1.1") -> Row:
    """The same rows in the layout of SQuAD; ``v2.0`` says of each whether it is impossible."""
    paragraphs = []
    for row in rows:
        answers = row["answers"]
        listed = [
            {"text": text, "answer_start": start}
            for text, start in zip(answers["text"], answers["answer_start"], strict=True)
        ]
        asked = {"id": row["id"], "question": row["question"], "answers": listed}
        if version == "v2.0":
            asked["is_impossible"] = not listed
        paragraphs.append({"context": row["context"], "qas": [asked]})
    half = len(paragraphs) // 2
    parts = [paragraphs[:half], paragraphs[half:]] if half else [paragraphs]
    return {"version": version, "data": [{"title": f"Notes {i}", "paragraphs": part} for i, part in enumerate(parts)]}


def write_squad(path: Path, rows: list[Row], *, version: str = "1.1") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(squad(rows, version=version)))
    return path
