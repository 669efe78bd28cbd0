"""How much faster YOLOv5s is with half of its channels: ONNX Runtime and torch, one thread.

    python -m benchmarks.slim [--model yolov5s] [--img 640] [--share 0.5] [--repeats 15]

Both models run in turns on the same image; a time is the median, the ratio the median of the ratios of neighbours. The
weights are random: time does not depend on them. What is shown beside: parameters and multiply-adds.
"""

from __future__ import annotations

import argparse
import copy
import platform
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn

from benchmarks.zoo_models import entries
from pruning_core import ChannelGraph, export_onnx, plan_channels, slim_


def runner(path: Path, image: Tensor) -> Callable[[], object]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: image.numpy()}
    return lambda: session.run(None, feed)


def in_torch(model: nn.Module, image: Tensor) -> Callable[[], object]:
    def run() -> object:
        with torch.inference_mode():
            return model(image)

    return run


def in_turns(dense: Callable[[], object], slim: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """Medians of both in milliseconds, and of how many times faster the second is."""
    times = []
    for i in range(repeats + 2):
        pair = []
        for run in (dense, slim):
            start = time.perf_counter()
            run()
            pair.append(1000 * (time.perf_counter() - start))
        if i > 1:
            times.append(pair)
    return median(a for a, _ in times), median(b for _, b in times), median(a / b for a, b in times)


def with_one_output(model: Any) -> nn.Module:
    """Boxes and scores before non-maximum suppression."""
    head = model.model[-1]
    head.export, head.format, head.dynamic = True, "onnx", True
    return model  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="yolov5s")
    parser.add_argument("--img", type=int, default=640)
    parser.add_argument("--share", type=float, default=0.5, help="of the channels of every group that stay")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dense = entries(["ultralytics"])[options.model].build().eval()
    image = torch.rand(1, 3, options.img, options.img)
    slim = copy.deepcopy(dense)
    graph = ChannelGraph.trace(slim, image)
    plan = plan_channels(graph, {"channels": options.share}, scope="local", round_to=8)
    done = slim_(slim, plan, example_inputs=image)

    print(f"{options.model}, {options.img} px, batch 1, one thread; {datetime.now(UTC).date()}, {platform.machine()},")
    print(f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}")
    print(f"parameters {done.params_before:,} -> {done.params_after:,}")
    print(f"multiply-adds {graph.macs():,} -> {graph.macs(plan.channels):,}")
    print("| | dense, ms | slim, ms | times faster |\n| --- | --- | --- | --- |")
    print_row("torch", in_turns(in_torch(dense, image), in_torch(slim, image), options.repeats))
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / "dense.onnx", Path(folder) / "slim.onnx"]
        for model, path in zip((dense, slim), paths, strict=True):
            export_onnx(with_one_output(model), {"x": image}, path, dynamic_batch=False)
        both = [runner(path, image) for path in paths]
        print_row("ONNX Runtime", in_turns(both[0], both[1], options.repeats))


def print_row(name: str, times: tuple[float, float, float]) -> None:
    print(f"| {name} | {times[0]:.0f} | {times[1]:.0f} | {times[2]:.2f} |")


if __name__ == "__main__":
    main()
