"""Train, prune and distil a Transformers model for text classification. The loop is in apps/common/finetune/loop.py.

python apps/text_classification/train_prune.py --help
"""

from __future__ import annotations

from apps.text_classification.arguments import parser

if __name__ == "__main__":
    OPTIONS, GIVEN = parser().parse_args(), parser().given()  # before the slow imports: mistakes are answered at once

from argparse import Namespace
from typing import Any

from transformers import AutoModelForSequenceClassification

from apps.common.finetune.build import start
from apps.common.finetune.run import App
from apps.common.interrupt import leave_with
from apps.text_classification.data_set import read_data
from data import sentences, wordpiece

APP = App(
    name="text_classification",
    kind=AutoModelForSequenceClassification,
    task="text-classification",
    logits=lambda outputs: [outputs.logits],
    counts=lambda batch: None,
    length="max_length",
    full=1.0,
    epochs=6,
)


def tokenizer() -> Any:
    """Of both embedded sets, so that a model trained on one goes on with the other."""
    sets = [each(split) for each in (sentences.sentiment, sentences.paraphrase) for split in ("train", "validation")]
    return wordpiece.tokenizer(text for rows in sets for row in rows for text in row.values() if isinstance(text, str))


def main(options: Namespace, given: dict[str, Any]) -> int:
    return start(APP, options, given, tokenizer, read_data)


if __name__ == "__main__":
    leave_with(lambda: main(OPTIONS, GIVEN))
