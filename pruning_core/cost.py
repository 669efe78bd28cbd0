"""What a call costs beside another: time, measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

Timed = Callable[[], object]


def ratio(run: Timed, beside: Timed, repeats: int = 9, warmup: int = 2) -> float:
    """How long ``run`` takes beside another, call by call in turns: a busy machine slows both."""
    for _ in range(warmup):
        run()
        beside()
    return median(_once(run) / max(_once(beside), 1e-9) for _ in range(repeats))


def _once(run: Timed) -> float:
    _wait()
    start = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
