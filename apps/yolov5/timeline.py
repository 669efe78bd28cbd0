"""When what happens, in optimizer steps: a pure function of a few numbers, so that a resumed run has the same one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from apps.common.errors import BadInput


@dataclass(frozen=True)
class Timeline:
    """``batches`` an epoch; a step after every ``accumulate`` of them, and after the last of each epoch.

    In the warm-up the number of batches per step rises from 1 to ``accumulate``.
    """

    epochs: int
    batches: int
    accumulate: int
    warmup_epochs: float
    cooldown_epochs: int = 0

    @cached_property
    def warmup(self) -> int:
        """In batches. The last epoch before the cooldown is never warm-up."""
        longest = max(self.epochs - self.cooldown_epochs - 1, 0)
        return round(min(self.warmup_epochs, longest) * self.batches)

    @cached_property
    def _before(self) -> list[int]:
        """Batch -> optimizer steps that were made before it."""
        before, pending = [0], 0
        for batch in range(self.epochs * self.batches):
            pending += 1
            last = (batch + 1) % self.batches == 0
            done = last or pending >= self._wanted(batch)
            before.append(before[-1] + done)
            pending = 0 if done else pending
        return before

    def _wanted(self, batch: int) -> int:
        if batch >= self.warmup:
            return self.accumulate
        return max(1, round(1 + (self.accumulate - 1) * batch / self.warmup))

    def steps_before(self, batch: int) -> int:
        return self._before[batch]

    def ends_step(self, batch: int) -> bool:
        return self._before[batch + 1] > self._before[batch]

    @property
    def steps(self) -> int:
        return self._before[-1]

    @property
    def pruning_starts(self) -> int:
        """The first step after the warm-up."""
        return self.steps_before(self.warmup)

    @property
    def pruning_ends(self) -> int:
        """The first step of the cooldown."""
        return self.steps_before((self.epochs - self.cooldown_epochs) * self.batches)

    def learning_rate(self, batch: int, *, first: float, last_factor: float, cosine: bool, warmup_from: float) -> float:
        """Rises from ``warmup_from`` to ``first`` in the warm-up; falls to ``first * last_factor`` over the epochs."""
        epoch = batch // self.batches
        if cosine:
            factor = (1 - math.cos(epoch * math.pi / self.epochs)) / 2 * (last_factor - 1) + 1
        else:
            factor = max(1 - epoch / self.epochs, 0) * (1 - last_factor) + last_factor
        if batch < self.warmup:
            return warmup_from + (first * factor - warmup_from) * batch / self.warmup
        return first * factor

    def momentum(self, batch: int, *, full: float, warmup_from: float) -> float:
        return warmup_from + (full - warmup_from) * batch / self.warmup if batch < self.warmup else full


def check_epochs(epochs: int, cooldown_epochs: int, do_prune: bool) -> None:
    if epochs < 1:
        raise BadInput(f"--epochs: must be at least 1, got {epochs}")
    if cooldown_epochs < 0:
        raise BadInput(f"--cooldown_epochs: must not be negative, got {cooldown_epochs}")
    if cooldown_epochs >= epochs:
        raise BadInput(f"--cooldown_epochs: must be below --epochs {epochs}, got {cooldown_epochs}; the others prune")
    if cooldown_epochs and not do_prune:
        raise BadInput(f"--cooldown_epochs: does nothing without --do_prune, got {cooldown_epochs}; add --do_prune")
