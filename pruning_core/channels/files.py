"""Files of a slim model: its tensors, and its structure as plain data.

A ``.pt`` file loads with ``torch.load(weights_only=True)``, a ``.safetensors`` file with any reader of that format.
Loading does not trace the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import safe_open
from torch import nn

from pruning_core import checkpoint
from pruning_core.checkpoint import CheckpointError, write_atomically
from pruning_core.graph import apply_structure, structure

MODEL_DEF, STATE = "model_def", "state_dict"
METADATA = "pruning_core.slim"


def save_model_def(model: nn.Module) -> dict[str, Any] | None:
    """The structure of a slim model, for a checkpoint's ``model_def``; None for a dense one."""
    found = structure(model)
    return None if found is None else json.loads(json.dumps(found))


def load_model_def(model: nn.Module, path: str | Path) -> nn.Module:
    """Cuts a fresh dense model as the checkpoint's ``model_def`` says; its ``state_dict`` fits afterwards."""
    saved = checkpoint.load(path)
    if not isinstance(saved, Mapping) or MODEL_DEF not in saved:
        raise CheckpointError(f"{path}: holds no model_def; save one with save_model_def(model)")
    if saved[MODEL_DEF] is not None:
        apply_structure(model, saved[MODEL_DEF])
    return model


def save_slim(model: nn.Module, path: str | Path) -> None:
    """Writes weights and structure of a slim model to one file, ``.pt`` or ``.safetensors``, atomically."""
    found = save_model_def(model)
    if Path(path).suffix != ".safetensors":
        checkpoint.save({STATE: model.state_dict(), MODEL_DEF: found}, path)
        return
    tensors = {name: value.detach().clone().contiguous() for name, value in model.state_dict().items()}
    data = safetensors.torch.save(tensors, {"format": "pt", METADATA: json.dumps(found)})
    write_atomically(path, lambda file: file.write(data))


def load_slim(model: nn.Module, path: str | Path) -> nn.Module:
    """Cuts a fresh dense ``model`` in place as the file says, loads the weights, and returns it."""
    if Path(path).suffix != ".safetensors":
        load_model_def(model, path)
        model.load_state_dict(checkpoint.load(path)[STATE])
        return model
    try:
        with safe_open(str(path), "pt") as file:
            text = (file.metadata() or {}).get(METADATA)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors, got {error}") from error
    if text is None:
        raise CheckpointError(f"{path}: does not say how the model was cut; write it with save_slim")
    found = json.loads(text)
    if found is not None:
        apply_structure(model, found)
    model.load_state_dict(tensors)
    return model
