"""One inspection of saved models: checkpoints, plain and packed ``.safetensors`` files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from pruning_core import checkpoint
from pruning_core.checkpoint import CheckpointError
from pruning_core.cli.packing import is_packed, packed_table
from pruning_core.masks.report import SparsityReport, report_of_saved
from pruning_core.sparse_format.sparse_file import load_sparse, read_safetensors

MODEL_KEYS = ("model", "state_dict", "model_state_dict")


def inspect(path: str | Path) -> SparsityReport:
    """The report of a ``.pt`` checkpoint (model, and pruner when it was saved too) or a ``.safetensors`` file."""
    path = Path(path)
    if path.suffix == ".safetensors":
        return report_of_saved(load_sparse(path) if is_packed(path) else read_safetensors(path), None)
    state = checkpoint.load(path)
    pruner = next((value for value in state.values() if _is_pruner(value)), None)
    model = model_of(path, state)
    if any(isinstance(value, DTensor) for value in model.values()):
        raise CheckpointError(f"{path}: holds one rank's slices of sharded weights; inspect a full state dict instead")
    if pruner is None:
        return report_of_saved(model, None)
    try:
        return report_of_saved(model, pruner)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise CheckpointError(
            f"{path}: the pruner's state in it is damaged or of another version ({reason})"
        ) from error


def _is_pruner(value: Any) -> bool:
    return isinstance(value, dict) and {"config", "clocks", "groups"} <= value.keys()


def model_of(path: Path, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state dict of the model in a checkpoint, which may be the checkpoint itself."""
    for candidate in (*(state.get(key) for key in MODEL_KEYS), state):
        if isinstance(candidate, Mapping) and any(isinstance(value, Tensor) for value in candidate.values()):
            return candidate
    known = ", ".join(MODEL_KEYS)
    raise CheckpointError(f"{path}: holds no model weights; save a state_dict itself or under one of: {known}")


def show(path: Path, json: str | None, plot: str | None) -> None:
    """Prints the report; of a packed file the table of what it packs, which says more."""
    packed = is_packed(path)
    report = inspect(path) if json or plot or not packed else None
    print(packed_table(path) if packed else report)
    if report is not None and json:
        report.save_json(json)
    if report is not None and plot:
        report.plot(plot)
