"""What removing channels costs: trace, plan and cut, in forward-backwards of the model, and memory beside it.

    python -m benchmarks.channel_cost [--models resnet50,vit_b_16,yolov5s,bert-base] [--peers] [--repeats 3]

Half of the multiply-adds of each model go, ranked by weights alone: random weights, ``--batch`` images of 224 px (640
for YOLOv5s) or rows of 128 words. CPU time of one thread, the median of ``--repeats`` processes; the unit is the
fastest of five forward-backward passes in the same process. Memory: how far the kernel's high-water mark of resident
memory rises, in a process of its own, over the size of the model.

``--peers``: Torch-Pruning 1.6.1 (a global group magnitude, 30 % of the channels in one step) and torch-kirigami 0.2.1
(group magnitude, 60 % of the parameters left), where ``pip install torch-pruning==1.6.1 torch-kirigami==0.2.1`` was
run; what they cannot do is printed as such.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from statistics import median
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from benchmarks.measure import MEMORY_ENVIRONMENT, ONE_THREAD, STEADY_ENVIRONMENT, peak_mib
from pruning_core import ChannelGraph, plan_channels, slim_
from pruning_core.graph.inputs import leaves
from pruning_core.report import markdown_table

LONGEST = 300
SIDES = ("ours", "torch-pruning", "torch-kirigami")
Steps = dict[str, Callable[[], Any]]


def _yolov5s() -> nn.Module:
    from benchmarks.zoo_models import entries

    return entries(["ultralytics"])["yolov5s"].build()


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig())


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "resnet50": (torchvision.models.resnet50, lambda batch: torch.randn(batch, 3, 224, 224)),
    "vit_b_16": (torchvision.models.vit_b_16, lambda batch: torch.randn(batch, 3, 224, 224)),
    "yolov5s": (_yolov5s, lambda batch: torch.randn(batch, 3, 640, 640)),
    "bert-base": (_bert, lambda batch: torch.randint(1, 30000, (batch, 128))),
}


def ours(model: nn.Module, example: Tensor) -> Steps:
    kept: dict[str, Any] = {}

    def trace() -> None:
        kept["graph"] = ChannelGraph.trace(model, example)

    def plan() -> None:
        kept["plan"] = plan_channels(kept["graph"], {"macs": 0.5})

    return {"trace": trace, "plan": plan, "slim": lambda: slim_(model, kept["plan"])}


def torch_pruning(model: nn.Module, example: Tensor) -> Steps:
    import torch_pruning as tp

    graph = ChannelGraph.trace(model, example, trial=False)  # which layers to leave alone: a user would tell it
    free = {axis.tensor for group in graph.groups.values() for axis in group.axes if axis not in graph.consumers}
    layers = [(name, each) for name, each in model.named_modules() if isinstance(each, nn.Linear | _ConvNd)]
    whole = [each for name, each in layers if f"{name}.weight" not in free]

    def all_of_it() -> None:
        pruner = tp.pruner.BasePruner(
            model, example, tp.importance.GroupMagnitudeImportance(p=2), global_pruning=True, pruning_ratio=0.3,
            ignored_layers=whole,
            output_transform=lambda output: [leaf for leaf in leaves(output) if leaf.grad_fn is not None],
        )  # fmt: skip
        pruner.step()
        model(example)

    return {"all": all_of_it}


def torch_kirigami(model: nn.Module, example: Tensor) -> Steps:
    from torch_kirigami import DependencyGraph
    from torch_kirigami.pruning import Greedy, GroupMagnitude, ParameterBudget, Pruner

    def all_of_it() -> None:
        params = sum(each.numel() for each in model.parameters())
        pruner = Pruner(model, graph=DependencyGraph.build(model, args=(example,)))
        budget = ParameterBudget(max_params=int(0.6 * params))
        pruner.prune(pruner.discover_candidates(), budget=budget, strategy=Greedy(GroupMagnitude(p=2)))
        model(example)

    return {"all": all_of_it}


def unit(model: nn.Module, example: Tensor) -> float:
    """CPU seconds of a forward-backward: the fastest of five, after two to warm up."""
    took = []
    for _ in range(7):
        start = time.process_time()
        sum(leaf.float().sum() for leaf in leaves(model(example)) if leaf.requires_grad).backward()
        took.append(time.process_time() - start)
    for parameter in model.parameters():
        parameter.grad = None
    return min(took[2:])


def measure(name: str, side: str, batch: int, memory: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    build, inputs = MODELS[name]
    model, example = build().eval(), inputs(batch)
    make = {"ours": ours, "torch-pruning": torch_pruning, "torch-kirigami": torch_kirigami}[side]
    size = sum(each.numel() * each.element_size() for each in model.parameters()) / 2**20
    if memory:
        with torch.no_grad():
            model(example)
        steps = make(model, example)
        return {"peak": peak_mib(lambda: [step() for step in steps.values()]) / size}
    warm = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1))
    for step in make(warm, torch.randn(1, 3, 8, 8)).values():  # imports are no part of it
        step()
    one, steps, found = unit(model, example), make(model, example), {}
    for step_name, step in steps.items():
        start = time.process_time()
        step()
        found[step_name] = (time.process_time() - start) / one
    return {"unit": one, "total": sum(found.values()), **found}


def in_a_process(name: str, side: str, batch: int, memory: bool) -> dict[str, Any]:
    environment = {**os.environ, **ONE_THREAD, **(MEMORY_ENVIRONMENT if memory else STEADY_ENVIRONMENT)}
    command = [
        sys.executable,
        "-m",
        "benchmarks.channel_cost",
        "--measure",
        name,
        side,
        str(batch),
        *(["memory"] * memory),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=LONGEST)
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {LONGEST} s"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["died"])[-1][:110]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def row(name: str, side: str, batch: int, repeats: int) -> list[str]:
    runs = []
    while len(runs) < repeats and (not runs or "error" not in runs[-1]):
        runs.append(in_a_process(name, side, batch, False))
    failed = next((run["error"] for run in runs if "error" in run), None)
    if failed is not None:
        return [name, side, "", "", "", "", failed, ""]
    peak = in_a_process(name, side, batch, True)
    middle = {key: median(run[key] for run in runs) for key in runs[0]}
    parts = [f"{middle[key]:.2f}" if key in middle else "" for key in ("trace", "plan", "slim")]
    beside = f"{peak['peak']:.2f}" if "peak" in peak else peak["error"]
    return [name, side, f"{middle['unit']:.2f}", *parts, f"{middle['total']:.2f}", beside]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        name, side, batch, *memory = options.measure
        print(json.dumps(measure(name, side, int(batch), bool(memory))))
        return
    sides = SIDES if options.peers else SIDES[:1]
    found = [row(name, side, options.batch, options.repeats) for name in options.models.split(",") for side in sides]
    head = ["model", "", "unit, CPU-s", "trace", "plan", "slim", "in all, units", "memory, models"]
    print(markdown_table(head, found))
    versions = f"torch {torch.__version__.partition('+')[0]}, torchvision {torchvision.__version__.partition('+')[0]}"
    print(f"# {datetime.now(UTC):%Y-%m-%d}, python {platform.python_version()}, {versions}")


if __name__ == "__main__":
    main()
