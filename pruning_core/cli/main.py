"""The verbs of ``pruning-core``: look at saved models, pack them, unpack them, check them, remove their channels."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pruning_core import checkpoint
from pruning_core.checkpoint import CheckpointError
from pruning_core.cli import packing
from pruning_core.cli.inspection import model_of, show
from pruning_core.sparse_format.packed import CODECS
from pruning_core.sparse_format.sparse_file import AUTO, VALUES, Packing, read_safetensors

WITHOUT_DATA = ("l2", "magnitude", "geometric_median", "random")


def _state(path: Path) -> Mapping[str, Any] | None:
    """What ``export`` packs; None of a model's folder, which is packed file by file."""
    if path.is_dir():
        return None
    if packing.is_packed(path):
        raise CheckpointError(f"{path}: is packed already; unpack it first")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    return model_of(path, checkpoint.load(path))


def parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    made = argparse.ArgumentParser(prog="pruning-core", description=__doc__)
    verbs = made.add_subparsers(dest="command", required=True)

    look = verbs.add_parser("inspect", help="what is zero in a saved model, layer by layer")
    look.add_argument(
        "path", type=Path, help="a .pt file written by pruning_core.checkpoint or torch.save, or .safetensors"
    )
    look.add_argument("--json", metavar="FILE", help="also write the report as JSON")
    look.add_argument("--plot", metavar="FILE", help="also draw a bar per layer")

    pack = verbs.add_parser("export", help="pack the zeros of a saved model: a small .safetensors")
    pack.add_argument("path", type=Path, help="a .pt or .safetensors file, or a folder of save_pretrained")
    pack.add_argument("out", type=Path, nargs="?", help="(PATH.sparse.safetensors, or PATH-sparse)")
    pack.add_argument("--codec", choices=CODECS, default=CODECS[-1], help="raw is larger and faster (entropy)")
    pack.add_argument("--values", choices=VALUES, default="fp32", help="bf16, fp16: round what is kept (fp32: do not)")
    pack.add_argument("--pattern", default=AUTO, help="4x1, 2:4, ... of all weights (auto: found for each)")
    pack.add_argument("--overwrite", action="store_true", help="replace what is there")

    back = verbs.add_parser("unpack", help="the dense model again, for tools that know nothing of this")
    back.add_argument("path", type=Path, help="a packed .safetensors file, or a folder of them")
    back.add_argument("out", type=Path, nargs="?", help="(PATH-dense)")
    back.add_argument("--overwrite", action="store_true", help="replace what is there")

    slim = verbs.add_parser("slim", help="remove channels of a transformers model")
    slim.add_argument("path", type=Path, help="a folder of save_pretrained")
    slim.add_argument("out", type=Path, nargs="?", help="(PATH-slim)")
    slim.add_argument(
        "--budget", type=_budget, required=True, help="what is left: params=0.5, macs=0.5, channels=0.5 or latency=0.5"
    )
    slim.add_argument("--criterion", choices=WITHOUT_DATA, default=WITHOUT_DATA[0], help="(%(default)s)")
    slim.add_argument("--scope", choices=("global", "local"), default="global", help="rank all together, or each group")
    slim.add_argument("--round-to", type=int, default=1, metavar="N", help="leave multiples of N channels (1)")
    slim.add_argument("--uniform", action="store_true", help="one width per stack, which the configuration says")
    slim.add_argument("--plot", metavar="FILE", help="also draw a bar per layer")
    slim.add_argument("--overwrite", action="store_true", help="replace what is there")

    check = verbs.add_parser("verify", help="read a packed model whole, and say whether it was damaged")
    check.add_argument("path", type=Path, help="a packed .safetensors file, or a folder of them")
    return made


def _budget(text: str) -> dict[str, float]:
    kind, _, share = text.partition("=")
    try:
        return {kind: float(share)}
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be KIND=SHARE, got {text!r}; for example macs=0.5") from None


def run(options: argparse.Namespace) -> None:
    """Carries out one verb."""
    match options.command:
        case "inspect":
            show(options.path, options.json, options.plot)
        case "export":
            choice = Packing.of(options.codec, options.values, options.pattern)
            print(packing.export(options.path, options.out, choice, _state(options.path), options.overwrite))
        case "unpack":
            print(packing.unpack(options.path, options.out, options.overwrite))
        case "slim":
            from pruning_core.cli.slim_folder import slim_folder

            names = ("criterion", "scope", "round_to", "uniform")
            given = {name: getattr(options, name) for name in names}
            print(slim_folder(options.path, options.out, options.budget, options.overwrite, options.plot, **given))
        case "verify":
            print(packing.verify(options.path))


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 after one line about what is wrong."""
    options = parser().parse_args(arguments)
    try:
        run(options)
    except (ValueError, OSError, ImportError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0
