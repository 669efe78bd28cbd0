"""Train, prune and distil a Transformers model that finds answers. The loop is in apps/common/finetune/loop.py.

python apps/qa/train_prune.py --help
"""

from __future__ import annotations

from apps.qa.arguments import parser

if __name__ == "__main__":
    OPTIONS, GIVEN = parser().parse_args(), parser().given()  # before the slow imports: mistakes are answered at once

from argparse import Namespace
from typing import Any

from transformers import AutoModelForQuestionAnswering

from apps.common.finetune.build import start
from apps.common.finetune.run import App
from apps.common.interrupt import leave_with
from apps.qa.data_set import read_data
from data import questions, wordpiece

APP = App(
    name="qa",
    kind=AutoModelForQuestionAnswering,
    task="question-answering",
    logits=lambda outputs: [outputs.start_logits, outputs.end_logits],
    counts=lambda batch: batch["attention_mask"].bool(),
    length="max_seq_length",
    full=100.0,
    epochs=5,
)


def tokenizer() -> Any:
    """Of the embedded stories, those without an answer too."""
    texts = []
    for split in ("train", "validation"):
        for article in questions.squad(split, unanswerable=True)["data"]:
            for paragraph in article["paragraphs"]:
                texts += [paragraph["context"], *(asked["question"] for asked in paragraph["qas"])]
    return wordpiece.tokenizer(texts)


def main(options: Namespace, given: dict[str, Any]) -> int:
    return start(APP, options, given, tokenizer, read_data)


if __name__ == "__main__":
    leave_with(lambda: main(OPTIONS, GIVEN))
