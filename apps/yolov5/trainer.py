"""Pruning inside ``YOLO(...).train(trainer=...)``, for people who stay with upstream's loop. One process.

    from ultralytics import YOLO
    from apps.yolov5.trainer import pruning_trainer

    trainer = pruning_trainer("apps/yolov5/recipes/4x1.yaml", cooldown_epochs=10)
    YOLO("best.pt").train(trainer=trainer, data="data.yaml", epochs=30)

Upstream's loop restarts from the moving average when it resumes, so exact resume is for ``train_prune.py`` alone.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from apps.common.errors import BadInput
from apps.common.pruning import end_pruning, read_recipe
from apps.yolov5 import ultralytics_adapter as adapter
from apps.yolov5.pruning import begin_pruning
from apps.yolov5.timeline import check_epochs
from pruning_core import Pruning


def pruning_trainer(config: Any = None, *, cooldown_epochs: int = 0) -> type[PruningTrainer]:
    """The trainer class for this pruning configuration: a yaml, a dict, or a list of dicts."""
    settings = {"config": config, "cooldown_epochs": cooldown_epochs}
    return type("PruningTrainer", (PruningTrainer,), settings)


class PruningTrainer(adapter.Trainer):
    """Upstream's trainer with the four hooks. Its clock counts batches, as upstream does, not optimizer steps."""

    config: Any = None
    cooldown_epochs: int = 0
    pruner: Pruning

    def get_dataset(self) -> dict[str, Any]:
        with adapter.no_fonts():
            return super().get_dataset()

    def train(self) -> Any:
        if self.world_size > 1:
            raise BadInput(f"device: this trainer runs one process, got {self.world_size}; use train_prune.py")
        return super().train()

    def _setup_train(self) -> None:
        if self.args.resume:
            raise BadInput("resume: this trainer does not save its masks, got a run to resume; use train_prune.py")
        check_epochs(self.epochs, self.cooldown_epochs, do_prune=True)
        super()._setup_train()
        batches = len(self.train_loader)
        start = min(self._get_warmup_iterations(batches), (self.epochs - self.cooldown_epochs - 1) * batches)
        # The last step before the cooldown lies in the last `accumulate` batches: by then the target is reached.
        end = max((self.epochs - self.cooldown_epochs) * batches - self.accumulate, start)
        total = self.epochs * batches
        self.pruner = begin_pruning(read_recipe(self.config), self.model, self.optimizer, (start, end), total, print)
        self._batch = 0
        self._chosen_after_target = False
        self.add_callback("on_train_batch_start", lambda trainer: trainer.pruner.on_step_begin(trainer._batch))
        self.add_callback("on_train_batch_end", _count)
        self.add_callback("on_train_end", lambda trainer: end_pruning(trainer.pruner, print))

    def optimizer_step(self) -> None:
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), max_norm=10.0)
        self.pruner.on_before_optimizer_step()
        self.scaler.step(self.optimizer)
        self.pruner.on_after_optimizer_step()
        self.scaler.update()
        self.optimizer.zero_grad()
        self.ema.update(self.model)

    def validate(self) -> Any:
        self.pruner.mask_(self.ema.ema)
        if self.pruner.done and not self._chosen_after_target:
            self._chosen_after_target = True
            self.best_fitness = None  # what was best before was not sparse yet
            self.stopper.best_fitness, self.stopper.best_epoch = 0.0, self.epoch
        return super().validate()

    def save_model(self) -> bool:
        saved = super().save_model()
        if not self.pruner.done and self.best.exists():
            if self.pruner.asked == 0:
                self.best.replace(self.wdir / "best_dense.pt")
            else:
                self.best.unlink()
        return saved

    def get_validator(self) -> Any:
        made = super().get_validator()
        made.postprocess = functools.partial(adapter.PatientValidator.postprocess, made)
        return made


def _count(trainer: PruningTrainer) -> None:
    trainer._batch += 1
