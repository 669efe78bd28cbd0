"""The vocabulary: by counting, the same in every process; the tokenizer survives being saved."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from data.wordpiece import SPECIAL, tokenizer, vocabulary
from tests.support import ROOT

TEXTS = ["The plot is dull, the acting is not.", "Lunch cost $12.50: who paid?", "plot plot acting Café"]


def test_special_tokens_then_characters_then_words_by_frequency_and_alphabet():
    tokens = vocabulary(["b b zu zu an an it", "It's"])
    assert tokens[:5] == list(SPECIAL)
    assert tokens[-3:] == ["an", "it", "zu"]  # twice each; one letter is a character already
    assert vocabulary(["b b zu zu zu an an it"])[-3:] == ["zu", "an", "it"]
    characters = tokens[5:-3]
    half = len(characters) // 2
    assert characters[half:] == [f"##{character}" for character in characters[:half]]
    assert set("abz09,.?$'") <= set(characters[:half])
    assert len(set(tokens)) == len(tokens)


def test_words_are_split_and_lowered_as_bert_does():
    tokens = vocabulary(TEXTS)
    assert {"the", "cafe", "12", "50", "$", ".", ":"} <= set(tokens)
    assert not {"The", "café", "12.50", "dull,"} & set(tokens)


def test_a_character_of_the_texts_is_never_unknown():
    own = tokenizer(["naïve 数 ß€"])
    assert own.unk_token_id not in own("数ß€ iann€ß")["input_ids"]


def test_no_texts_still_give_a_tokenizer_that_spells():
    own = tokenizer([])
    assert own.convert_ids_to_tokens(own("ab!")["input_ids"]) == ["[CLS]", "a", "##b", "!", "[SEP]"]


def test_pairs_types_and_offsets():
    own = tokenizer(TEXTS)
    text = "Who paid $12.50?"
    rows = own("the plot", text, return_offsets_mapping=True)
    tokens = own.convert_ids_to_tokens(rows["input_ids"])
    assert tokens == ["[CLS]", "the", "plot", "[SEP]", "who", "paid", "$", "12", ".", "50", "?", "[SEP]"]
    assert rows["token_type_ids"] == [0] * 4 + [1] * 8
    assert [text[start:end].lower() for start, end in rows["offset_mapping"][4:-1]] == tokens[4:-1]
    assert own.is_fast


def test_an_unknown_word_is_spelled():
    own = tokenizer(TEXTS)
    assert own.convert_ids_to_tokens(own("Zq7 plot")["input_ids"]) == ["[CLS]", "z", "##q", "##7", "plot", "[SEP]"]


def test_saved_and_loaded_is_the_same(tmp_path):
    from transformers import AutoTokenizer

    own = tokenizer(TEXTS)
    own.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is type(own)
    assert again.get_vocab() == own.get_vocab()
    pair = ("The unknown Plot?", "Café at 12:30, zq.")
    assert dict(again(*pair, return_offsets_mapping=True)) == dict(own(*pair, return_offsets_mapping=True))
    for name in ("pad", "unk", "cls", "sep", "mask"):
        assert (
            getattr(again, f"{name}_token_id") == getattr(own, f"{name}_token_id") == SPECIAL.index(f"[{name.upper()}]")
        )


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_another_process_gives_the_same(hash_seed):
    code = f"from data.wordpiece import vocabulary; print(*vocabulary({TEXTS!r}), sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == vocabulary(TEXTS)
