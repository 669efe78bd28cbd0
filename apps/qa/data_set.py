"""Windows ready for the model; and EM and F1 of the answers it finds in those that were held out."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from apps.common.errors import BadInput
from apps.common.finetune.files import digest, first_rows
from apps.common.finetune.run import Data, Run
from apps.qa import metrics
from apps.qa.answers import Answer, Window, answer, check_options
from apps.qa.questions_file import EMBEDDED, read_questions
from apps.qa.windows import check_lengths, training_windows, validation_windows
from pruning_core.checkpoint import write_atomically

MAIN = "f1"
NUMBER = "window"
FAR = -1e30
"""The logit of a token that another rank's longer batch has and this one has not."""


def read_data(options: Namespace, tokenizer: PreTrainedTokenizerBase) -> Data:
    check_options(options.n_best_size, options.max_answer_length)
    if tokenizer.padding_side != "right":
        raise BadInput("--tokenizer_name: pads on the left, got an autoregressive model; use an encoder such as BERT")
    if options.null_score_diff_threshold and not options.version_2_with_negative:
        got = options.null_score_diff_threshold
        raise BadInput(
            f"--null_score_diff_threshold: does nothing without --version_2_with_negative, got {got:g}; add it"
        )
    if options.dataset_config_name and not options.dataset_name:
        got = options.dataset_config_name
        raise BadInput(f"--dataset_config_name: does nothing without --dataset_name, got {got}; add it")
    name, ((_, train), (source, held_out)) = read_questions(options)
    train, held_out = first_rows(train, options.max_train_samples), first_rows(held_out, options.max_eval_samples)
    check_lengths(options, tokenizer, train, "the training questions")
    check_lengths(options, tokenizer, held_out, source)
    training, windows = training_windows(options, tokenizer, train), validation_windows(options, tokenizer, held_out)
    judge = Judge(options, held_out, windows)
    inputs = windows.remove_columns(["example", "offsets", "cls"]).add_column(NUMBER, list(range(len(windows))))
    collate = DataCollatorWithPadding(tokenizer)
    batches = DataLoader(inputs, batch_size=options.per_device_eval_batch_size, collate_fn=collate)
    exact = "exact" if options.version_2_with_negative else "exact_match"
    return Data(
        name=name,
        train=training,
        collate=collate,
        validation={name: batches},
        score=judge.score,
        main=MAIN,
        metrics=(exact, MAIN),
        config={},
        embedded=name == EMBEDDED,
        summary=f"{name}: {len(train):,} training and {len(held_out):,} validation questions in {len(training):,} "
        f"and {len(windows):,} windows",
        identity={"training windows": digest(training), "validation questions": digest(held_out)},
        write=judge.write,
    )


class Judge:
    """Finds the answers in the logits of all windows, on rank 0; every rank gets the metrics."""

    def __init__(self, options: Namespace, rows: Dataset, windows: Dataset) -> None:
        self.options, self.rows = options, rows
        self.examples, self.cls = windows["example"], windows["cls"]
        self.offsets = [np.asarray(each, dtype=np.int32).reshape(-1, 2) for each in windows["offsets"]]
        self.answers: dict[str, Answer] = {}

    def score(self, run: Run, loaders: dict[str, DataLoader[Any]]) -> dict[str, float]:
        found: list[Window] = []
        for loader in loaders.values():
            for batch in loader:
                numbers = batch.pop(NUMBER)
                outputs = run.model(**batch)
                logits = torch.stack([outputs.start_logits, outputs.end_logits], 1).float()
                logits = run.accelerator.pad_across_processes(logits, dim=2, pad_index=FAR)
                # What was added to fill the last batch of the ranks is counted once.
                both, which = run.accelerator.gather_for_metrics((logits, numbers))
                if run.ranks.first:
                    found += [self._window(*each) for each in zip(which.tolist(), both.cpu().numpy(), strict=True)]
        return run.ranks.from_first(self._judged(found) if run.ranks.first else None)

    def _window(self, number: int, logits: np.ndarray) -> Window:
        offsets = self.offsets[number]
        start, end = logits[:, : len(offsets)]
        return Window(self.examples[number], offsets, start, end, cls=self.cls[number])

    def _judged(self, found: list[Window]) -> dict[str, float]:
        of: dict[int, list[Window]] = {}
        for window in found:
            of.setdefault(window.example, []).append(window)
        self.answers, golds = {}, {}
        for number, row in enumerate(self.rows):
            self.answers[row["id"]] = answer(
                row["context"],
                of[number],
                n_best=self.options.n_best_size,
                max_answer_length=self.options.max_answer_length,
                unanswerable=self.options.version_2_with_negative,
                null_threshold=self.options.null_score_diff_threshold,
            )
            golds[row["id"]] = list(row["answers"]["text"])
        if not self.options.version_2_with_negative:
            return metrics.evaluate({key: each.text for key, each in self.answers.items()}, golds)
        spans = {key: each.span for key, each in self.answers.items()}
        scores = {key: each.null_score_difference for key, each in self.answers.items()}
        return metrics.evaluate_v2(spans, golds, scores, threshold=self.options.null_score_diff_threshold)

    def write(self, folder: Path) -> None:
        """The answers, as the official evaluation scripts read them."""
        _write(folder / "predictions.json", {key: each.text for key, each in self.answers.items()})
        _write(folder / "nbest_predictions.json", {key: each.n_best for key, each in self.answers.items()})
        if self.options.version_2_with_negative:
            odds = {key: min(each.null_score_difference, -FAR) for key, each in self.answers.items()}  # JSON has no inf
            _write(folder / "null_odds.json", odds)


def _write(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))
