"""Models, tokenizers and teachers: loaded from a folder or the hub, and checked against each other and the data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from apps.common.errors import BadInput
from apps.common.finetune import hub


def load_config(name: str, option: str, **changed: Any) -> PretrainedConfig:
    return _loaded(lambda source: AutoConfig.from_pretrained(name, **source, **changed), name, option, "a model")


def load_tokenizer(name: str, option: str) -> PreTrainedTokenizerBase:
    tokenizer = _loaded(lambda source: AutoTokenizer.from_pretrained(name, **source), name, option, "a tokenizer")
    if not tokenizer.is_fast:
        raise BadInput(
            f"{option}: needs a fast tokenizer, got {type(tokenizer).__name__} in {name!r}; use another model"
        )
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what is made of a folder without one
        raise BadInput(f"{option}: no tokenizer is in {name!r}; give one with --tokenizer_name")
    return tokenizer


def load_model(
    kind: Any, name: str, option: str, *, config: PretrainedConfig, new_sizes: bool = False
) -> tuple[PreTrainedModel, list[str]]:
    """The model, in fp32, and the names of its weights that the file did not have: they are new."""

    def load(source: dict[str, Any]) -> Any:
        return kind.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # looked at below, with a message that says which
            **source,
        )

    model, info = _loaded(load, name, option, "a model")
    mismatched = sorted(each[0] for each in info["mismatched_keys"])
    if mismatched and not new_sizes:
        head = not mismatched[0].startswith(model.base_model_prefix)
        again = "add --ignore_mismatched_sizes to begin with a new head"
        do = again if head and option.startswith("--model") else "use another model"
        raise BadInput(f"{option}: {mismatched[0]} has another size than these data need, got {name!r}; {do}")
    return model, sorted({*info["missing_keys"], *mismatched})


def _loaded(load: Callable[[dict[str, Any]], Any], name: str, option: str, what: str) -> Any:
    source = {} if Path(name).exists() or hub.answers() else {"local_files_only": True}
    try:
        return load(source)
    except Exception as error:  # a damaged or foreign file leads to errors of many types
        if Path(name).exists():
            raise BadInput(
                f"{option}: {name!r} does not hold {what} ({_first_line(error)}); give its folder"
            ) from error
        place = "on the hub" if not source else "in the hub's cache, and the hub does not answer"
        raise BadInput(
            f"{option}: no such folder, and not {place}, got {name!r}; give a folder or a hub name"
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    rows, words = int(model.config.vocab_size or 0), len(tokenizer)
    if words > rows:
        do = "use the tokenizer that the model was trained with"
        raise BadInput(f"--tokenizer_name: has {words} entries, the model {name!r} only {rows}; {do}")


def check_length(model: PreTrainedModel, tokenizer: Any, tokens: int, option: str, who: str) -> None:
    """Longer rows would ask for positions that the model does not have, in the middle of training."""
    positions = getattr(model.config, "max_position_embeddings", None) or tokens
    limit = min(positions if positions > 0 else tokens, tokenizer.model_max_length)  # -1: as many as there are
    if tokens > limit:
        raise BadInput(f"{option}: {who} reads at most {limit} tokens, got {tokens}; lower it")


def load_teacher(kind: Any, name: str, option: str, student: PreTrainedModel, tokenizer: Any) -> PreTrainedModel:
    """Dense, in eval mode and without gradients: its outputs are those it is known for."""
    config = load_config(name, option)
    _compare(option, name, "labels", config.num_labels, student.config.num_labels)
    _compare(option, name, "entries in its vocabulary", config.vocab_size, student.config.vocab_size)
    if Path(name).is_dir() and (Path(name) / "tokenizer.json").is_file():
        theirs = load_tokenizer(name, option)
        if theirs.get_vocab() != tokenizer.get_vocab():
            raise BadInput(
                f"{option}: its tokenizer has other words, got {name!r}; use a teacher with the same tokenizer"
            )
    names = label_names(student.config), label_names(config)
    if names[0] != names[1] and sorted(names[0]) == sorted(names[1]):
        ours, others = (", ".join(each) for each in names)
        raise BadInput(
            f"{option}: its labels are in another order than {ours}, got {others} in {name!r}; use another teacher"
        )
    teacher, new = load_model(kind, name, option, config=config)
    if new:
        do = "train it on this task first, or give a teacher that was"
        raise BadInput(f"{option}: is no trained teacher: {new[0]} is not in {name!r}; {do}")
    return teacher.requires_grad_(False).eval()


def label_names(config: PretrainedConfig) -> list[str]:
    """In the order of their numbers; those that Transformers invents say nothing, and are left out."""
    named: dict[Any, str] = dict(config.id2label or {})
    names = [str(named[i]) for i in sorted(named)]
    return [] if all(name.startswith("LABEL_") for name in names) else names


def _compare(option: str, name: str, what: str, theirs: int | None, ours: int | None) -> None:
    if theirs != ours:
        raise BadInput(
            f"{option}: the teacher has {theirs} {what}, the student {ours}, got {name!r}; use another teacher"
        )


def tiny_bert(vocabulary: int, **shape: Any) -> PretrainedConfig:
    """Learns the embedded data sets from random weights in about two minutes."""
    from transformers import BertConfig

    size = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "intermediate_size": 128}
    rest = {"max_position_embeddings": 512, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    rest["initializer_range"] = 0.1  # with the usual 0.02 so narrow a model hardly learns which word to look at
    return BertConfig(vocab_size=vocabulary, **{**size, **rest, **shape})
