"""Progress of the training -> sparsity. Pure functions of the step.

A schedule is one class and one registry line: ``sparsity(progress, target)`` for progress in [0, 1].
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from pruning_core.registry import Registry


class Schedule(ABC):
    """``sparsity(0, T) == 0`` and ``sparsity(1, T) == T``; never falls in between."""

    @abstractmethod
    def sparsity(self, progress: float, target: float) -> float:
        """The share of weights that is zero at ``progress`` of [0, 1] towards ``target``."""


SCHEDULES: Registry[Schedule] = Registry("schedule")


@SCHEDULES.add("linear")
class Linear(Schedule):
    """``T p``: the same number of weights at every update."""

    def sparsity(self, progress: float, target: float) -> float:
        return target * progress


@SCHEDULES.add("cos")
class Cos(Schedule):
    """``T (1 - cos(pi p / 2))``: slow first, steady at the end."""

    def sparsity(self, progress: float, target: float) -> float:
        return target * (1 - math.cos(math.pi * progress / 2))


@SCHEDULES.add("exp")
class Exp(Schedule):
    """``1 - (1 - T)^p``: the same share of the *remaining* weights at every update."""

    def sparsity(self, progress: float, target: float) -> float:
        return 1 - (1 - target) ** progress


@SCHEDULES.add("cube")
class Cube(Schedule):
    """``T p^3``: slow first, steep at the end."""

    def sparsity(self, progress: float, target: float) -> float:
        return target * progress**3


@SCHEDULES.add("cubic")
class Cubic(Schedule):
    """``T (1 - (1 - p)^3)``: steep first, slow at the end (Zhu & Gupta 2017, arXiv:1710.01878, eq. 1)."""

    def sparsity(self, progress: float, target: float) -> float:
        return target * (1 - (1 - progress) ** 3)


@dataclass(frozen=True)
class Timetable:
    """When masks change and to which share.

    Updates are due at ``start``, ``start + frequency``, ... and always at ``end``, where the share is the target
    itself. ``start == end`` is one-shot.
    """

    start: int
    end: int
    frequency: int
    target: float
    schedule: Schedule

    def sparsity(self, step: int) -> float:
        """0 before ``start``, the schedule up to ``end``, the target from there on."""
        if step < self.start:
            return 0.0
        if step >= self.end:
            return self.target
        return self.schedule.sparsity((step - self.start) / (self.end - self.start), self.target)

    def last_due(self, step: int) -> int | None:
        """The latest due step up to and including ``step``."""
        if step < self.start:
            return None
        if step >= self.end:
            return self.end
        return step - (step - self.start) % self.frequency

    def next_due(self, after: int) -> int | None:
        """The first due step above ``after``; None when the last update lies behind."""
        if after >= self.end:
            return None
        if after < self.start:
            return self.start
        passed = (after - self.start) // self.frequency + 1
        return min(self.start + passed * self.frequency, self.end)
