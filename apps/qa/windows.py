"""A question and its context as windows of tokens: long contexts are read in overlapping stretches."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from apps.common.errors import BadInput

Encode = Callable[[dict[str, list[Any]]], tuple[Any, list[int]]]
"""A batch of rows -> the encoding of all their windows, and the row that each window came from."""


def check_lengths(options: Namespace, tokenizer: PreTrainedTokenizerBase, rows: Dataset, source: str) -> None:
    """Every window has room for more context than two of them share."""
    special = tokenizer.num_special_tokens_to_add(pair=True)
    asked = rows["question"]
    longest, where = 0, 0
    for first in range(0, len(asked), 1000):
        ids = tokenizer([text.strip() for text in asked[first : first + 1000]], add_special_tokens=False)["input_ids"]
        for i, tokens in enumerate(ids):
            longest, where = max((longest, where), (len(tokens), first + i))
    room = options.max_seq_length - special - longest
    if room <= options.doc_stride:
        question = f"question {rows[where]['id']!r} in {source} takes {longest} tokens"
        enough = f"--max_seq_length at least {options.doc_stride + special + longest + 1}"
        if room < 1:
            raise BadInput(f"--max_seq_length: {question}, got {options.max_seq_length}; use {enough}")
        raise BadInput(f"--doc_stride: {question}: it must be below {room}, or {enough}, got {options.doc_stride}")


def training_windows(options: Namespace, tokenizer: PreTrainedTokenizerBase, rows: Dataset) -> Dataset:
    """With the tokens where the answer starts and ends; both are the first special token where it is not inside."""
    encode = _encoder(options, tokenizer)

    def make(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        encoded, sources = encode(batch)
        starts, ends = [], []
        for i, example in enumerate(sources):
            answers = batch["answers"][example]
            cls = _cls(tokenizer, encoded["input_ids"][i])
            place = None
            if answers["text"]:
                text, first = answers["text"][0], answers["answer_start"][0]
                bare = text.strip()  # no token holds the blanks around it
                first += text.index(bare)
                place = _tokens_of(_context_offsets(encoded, i), first, first + len(bare))
            starts.append(cls if place is None else place[0])
            ends.append(cls if place is None else place[1])
        return {**_inputs(tokenizer, encoded), "start_positions": starts, "end_positions": ends}

    return _mapped(options, rows, make, "cutting training windows")


def validation_windows(options: Namespace, tokenizer: PreTrainedTokenizerBase, rows: Dataset) -> Dataset:
    """With the example each came from, and the characters that each token of the context stands for."""
    encode = _encoder(options, tokenizer)

    def make(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        encoded, sources = encode(batch)
        offsets = [_context_offsets(encoded, i).ravel() for i in range(len(sources))]
        return {
            **_inputs(tokenizer, encoded),
            "example": [numbers[each] for each in sources],
            "offsets": offsets,
            "cls": [_cls(tokenizer, ids) for ids in encoded["input_ids"]],
        }

    return _mapped(options, rows, make, "cutting validation windows", with_indices=True)


def _encoder(options: Namespace, tokenizer: PreTrainedTokenizerBase) -> Encode:
    """Holds nothing but what changes the windows: other options must find them in the cache."""
    length, stride = options.max_seq_length, options.doc_stride
    padding = "max_length" if options.pad_to_max_length else False

    def encode(batch: dict[str, list[Any]]) -> tuple[Any, list[int]]:
        encoded = tokenizer(
            [text.strip() for text in batch["question"]],
            batch["context"],
            truncation="only_second",
            max_length=length,
            stride=stride,
            padding=padding,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        return encoded, list(encoded["overflow_to_sample_mapping"])

    return encode


def _inputs(tokenizer: PreTrainedTokenizerBase, encoded: Any) -> dict[str, list[Any]]:
    return {name: encoded[name] for name in tokenizer.model_input_names if name in encoded}


def _context_offsets(encoded: Any, window: int) -> np.ndarray:
    """(tokens, 2): first character and the one after the last; -1 outside the context."""
    offsets = np.array(encoded["offset_mapping"][window], dtype=np.int32).reshape(-1, 2)
    outside = [part != 1 for part in encoded.sequence_ids(window)]
    offsets[outside] = -1
    return offsets


def _tokens_of(offsets: np.ndarray, first: int, last: int) -> tuple[int, int] | None:
    """The tokens that hold the characters ``first`` to ``last``, or None where the window ends before them."""
    inside = np.flatnonzero(offsets[:, 0] >= 0)
    if not len(inside) or offsets[inside[0], 0] > first or offsets[inside[-1], 1] < last:
        return None
    start = inside[offsets[inside, 0] <= first][-1]
    end = inside[offsets[inside, 1] >= last][0]
    return int(start), int(end)


def _cls(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> int:
    return ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in ids else 0


def _mapped(options: Namespace, rows: Dataset, make: Any, what: str, **more: Any) -> Dataset:
    return rows.map(
        make,
        batched=True,
        remove_columns=rows.column_names,
        num_proc=options.preprocessing_num_workers,
        load_from_cache_file=not options.overwrite_cache,
        desc=what,
        **more,
    )
