"""``python -m pruning_core inspect CHECKPOINT``: what is zero in a saved model, layer by layer."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from pruning_core import checkpoint
from pruning_core.checkpoint import CheckpointError
from pruning_core.masks.report import report_of_saved
from pruning_core.report import Report

MODEL_KEYS = ("model", "state_dict", "model_state_dict")


def inspect(path: str | Path) -> Report:
    """The report of a ``.pt`` checkpoint (model, and pruner when it was saved too) or a ``.safetensors`` file."""
    if Path(path).suffix == ".safetensors":
        return report_of_saved(_safetensors(path), None)
    state = checkpoint.load(path)
    pruner = next((value for value in state.values() if _is_pruner(value)), None)
    model = _model(state)
    if model is None:
        known = ", ".join(MODEL_KEYS)
        raise CheckpointError(f"{path}: holds no model weights; save a state_dict itself or under one of: {known}")
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


def _safetensors(path: str | Path) -> Mapping[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; check the path of the checkpoint") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error


def _is_pruner(value: Any) -> bool:
    return isinstance(value, dict) and {"config", "clocks", "groups"} <= value.keys()


def _model(state: Mapping[str, Any]) -> Mapping[str, Any] | None:
    for candidate in (*(state.get(key) for key in MODEL_KEYS), state):
        if isinstance(candidate, Mapping) and any(isinstance(value, Tensor) for value in candidate.values()):
            return candidate
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pruning_core", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    look = commands.add_parser("inspect", help="print asked and reached sparsity per layer of a saved model")
    look.add_argument("checkpoint", help="a .pt file written by pruning_core.checkpoint or torch.save, or .safetensors")
    look.add_argument("--json", metavar="FILE", help="also write the report as JSON")
    look.add_argument("--plot", metavar="FILE", help="also draw a bar per layer")
    options = parser.parse_args(arguments)
    try:
        report = inspect(options.checkpoint)
        print(report)
        if options.json:
            report.save_json(options.json)
        if options.plot:
            report.plot(options.plot)
    except (ValueError, OSError, ImportError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
