"""A WordPiece vocabulary by counting: the same texts give the same tokens, on any machine and in any process."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ALPHABET = string.ascii_lowercase + string.digits + string.punctuation


def vocabulary(texts: Iterable[str]) -> list[str]:
    """Special tokens, every character, every ``##character``, then whole words by frequency, ties by alphabet."""
    # Slow to load, and whoever only wants sentences does without.
    from tokenizers.normalizers import BertNormalizer
    from tokenizers.pre_tokenizers import BertPreTokenizer

    lower, split = BertNormalizer(lowercase=True), BertPreTokenizer()
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(word for word, _ in split.pre_tokenize_str(lower.normalize_str(text)))
    characters = sorted(set(ALPHABET).union(*counts))
    words = sorted((word for word in counts if len(word) > 1), key=lambda word: (-counts[word], word))
    return [*SPECIAL, *characters, *(f"##{character}" for character in characters), *words]


def tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """A fast BERT tokenizer of that vocabulary; a word it does not hold is spelled in characters."""
    from transformers import BertTokenizer

    return BertTokenizer(vocab={token: index for index, token in enumerate(vocabulary(texts))}, do_lower_case=True)
