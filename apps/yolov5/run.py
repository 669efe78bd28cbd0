"""What a run is made of, and how far it is."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from apps.common.ranks import Ranks
from apps.yolov5 import ultralytics_adapter as adapter
from apps.yolov5.data_set import DataSet, TrainBatches, ValBatches
from apps.yolov5.timeline import Timeline
from pruning_core import DetectionDistillation, Pruning, WeightPruningConfig


@dataclass
class Progress:
    """What a resumed run needs besides weights. Plain data."""

    epoch: int = 0
    batch: int = 0
    """Batches of this epoch that are done. All of them: the epoch waits for its evaluation."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    has_best: bool = False
    """``best.pt`` was written by this run: a folder that is used again may hold another one's."""
    best_dense: dict[str, float] = field(default_factory=dict)
    dense_metrics: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class Run:
    options: Namespace
    ranks: Ranks
    data: DataSet
    hyp: SimpleNamespace
    timeline: Timeline
    model: adapter.Model
    ema: adapter.Ema
    criterion: Any
    optimizer: torch.optim.Optimizer
    amp: torch.dtype | None
    scaler: torch.amp.GradScaler
    train_batches: TrainBatches
    val_batches: ValBatches
    pruner: Pruning | None = None
    teacher: adapter.Model | None = None
    distillation: DetectionDistillation | None = None
    start: adapter.Model | None = None
    """The model that ``--weights`` held: evaluated once, as the dense model that the sparse one is measured against."""
    frozen: tuple[str, ...] = ()
    recipe: WeightPruningConfig | None = None
    """The pruning configuration as it was given, before the app set its steps."""
    progress: Progress = field(default_factory=Progress)
