"""Registers packed and slim models with ``transformers``; imported after it.

A packed weight lies under its own name as a row of bytes. ``transformers`` without this loader finds that its shape is
not the layer's and refuses; with it, every such row becomes the weight before anything else is done with it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pruning_core.checkpoint import CheckpointError
from pruning_core.graph.cut.structure import apply_structure, keep_structure
from pruning_core.integrations.transformers.folder import METHOD
from pruning_core.sparse_format import packed
from pruning_core.sparse_format.reader import opened


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """``quantization_config`` of a packed model: the files say everything else. ``slim`` says how a model was cut."""

    def __init__(
        self,
        quant_method: str = METHOD,
        slim: dict[str, Any] | None = None,
        packed: bool | None = None,
        **kwargs: Any,
    ) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]
        if slim is not None:
            self.slim, self.packed = slim, bool(packed)


@register_quantizer(METHOD)
class PackedLoader(HfQuantizer):
    """Unpacks at load; what comes out is a plain model that trains and is saved like any other."""

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        self.slim, packed = getattr(config, "slim", None), getattr(config, "packed", True)
        if self.slim is not None:
            apply_structure(model, self.slim)
        self.last_names = {"weight"}
        for file in checkpoint_files or () if packed else ():
            with opened(file) as reader:
                self.last_names |= {_last(name) for name in reader if reader.heads[name]}

    def get_weight_conversions(self) -> list[Any]:
        from transformers.core_model_loading import WeightConverter

        names = sorted(self.last_names)
        return [WeightConverter([name], [name], operations=[_unpack()]) for name in names]

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """A model's own conversions (experts that are merged, say) work on weights, not on rows of bytes."""
        for conversion in weight_conversions:
            if hasattr(conversion, "operations"):
                conversion.operations.insert(0, _unpack())
        return weight_conversions + self.get_weight_conversions()

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self.remove_quantization_config(model)
        if self.slim is not None:
            keep_structure(model, self.slim)

    @property
    def is_trainable(self) -> bool:
        return True

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True


def _last(name: str) -> str:
    """The part of a name that conversions match. They take it for a regular expression, so it must be a word."""
    last = name.rpartition(".")[2]
    if not re.fullmatch(r"\w+", last):
        raise CheckpointError(f"{name}: is no name of a parameter; save the model with save_pretrained_sparse")
    return last


def _unpack() -> Any:
    from transformers.core_model_loading import ConversionOps

    class Unpack(ConversionOps):
        """Conversion of packed rows to weights; weights pass unchanged, so it is its own inverse."""

        def convert(self, input_dict: dict[str, Any], *patterns: Any, **kwargs: Any) -> dict[str, Any]:
            dtype = _dtype(kwargs.get("model"), kwargs.get("full_layer_name", ""))
            return {name: _each(value, dtype) for name, value in input_dict.items()}

        @property
        def reverse_op(self) -> Any:
            return self

    return Unpack()


def _each(value: Any, dtype: torch.dtype | None) -> Any:
    if isinstance(value, list):
        return [_each(each, dtype) for each in value]
    if not _is_row(value):
        return value
    weight = packed.unpack(value.to("cpu", torch.uint8).numpy())
    return weight.to(value.device, dtype or weight.dtype)


def _is_row(value: Tensor) -> bool:
    """Some versions cast the bytes to the layer's dtype on their way: that is exact, and no weight begins like this."""
    return value.dim() == 1 and len(value) >= packed.START.size and value[:4].tolist() == list(packed.MAGIC)


def _dtype(model: Any, name: str) -> torch.dtype | None:
    """What the model was asked to be made of: packed rows cannot be cast on their way, as other weights are."""
    try:
        own: torch.dtype = model.get_parameter(name).dtype
    except AttributeError:  # a name that becomes another one, or a buffer
        return None
    return own
