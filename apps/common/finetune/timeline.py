"""When what happens, in optimizer steps: a pure function of a few numbers, so that a resumed run has the same one."""

from __future__ import annotations

import math
from argparse import Namespace
from dataclasses import dataclass

from apps.common.errors import BadInput

CHANGES = 60
"""Mask changes of a run whose recipe and flags say nothing about them."""


@dataclass(frozen=True)
class Timeline:
    """``batches`` an epoch on each rank; a step after every ``accumulate`` of them, and after an epoch's last."""

    batches: int
    accumulate: int
    steps: int
    warm_epochs: float = 0.0
    cooldown_epochs: float = 0.0

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.batches / self.accumulate)

    @property
    def epochs(self) -> int:
        """The last one may be a part."""
        return math.ceil(self.steps / self.steps_per_epoch)

    @property
    def pruning_starts(self) -> int:
        """The first step after the warm epochs."""
        return round(self.warm_epochs * self.steps_per_epoch)

    @property
    def pruning_ends(self) -> int:
        """The first step of the cooldown."""
        return self.steps - round(self.cooldown_epochs * self.steps_per_epoch)

    @property
    def frequency(self) -> int:
        return max((self.pruning_ends - self.pruning_starts) // CHANGES, 1)


def timeline(options: Namespace, batches: int) -> Timeline:
    """Checked: some steps must be left between the warm epochs and the cooldown."""
    per_epoch = math.ceil(batches / options.gradient_accumulation_steps)
    steps = options.max_train_steps or options.num_train_epochs * per_epoch
    if options.num_warmup_steps is None:
        options.num_warmup_steps = 0 if options.model_name_or_path else steps // 10
    if options.num_warmup_steps >= steps:
        do = "lower it, or the full rate is never reached"
        raise BadInput(
            f"--num_warmup_steps: must be below the {steps} optimizer steps, got {options.num_warmup_steps}; {do}"
        )
    epochs = steps / per_epoch
    cooldown = epochs / 2 if options.cooldown_epochs is None else options.cooldown_epochs
    if options.do_prune and options.warm_epochs + cooldown >= epochs:
        if options.cooldown_epochs is None:
            raise BadInput(
                f"--warm_epochs: half of the {epochs:g} epochs is cooldown, got {options.warm_epochs:g}; lower it"
            )
        got = f"got {options.warm_epochs:g} + {cooldown:g}"
        raise BadInput(
            f"--cooldown_epochs: with --warm_epochs must be below the {epochs:g} epochs, {got}; the others prune"
        )
    return Timeline(batches, options.gradient_accumulation_steps, steps, options.warm_epochs, cooldown)
