"""From files, the hub or the embedded grammar to rows ready for the model; and the numbers that judge one."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from apps.common.errors import BadInput
from apps.common.finetune.files import digest, first_rows, from_hub, read_rows
from apps.common.finetune.run import Data, Run
from apps.text_classification.labels import label_names, label_numbers
from apps.text_classification.tasks import TASKS, Task, compute_metrics, custom_task
from data import sentences

LABEL = "label"
HUB = "nyu-mll/glue"
SUFFIXES = ("", "_mm")
"""Of the metrics of the first and the second validation set, as the results of MNLI are written."""
Splits = list[tuple[str, Dataset]]
"""(the option or split that it came from, its rows): the training rows first."""


def read_data(options: Namespace, tokenizer: PreTrainedTokenizerBase) -> Data:
    name, splits = _read(options)
    task = _task(options, splits)
    if options.dist_loss == "kl" and task.labels is None:
        raise BadInput(f"--dist_loss: kl needs classes, got a regression in {name}; use l2")
    ready = [
        (source, first_rows(rows, options.max_eval_samples if i else options.max_train_samples))
        for i, (source, rows) in enumerate(splits)
    ]
    train, *held_out = [_tokenized(options, tokenizer, task, source, rows) for source, rows in ready]
    names = [task.name if not suffix else f"{task.name}{suffix}" for suffix in SUFFIXES]
    collate = DataCollatorWithPadding(tokenizer)
    rows = [f"{len(each):,}" for each in held_out]
    return Data(
        name=name,
        train=train,
        collate=collate,
        validation={
            key: DataLoader(each, batch_size=options.per_device_eval_batch_size, collate_fn=collate)
            for key, each in zip(names, held_out, strict=False)
        },
        score=lambda run, loaders: _score(run, loaders, task),
        main=task.main,
        metrics=tuple(f"{metric}{suffix}" for suffix in SUFFIXES[: len(held_out)] for metric in task.metrics),
        config=_config(task),
        embedded=name == "film reviews",
        summary=f"{name}: {len(train):,} training and {' + '.join(rows)} validation rows, {_kind(task)}",
        identity={
            "training rows": digest(train),
            "validation rows": [digest(each) for each in held_out],
            "labels": list(task.labels or ()),
        },
    )


def _kind(task: Task) -> str:
    return "regression" if task.labels is None else f"{len(task.labels)} labels"


def _config(task: Task) -> dict[str, Any]:
    if task.labels is None:
        return {"num_labels": 1, "problem_type": "regression"}
    ids = dict(enumerate(task.labels))
    return {
        "problem_type": "single_label_classification",
        "num_labels": len(ids),
        "id2label": ids,
        "label2id": {label: i for i, label in ids.items()},
    }


def _read(options: Namespace) -> tuple[str, Splits]:
    """What the data are called, and their splits."""
    files = {
        "--train_file": options.train_file,
        "--validation_file": options.validation_file,
        "--validation_mismatched_file": options.validation_mismatched_file,
    }
    given = {option: path for option, path in files.items() if path is not None}
    if "--validation_mismatched_file" in given and options.task_name != "mnli":
        raise BadInput(f"--validation_mismatched_file: only mnli has one, got {options.task_name}; leave it out")
    if given:
        for option in ("--train_file", "--validation_file"):
            if option not in given:
                raise BadInput(f"{option}: is missing beside {next(iter(given))}; give both")
        return options.task_name or "local files", [(option, read_rows(path, option)) for option, path in given.items()]
    if options.task_name is None:
        return "film reviews", [
            (split, Dataset.from_list(sentences.sentiment(split))) for split in ("train", "validation")
        ]
    found = from_hub(HUB, options.task_name, "--task_name")
    return options.task_name, [(split, found[split]) for split in ("train", *TASKS[options.task_name].validation)]


def _task(options: Namespace, splits: Splits) -> Task:
    for source, rows in splits:
        if LABEL not in rows.column_names:
            raise BadInput(f"{source}: has no column {LABEL!r}, got {rows.column_names}; rename the right one")
    if options.task_name is not None:
        task = TASKS[options.task_name]
    else:
        source, rows = splits[0]
        task = custom_task(_text_columns(rows), label_names(rows[LABEL], source))
    for source, rows in splits:
        for column in task.columns:
            if column not in rows.column_names:
                do = f"{task.name} reads {' and '.join(task.columns)}"
                raise BadInput(f"{source}: has no column {column!r}, got {rows.column_names}; {do}")
    return task


def _text_columns(rows: Dataset) -> list[str]:
    """Numbers such as an index are no text."""
    return [
        name
        for name, feature in rows.features.items()
        if name != LABEL and getattr(feature, "dtype", "") in ("string", "large_string")
    ]


def _tokenized(
    options: Namespace, tokenizer: PreTrainedTokenizerBase, task: Task, source: str, rows: Dataset
) -> Dataset:
    labels = label_numbers(task, rows[LABEL], source)
    for column in task.columns:
        for i, text in enumerate(rows[column]):
            if not isinstance(text, str):
                raise BadInput(f"{source}: {column!r} of row {i + 1} is no text, got {text!r}; mend the row")
    columns, length = task.columns, options.max_length
    padding = "max_length" if options.pad_to_max_length else False

    def tokenize(batch: dict[str, list[str]]) -> Any:
        return tokenizer(*(batch[name] for name in columns), truncation=True, max_length=length, padding=padding)

    tokens = rows.select_columns(list(columns)).map(
        tokenize,
        batched=True,
        remove_columns=list(columns),
        num_proc=options.preprocessing_num_workers,
        load_from_cache_file=not options.overwrite_cache,
        desc="tokenizing",
    )
    return tokens.add_column("labels", labels)


def _score(run: Run, loaders: dict[str, DataLoader[Any]], task: Task) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for suffix, loader in zip(SUFFIXES, loaders.values(), strict=False):
        predictions, references = [], []
        for batch in loader:
            logits = run.model(**{name: value for name, value in batch.items() if name != "labels"}).logits
            guess = logits.squeeze(-1) if task.labels is None else logits.argmax(-1)
            # What was added to fill the last batch of the ranks is counted once.
            pair = run.accelerator.gather_for_metrics((guess, batch["labels"]))
            predictions.append(pair[0].float().cpu())
            references.append(pair[1].float().cpu())
        found = compute_metrics(task.metrics, _array(predictions), _array(references))
        metrics |= {f"{name}{suffix}": value for name, value in found.items()}
    return metrics


def _array(parts: list[torch.Tensor]) -> np.ndarray:
    return torch.cat(parts).numpy()
