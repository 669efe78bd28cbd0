"""Twenty families of Transformers: narrow for tests, or as wide as the default of each; two blocks per stack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

Inputs = dict[str, Tensor]

_FEW_WORDS = {"vocab_size": 1000}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TWO = {"num_hidden_layers": 2}
_NARROW = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
_SHORT_TEXT = {**_TWO, **_FEW_WORDS}
_SHORT_STACKS = {"encoder_layers": 2, "decoder_layers": 2, **_FEW_WORDS, **_SPECIAL, "decoder_start_token_id": 1}
_NARROW_STACKS = {
    **{"d_model": 64, "encoder_attention_heads": 4, "encoder_ffn_dim": 128},
    **{"decoder_attention_heads": 4, "decoder_ffn_dim": 128},
}
_GROUPED = {**_NARROW, "num_key_value_heads": 2}
_SMALL_IMAGE = {"image_size": 32, "patch_size": 8}


def _words(**more: Any) -> Inputs:
    return {"input_ids": torch.arange(3, 35).view(2, 16), **more}


def _image(config: Any) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    return {"pixel_values": torch.randn(2, 3, config.image_size, config.image_size, generator=generator)}


def _text(config: Any) -> Inputs:
    return _words()


def _two_texts(config: Any) -> Inputs:
    return _words(decoder_input_ids=torch.arange(3, 19).view(2, 8))


def _text_and_image(config: Any) -> Inputs:
    return _words() | _image(config.vision_config)


def _sound(config: Any) -> Inputs:
    steps = 2 * config.max_source_positions
    sound = torch.randn(1, config.num_mel_bins, steps, generator=torch.Generator().manual_seed(0))
    return {"input_features": sound, "decoder_input_ids": torch.arange(3, 11).view(1, 8)}


Row = tuple[str, dict[str, Any], dict[str, Any], Callable[[Any], Inputs]]
FAMILIES: dict[str, Row] = {
    "BERT": ("BertForSequenceClassification", _SHORT_TEXT, _NARROW, _text),
    "RoBERTa": ("RobertaForSequenceClassification", _SHORT_TEXT, _NARROW, _text),
    "DistilBERT": (
        "DistilBertForSequenceClassification",
        {"n_layers": 2, **_FEW_WORDS},
        {"dim": 64, "n_heads": 4, "hidden_dim": 128},
        _text,
    ),
    "ELECTRA": ("ElectraForSequenceClassification", _SHORT_TEXT, {**_NARROW, "embedding_size": 32}, _text),
    "DeBERTa-v2": (
        "DebertaV2ForSequenceClassification",
        {**_SHORT_TEXT, "relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"]},
        _NARROW,
        _text,
    ),
    "ModernBERT": (
        "ModernBertForSequenceClassification",
        {**_SHORT_TEXT, **_SPECIAL, "cls_token_id": 1, "sep_token_id": 2},
        _NARROW,
        _text,
    ),
    "GPT-2": ("GPT2LMHeadModel", {"n_layer": 2, **_FEW_WORDS, **_SPECIAL}, {"n_embd": 64, "n_head": 4}, _text),
    "GPT-NeoX": (
        "GPTNeoXForCausalLM",
        {**_SHORT_TEXT, **_SPECIAL, "hidden_size": 2048, "num_attention_heads": 16, "intermediate_size": 8192},
        _NARROW,
        _text,
    ),
    "Llama": ("LlamaForCausalLM", _SHORT_TEXT, _GROUPED, _text),
    "Qwen2": ("Qwen2ForCausalLM", _SHORT_TEXT, _GROUPED, _text),
    "Qwen3": ("Qwen3ForCausalLM", _SHORT_TEXT, {**_GROUPED, "head_dim": 16}, _text),
    "Mistral": ("MistralForCausalLM", _SHORT_TEXT, _GROUPED, _text),
    "Gemma3": ("Gemma3ForCausalLM", _SHORT_TEXT, {**_GROUPED, "head_dim": 16}, _text),
    "T5": (
        "T5ForConditionalGeneration",
        {"num_layers": 2, **_FEW_WORDS},
        {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_heads": 4},
        _two_texts,
    ),
    "BART": ("BartForConditionalGeneration", _SHORT_STACKS, _NARROW_STACKS, _two_texts),
    "ViT": ("ViTForImageClassification", _TWO, {**_NARROW, **_SMALL_IMAGE}, _image),
    "DeiT": ("DeiTForImageClassification", _TWO, {**_NARROW, **_SMALL_IMAGE}, _image),
    "Swin": (
        "SwinForImageClassification",
        {"depths": [2, 2], "num_heads": [3, 6]},
        {"embed_dim": 24, "image_size": 32, "window_size": 4},
        _image,
    ),
    "CLIP": (
        "CLIPModel",
        {"text_config": {**_SHORT_TEXT, **_SPECIAL}, "vision_config": _TWO},
        {"text_config": _NARROW, "vision_config": {**_NARROW, **_SMALL_IMAGE}, "projection_dim": 32},
        _text_and_image,
    ),
    "Whisper": (
        "WhisperForConditionalGeneration",
        _SHORT_STACKS,
        {**_NARROW_STACKS, "max_source_positions": 50},
        _sound,
    ),
}  # fmt: skip


def family(name: str, narrow: bool = True) -> tuple[Any, Inputs]:
    """A model with random weights, in evaluation mode, and what it takes."""
    kind_name, short, small, inputs = FAMILIES[name]
    kind = getattr(transformers, kind_name)
    options = dict(short)
    for key, value in small.items() if narrow else ():
        options[key] = {**options.get(key, {}), **value} if isinstance(value, dict) else value
    torch.manual_seed(0)
    model = kind(kind.config_class(**options)).eval()
    return model, inputs(model.config)
