"""Remove channels of a checkpoint: what is left is a smaller model, for training on and for every runtime."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from apps.common.arguments import Parser, count, leave
from apps.common.errors import BadInput
from apps.yolov5.export import free_path

# The core's names, written again so that --help and typing mistakes are answered before torch is imported.
KINDS = ("params", "macs", "channels", "latency")
CRITERIA = ("l2", "magnitude", "bn_scale", "geometric_median", "random")
EXAMPLES = """examples:
  python apps/yolov5/slim.py runs/train/exp/weights/best.pt --budget macs=0.5           writes best.slim.pt
  python apps/yolov5/train_prune.py --data data.yaml --weights best.slim.pt --epochs 50  trains it on
"""


def parser() -> Parser:
    made = Parser(description=__doc__ or "", epilog=EXAMPLES)
    made.add_argument("path", type=Path, help="a .pt checkpoint")
    made.add_argument("--budget", type=budget, default=("macs", 0.5), help="what is left (macs=0.5)")
    made.add_argument("--criterion", choices=CRITERIA, default=CRITERIA[0], help="what a channel is worth (l2)")
    made.add_argument("--scope", choices=("global", "local"), default="global", help="rank all together, or each group")
    made.add_argument("--round-to", type=count(1), default=8, metavar="N", help="leave multiples of N channels (8)")
    made.add_argument("--img", type=count(32), default=640, help="image size, for the budget (640)")
    made.add_argument("--plot", type=Path, help="draw a bar per layer into this file")
    made.add_argument("--output", type=Path, help="(beside the file)")
    made.add_argument("--overwrite", action="store_true", help="replace what is there")
    return made


def budget(text: str) -> tuple[str, float]:
    kind, _, share = text.partition("=")
    try:
        value = float(share)
    except ValueError:
        value = 0.0
    if kind not in KINDS or not 0 < value <= 1:
        raise argparse.ArgumentTypeError(
            f"must be one of {', '.join(KINDS)}, = and a share above 0 and at most 1, got {text!r}; write macs=0.5"
        )
    return kind, value


def main(options: argparse.Namespace) -> int:
    try:
        print(slim(options, free_path(options, f"{options.path.stem}.slim.pt")))
    except BadInput as error:
        leave(str(error))
    except (ValueError, OSError, ImportError) as error:
        leave(" ".join(str(error).split()))
    return 0


def slim(options: argparse.Namespace, out: Path) -> str:
    import torch

    import pruning_core as pc
    from apps.yolov5 import ultralytics_adapter as adapter

    model = adapter.load_model(options.path, "path")
    adapter.thaw(model)
    stride = adapter.largest_stride(model)
    if options.img % stride:
        raise BadInput(f"--img: must be a multiple of {stride}, got {options.img}")
    content = adapter.content_of(options.path)
    example = torch.rand(1, 3, options.img, options.img, generator=torch.Generator().manual_seed(0))
    done = pc.slim(
        model,
        dict([options.budget]),
        example,
        criterion=options.criterion,
        scope=options.scope,
        round_to=options.round_to,
    )
    adapter.save_model(model, out, arguments=content.get("train_args") or {}, metrics={}, epoch=-1)
    if options.plot:
        done.report.plot(options.plot)
    return f"{done}\n{out}: ultralytics.YOLO loads it; train it on with train_prune.py --weights {out}"


if __name__ == "__main__":
    arguments = parser()
    sys.exit(main(arguments.parse_args()))
