"""The command line. Imports nothing heavy, so that --help and typing mistakes are answered at once."""

from __future__ import annotations

import argparse
from pathlib import Path

from apps.common.arguments import Parser, count, positive

EXAMPLES = """examples:
  dense   python apps/yolov5/train_prune.py --data data.yaml --cfg yolov5n.yaml --epochs 100
  prune   python apps/yolov5/train_prune.py --data data.yaml --weights runs/train/exp/weights/best.pt --do_prune \\
              --pruning_config apps/yolov5/recipes/4x1.yaml --epochs 60 --cooldown_epochs 30
  resume  python apps/yolov5/train_prune.py --resume runs/train/exp2
  2 ranks torchrun --nproc_per_node 2 apps/yolov5/train_prune.py --device 0,1 ...   (gloo with --device cpu)
"""
GONE = {
    **dict.fromkeys(("--noautoanchor", "--anchors"), "today's head has no anchors; leave it out"),
    **dict.fromkeys(("--evolve", "--bucket", "--upload_dataset", "--artifact_alias"), "leave it out"),
    **dict.fromkeys(("--image-weights", "--quad", "--rect"), "batches are shuffled square mosaics; leave it out"),
    **dict.fromkeys(("--local_rank", "--local-rank"), "start with torchrun, which sets LOCAL_RANK"),
    "--label-smoothing": "today's targets are soft already; leave it out",
    "--multi-scale": "augmentation 'scale' in --hyp does it; leave it out",
    "--adam": "write --optimizer Adam",
    "--linear-lr": "linear is the default; leave it out",
    "--cache-images": "write --cache",
}
TEMPERATURE = 2.0
MAY_CHANGE = (
    "device",
    "workers",
    "cache",
    "noplots",
    "nosave",
    "noval",
    "save_period",
    "resume",
    "exist_ok",
    "project",
    "name",
)
"""Options that a resumed run may be given anew: they do not change its weights."""


def folder(text: str) -> str:
    """An empty variable in a script must not begin a new run."""
    if not text:
        raise argparse.ArgumentTypeError("must be the folder of a run, got ''; without a value it is the latest run")
    return text


def parser() -> Parser:
    """Every option once; YOLOv5's names, and ours with underscores."""
    made = Parser(description="Train, prune and distil a YOLOv5 model.", epilog=EXAMPLES)
    made.gone = GONE
    model = made.add_argument_group("model and data")
    model.add_argument(
        "--weights", default="", help="checkpoint or run folder to start from (yolov5s.pt if it is here, unless --cfg)"
    )
    model.add_argument("--cfg", default="", help="yolov5n ... yolov5x, yolov5s6, or a yaml; with --weights: a new head")
    model.add_argument("--data", default="", help="data yaml: train, val, names")
    model.add_argument("--hyp", help="hyperparameter yaml; files of the old yolov5 repository are translated")
    model.add_argument("--img", "--imgsz", "--img-size", type=count(32), default=640, help="image size (640)")
    model.add_argument("--cache", action="store_true", help="keep the images in memory")

    prune = made.add_argument_group("pruning and distillation")
    prune.add_argument("--do_prune", action="store_true", help="prune from the end of the warm-up to the cooldown")
    prune.add_argument("--pruning_config", help="yaml; without it 80%% of the weights in 4x1 blocks")
    prune.add_argument("--cooldown_epochs", type=count(0), default=0, help="last epochs, with fixed masks (0)")
    prune.add_argument("--dist_loss", choices=("l2", "kl"), help="learn from a dense teacher as well")
    prune.add_argument("--temperature", type=positive, default=TEMPERATURE, help="of kl (2; above 4 is rarely better)")
    prune.add_argument("--dist_weight", type=positive, default=1.0, help="weight of the distillation loss (1)")
    prune.add_argument("--feature_weight", type=float, default=0.0, help="weight of its feature term (0)")
    prune.add_argument("--teacher_weights", default="", help="the dense teacher (default: --weights)")

    loop = made.add_argument_group("training")
    loop.add_argument("--epochs", type=count(1), default=100, help="(100)")
    loop.add_argument("--batch-size", type=count(1), default=16, help="over all ranks (16)")
    loop.add_argument("--optimizer", choices=("SGD", "Adam", "AdamW"), default="SGD", help="(SGD)")
    loop.add_argument("--cos-lr", action="store_true", help="cosine instead of linear decay")
    loop.add_argument("--freeze", type=count(0), nargs="+", default=[0], help="first N layers, or their numbers")
    loop.add_argument("--patience", type=count(0), default=100, help="epochs without a better model; 0: never stop")
    loop.add_argument("--sync-bn", action="store_true", help="batch statistics over all ranks (CUDA)")
    loop.add_argument("--seed", type=count(0), default=0, help="(0)")
    loop.add_argument("--amp", nargs="?", const="fp16", choices=("auto", "fp16", "bf16", "off"), default="auto")

    place = made.add_argument_group("machine and output")
    place.add_argument("--device", default="", help="cpu, mps, cuda:0, or one index per rank: 0,1")
    place.add_argument("--workers", type=count(0), help="loader processes per rank (8 with CUDA, else 0)")
    place.add_argument("--project", type=Path, default=Path("runs/train"), help="(runs/train)")
    place.add_argument("--name", default="exp", help="(exp, exp2, ...)")
    place.add_argument("--exist-ok", action="store_true", help="write into an old run's folder")
    place.add_argument(
        "--resume", nargs="?", type=folder, const=True, help="go on with a run: its folder or last.pt (the latest)"
    )
    place.add_argument("--save-period", type=count(-1), default=-1, help="also keep every N-th epoch")
    place.add_argument("--nosave", action="store_true", help="models of the last epoch only")
    place.add_argument("--noval", action="store_true", help="evaluate the last epoch only")
    place.add_argument("--noplots", action="store_true")
    return made
