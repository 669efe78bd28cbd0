"""Runs the YOLOv5 app on a few tiny images, in this process or under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support import ROOT

SCRIPT = ROOT / "apps/yolov5/train_prune.py"
TINY = str(Path(__file__).with_name("yolov5_tiny.yaml"))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def arguments(data: Path, project: Path, *more: str, **options: object) -> list[str]:
    """A run of seconds: ``epochs=2`` becomes ``--epochs 2``; what is given again wins."""
    chosen: dict[str, object] = {"data": data, "project": project, "cfg": TINY, "device": "cpu", "img": 64}
    chosen |= {"epochs": 2, "batch-size": 4, "optimizer": "AdamW", **options}
    words = [f"--{name}={value}" for name, value in chosen.items() if value is not None]
    return [*words, *more]


def main(words: list[str]) -> int:
    """In this process: the exit code of a run on one rank."""
    from apps.yolov5 import train_prune
    from apps.yolov5.arguments import parser

    try:
        return train_prune.main(parser().parse_args(words), parser().given(words))
    except SystemExit as left:
        return int(left.code or 0)


def start(words: list[str], ranks: int = 1, script: Path = SCRIPT) -> subprocess.Popen[str]:
    """In a process of its own, or in two under torchrun; stdout and stderr are one stream."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.Popen(
        [*launcher, str(script), *words],
        cwd=ROOT,
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def run(words: list[str], ranks: int = 1, script: Path = SCRIPT) -> tuple[int, str]:
    process = start(words, ranks, script)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output
