"""How one case is measured, the same way for every pruner that has the four hooks. Imports nothing but torch.

The loop is a training loop without forward and backward: ``on_step_begin``, ``on_before_optimizer_step``,
``AdamW.step``, ``AdamW(fused=True).step``, ``on_after_optimizer_step``. The masks change twice, in the middle of the
window and at its end, ``every`` steps apart; ``cooldown`` more steps follow. Everything below is read off this loop,
so hooks and optimizers see the same weights, caches and moment of the machine.

* Hook cost per step: median of ``on_before_optimizer_step`` + ``on_after_optimizer_step`` over the steps of the window
  (or of cooldown) in which no mask changes. The first two steps allocate and are left out.
* A mask update: a pruner may make it in ``on_after_optimizer_step`` of step t - 1 or in ``on_step_begin`` of step t.
  Its cost is what those two calls take together above their own medians at steps without an update.
* CPU time: ``time.process_time``, one thread. It does not count waiting for a core, but does count cache misses that
  neighbours cause. Under glibc's own settings the figures, those of ``AdamW.step`` above all, double or not depending
  on where earlier blocks happened to lie, as pages are given back and faulted in again at every call. So the allocator
  keeps what it has (``STEADY_ENVIRONMENT``), for both sides: what allocates most gains most by that.
* Memory, in a process of its own: how far the kernel's high-water mark of resident memory (``VmHWM``, reset through
  ``/proc/self/clear_refs``) rises above what was resident when the hook was entered, at most over such steps. Nothing
  is sampled, so no peak is missed. For this to be true the allocator must give freed memory back at once
  (``MEMORY_ENVIRONMENT``) and hold none at entry (``malloc_trim``); that is slow, so time is never taken there.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.models import build

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
STEADY_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 33)}
"""glibc: blocks of up to 32 MiB, its highest setting, come from the heap, and the heap does not shrink."""
MEMORY_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
"""glibc: blocks from 64 KiB on are mapped, and unmapped when freed. By default freed blocks of up to 32 MiB stay
resident, and a later peak that reuses them would go unseen."""

Figures = dict[str, float]


@dataclass(frozen=True)
class Case:
    """One model under one pattern; ``memory`` measures MiB instead of CPU seconds."""

    model: str
    pattern: str
    target: float
    criterion: str = "snip_momentum"
    dtype: str = "float32"
    every: int = 6
    cooldown: int = 6
    seed: int = 0
    memory: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Options that both pruners read alike: the share is 1 - (1 - target)^(1/2) halfway, the target at end."""
        return {
            "target_sparsity": self.target,
            "pattern": self.pattern,
            "pruning_type": self.criterion,
            "start_step": 0,
            "end_step": 2 * self.every,
            "pruning_frequency": self.every,
            "sparsity_decay_type": "exp",
            "pruning_scope": "global",
        }

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def cpu_seconds(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def peak_mib(call: Callable[[], Any]) -> float:
    """How far resident memory rose above its level at entry, at its highest; 0 where the kernel does not tell."""
    if not Path("/proc/self/clear_refs").exists():
        return 0.0
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    """KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def run(case: Case, pruner: Any, model: nn.Module) -> Figures:
    """Drives the pruner through the loop; CPU seconds, or MiB, by name."""
    default = torch.optim.AdamW(model.parameters(), lr=1e-5)
    fused = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    calls: dict[str, Callable[[], Any]] = {
        "begin": pruner.on_step_begin,
        "before": pruner.on_before_optimizer_step,
        "adamw": default.step,
        "fused": fused.step,
        "after": pruner.on_after_optimizer_step,
    }
    probe = peak_mib if case.memory else cpu_seconds
    steps = 2 * case.every + case.cooldown
    took: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(steps):
        for name, call in calls.items():
            took[name].append(probe(call))
    figures = _peaks(case, took) if case.memory else _times(case, took)
    return {**figures, "reached": reached(case.model, model)}


def _quiet(case: Case) -> tuple[list[int], list[int]]:
    """Steps of the window and of cooldown without a mask update just before or after them."""
    due = {case.every, 2 * case.every}
    steps = range(2, 2 * case.every + case.cooldown)
    quiet = [t for t in steps if t not in due and t + 1 not in due]
    return [t for t in quiet if t < 2 * case.every], [t for t in quiet if t > 2 * case.every]


def _times(case: Case, took: dict[str, list[float]]) -> Figures:
    window, cooldown = _quiet(case)
    usual = median(took["after"][t] for t in window) + median(took["begin"][t] for t in window)

    def update(t: int) -> float:
        return took["after"][t - 1] + took["begin"][t] - usual

    def hooks(steps: list[int]) -> float:
        return median(took["before"][t] + took["after"][t] for t in steps)

    return {
        "update_mid": update(case.every),
        "update_end": update(2 * case.every),
        "window": hooks(window),
        "cooldown": hooks(cooldown),
        "adamw": median(took["adamw"][2:]),
        "adamw_fused": median(took["fused"][2:]),
    }


def _peaks(case: Case, took: dict[str, list[float]]) -> Figures:
    window, cooldown = _quiet(case)

    def update(t: int) -> float:
        return max(took["after"][t - 1], took["begin"][t])

    def hooks(steps: list[int]) -> float:
        return max(max(took["before"][t], took["after"][t]) for t in steps)

    return {
        "update_mid": update(case.every),
        "update_end": update(2 * case.every),
        "window": hooks(window),
        "cooldown": hooks(cooldown),
    }


def reached(name: str, model: nn.Module) -> float:
    """Share of zeros in the weights that were to be pruned, to show that the work was done."""
    kind = nn.Conv2d if name == "yolov5s" else nn.Linear
    weights = [m.weight for m in model.modules() if isinstance(m, kind) and m.weight.numel() > 64]
    return 1 - sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)


def main(make_pruner: Callable[[Case, nn.Module], Any], versions: Callable[[], dict[str, str]]) -> None:
    """``python -m benchmarks.<side> '<case as JSON>'``: measures it and prints JSON on the last line."""
    case = Case(**json.loads(sys.argv[1]))
    if any(os.environ.get(name) != value for name, value in ONE_THREAD.items()):
        raise SystemExit(f"set {ONE_THREAD}: the figures are for one thread")
    torch.set_num_threads(1)
    model = build(case.model, case.seed, case.dtype)
    size = {
        "weights": sum(p.numel() for p in model.parameters()),
        "model_mib": sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20,
    }
    pruner = make_pruner(case, model)
    begin = (peak_mib if case.memory else cpu_seconds)(pruner.on_train_begin)
    print(json.dumps({"begin": begin, **run(case, pruner, model), **size, "versions": versions()}))
