"""Look at saved models, pack them, unpack them, and check that nothing was damaged."""

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
from pruning_core.export import commands
from pruning_core.export.packed import CODECS
from pruning_core.export.sparse_file import AUTO, VALUES, Choice, load_sparse, read_safetensors
from pruning_core.masks.report import report_of_saved
from pruning_core.report import Report

WITHOUT_DATA = ("magnitude", "l1", "geometric_median", "random")
MODEL_KEYS = ("model", "state_dict", "model_state_dict")


def inspect(path: str | Path) -> Report:
    """The report of a ``.pt`` checkpoint (model, and pruner when it was saved too) or a ``.safetensors`` file."""
    path = Path(path)
    if path.suffix == ".safetensors":
        return report_of_saved(load_sparse(path) if commands.is_packed(path) else read_safetensors(path), None)
    state = checkpoint.load(path)
    pruner = next((value for value in state.values() if _is_pruner(value)), None)
    model = _model(path, state)
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


def _model(path: Path, state: Mapping[str, Any]) -> Mapping[str, Any]:
    for candidate in (*(state.get(key) for key in MODEL_KEYS), state):
        if isinstance(candidate, Mapping) and any(isinstance(value, Tensor) for value in candidate.values()):
            return candidate
    known = ", ".join(MODEL_KEYS)
    raise CheckpointError(f"{path}: holds no model weights; save a state_dict itself or under one of: {known}")


def _state(path: Path) -> Mapping[str, Any] | None:
    """What ``export`` packs; None of a model's folder, which is packed file by file."""
    if path.is_dir():
        return None
    if commands.is_packed(path):
        raise CheckpointError(f"{path}: is packed already; unpack it first")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    return _model(path, checkpoint.load(path))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m pruning_core", description=__doc__)
    all_commands = made.add_subparsers(dest="command", required=True)

    look = all_commands.add_parser("inspect", help="what is zero in a saved model, layer by layer")
    look.add_argument(
        "path", type=Path, help="a .pt file written by pruning_core.checkpoint or torch.save, or .safetensors"
    )
    look.add_argument("--json", metavar="FILE", help="also write the report as JSON")
    look.add_argument("--plot", metavar="FILE", help="also draw a bar per layer")

    pack = all_commands.add_parser("export", help="pack the zeros of a saved model: a small .safetensors")
    pack.add_argument("path", type=Path, help="a .pt or .safetensors file, or a folder of save_pretrained")
    pack.add_argument("out", type=Path, nargs="?", help="(PATH.sparse.safetensors, or PATH-sparse)")
    pack.add_argument("--codec", choices=CODECS, default=CODECS[-1], help="raw is larger and faster (entropy)")
    pack.add_argument("--values", choices=VALUES, default="fp32", help="bf16, fp16: round what is kept (fp32: do not)")
    pack.add_argument("--pattern", default=AUTO, help="4x1, 2:4, ... of all weights (auto: found for each)")
    pack.add_argument("--overwrite", action="store_true", help="replace what is there")

    back = all_commands.add_parser("unpack", help="the dense model again, for tools that know nothing of this")
    back.add_argument("path", type=Path, help="a packed .safetensors file, or a folder of them")
    back.add_argument("out", type=Path, nargs="?", help="(PATH-dense)")
    back.add_argument("--overwrite", action="store_true", help="replace what is there")

    slim = all_commands.add_parser("slim", help="remove channels of a transformers model")
    slim.add_argument("path", type=Path, help="a folder of save_pretrained")
    slim.add_argument("out", type=Path, nargs="?", help="(PATH-slim)")
    slim.add_argument(
        "--budget", type=budget, required=True, help="what is left: params=0.5, macs=0.5, channels=0.5 or latency=0.5"
    )
    slim.add_argument("--importance", choices=WITHOUT_DATA, default=WITHOUT_DATA[0], help="(magnitude)")
    slim.add_argument("--scope", choices=("global", "local"), default="global", help="rank all together, or each group")
    slim.add_argument("--round-to", type=int, default=1, metavar="N", help="leave multiples of N channels (1)")
    slim.add_argument("--plot", metavar="FILE", help="also draw a bar per layer")
    slim.add_argument("--overwrite", action="store_true", help="replace what is there")

    check = all_commands.add_parser("verify", help="read a packed model whole, and say whether it was damaged")
    check.add_argument("path", type=Path, help="a packed .safetensors file, or a folder of them")
    return made


def budget(text: str) -> dict[str, float]:
    kind, _, share = text.partition("=")
    try:
        return {kind: float(share)}
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be KIND=SHARE, got {text!r}; for example macs=0.5") from None


def run(options: argparse.Namespace) -> None:
    match options.command:
        case "inspect":
            show(options.path, options.json, options.plot)
        case "export":
            choice = Choice.of(options.codec, options.values, options.pattern)
            print(commands.export(options.path, options.out, choice, _state(options.path), options.overwrite))
        case "unpack":
            print(commands.unpack(options.path, options.out, options.overwrite))
        case "slim":
            from pruning_core.export.slim_folder import slim_folder

            given = {"importance": options.importance, "scope": options.scope, "round_to": options.round_to}
            print(slim_folder(options.path, options.out, options.budget, options.overwrite, options.plot, **given))
        case "verify":
            print(commands.verify(options.path))


def show(path: Path, json: str | None, plot: str | None) -> None:
    """The report; of a packed file the table of what it packs, which says more."""
    packed = commands.is_packed(path)
    report = inspect(path) if json or plot or not packed else None
    print(commands.table(path) if packed else report)
    if report is not None and json:
        report.save_json(json)
    if report is not None and plot:
        report.plot(plot)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        run(options)
    except (ValueError, OSError, ImportError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
