"""Pack a checkpoint of this app, unpack it, or write it as ONNX."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from apps.common.arguments import Parser, count, leave
from apps.common.errors import BadInput

PACKED = ".sparse.safetensors"
KIND = "apps/yolov5"
EXAMPLES = """examples:
  python apps/yolov5/export.py runs/train/exp/weights/best.pt                writes best.sparse.safetensors
  python apps/yolov5/export.py best.sparse.safetensors                       writes best.pt, for ultralytics.YOLO
  python apps/yolov5/export.py best.pt --format onnx --img 640               writes best.onnx, checked
"""


def parser() -> Parser:
    made = Parser(description=__doc__ or "", epilog=EXAMPLES)
    made.add_argument("path", type=Path, help="a .pt checkpoint, or one that was packed here")
    made.add_argument("--format", choices=("sparse", "onnx"), default="sparse", help="of a .pt (sparse)")
    made.add_argument("--img", type=count(32), default=640, help="onnx: image size (640)")
    made.add_argument(
        "--sparse", action="store_true", help="onnx: sparse initializers, smaller; not every runtime reads it"
    )
    made.add_argument("--output", type=Path, help="(beside the file)")
    made.add_argument("--overwrite", action="store_true", help="replace what is there")
    return made


def main(options: argparse.Namespace) -> int:
    """Decides by what the file is."""
    try:
        if options.path.name.endswith(".safetensors"):
            if options.format == "onnx":
                raise BadInput("--format: onnx is made of a .pt, got a packed file; unpack it first, without --format")
            print(unpack(options.path, free_path(options, options.path.name.removesuffix(PACKED) + ".pt")))
        elif options.format == "onnx":
            print(
                to_onnx(
                    options.path, free_path(options, f"{options.path.stem}.onnx"), options.img, sparse=options.sparse
                )
            )
        else:
            print(pack(options.path, free_path(options, options.path.stem + PACKED)))
    except BadInput as error:
        leave(str(error))
    except (ValueError, OSError, ImportError) as error:
        leave(" ".join(str(error).split()))
    return 0


def free_path(options: argparse.Namespace, name: str) -> Path:
    path = options.output or options.path.with_name(name)
    if path.exists() and not options.overwrite:
        raise BadInput(f"--output: is there already, got {str(path)!r}; give another name, or --overwrite")
    return Path(path)


def pack(source: Path, out: Path) -> str:
    """Weights as they are in the file; what builds the model and what the run said of it in the metadata."""
    from apps.yolov5 import ultralytics_adapter as adapter
    from pruning_core import save_sparse, structure
    from pruning_core.cli import packing as commands

    model, content = adapter.load_model(source, "path"), adapter.content_of(source)
    half = {name: _halved(value) for name, value in model.state_dict().items()}
    about = {"model": model.yaml, "names": adapter.class_names(model), "structure": structure(model)}
    about |= {name: content.get(name) for name in ("train_args", "train_metrics", "epoch")}
    save_sparse(half, out, metadata={"kind": KIND, "about": json.dumps(about, default=str)})
    return commands.verify(out)


def _halved(value: Any) -> Any:
    """fp16, as checkpoints are written, where that changes nothing."""
    if not value.is_floating_point():
        return value
    half = value.half()
    return half if bool((half.float() == value).all()) else value


def unpack(source: Path, out: Path) -> str:
    from apps.yolov5 import ultralytics_adapter as adapter
    from pruning_core import load_sparse, read_metadata

    metadata = read_metadata(source)
    if metadata.get("kind") != KIND:
        raise BadInput(f"path: was not packed here, got {str(source)!r}; python -m pruning_core unpack reads it")
    try:
        about = json.loads(metadata["about"])
        names = {int(i): str(name) for i, name in about["names"].items()}
        model = adapter.slim_model(about["model"], names, about.get("structure"))
        model.load_state_dict(load_sparse(source))
        arguments, metrics, epoch = about["train_args"] or {}, about["train_metrics"] or {}, about["epoch"] or 0
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise BadInput(f"path: its weights and its description do not fit ({reason}), got {str(source)!r}") from error
    adapter.save_model(model, out, arguments=arguments, metrics=metrics, epoch=epoch)
    return f"{out}: ultralytics.YOLO loads it"


def to_onnx(source: Path, out: Path, size: int, *, sparse: bool) -> str:
    """One output, boxes and scores of every anchor point, before non-maximum suppression."""
    import torch

    from apps.yolov5 import ultralytics_adapter as adapter
    from pruning_core import export_onnx

    model = adapter.load_model(source, "path")
    stride = adapter.largest_stride(model)
    if size % stride:
        raise BadInput(f"--img: must be a multiple of {stride}, got {size}")
    adapter.one_output_(model)
    torch.manual_seed(0)
    difference = export_onnx(model, {"x": torch.rand(1, 3, size, size)}, out, sparse=sparse)
    return (
        f"{out}: {out.stat().st_size:,} bytes; ONNX Runtime and torch agree to {difference:.1e}, any batch of {size} px"
    )


if __name__ == "__main__":
    sys.exit(main(parser().parse_args()))
