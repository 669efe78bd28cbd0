"""Relative latency of two callables, interleaved, median."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

Timed = Callable[[], object]


def relative_latency(run: Timed, baseline: Timed, repeats: int = 9, warmup: int = 2) -> float:
    """``median(time(run) / time(baseline))`` over alternating calls, so that load on the machine affects both alike."""
    for _ in range(warmup):
        run()
        baseline()
    return median(_once(run) / max(_once(baseline), 1e-9) for _ in range(repeats))


def _once(run: Timed) -> float:
    _synchronize()
    start = time.perf_counter()
    run()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
