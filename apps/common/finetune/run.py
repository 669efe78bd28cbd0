"""What a run is made of, and how far it is."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from apps.common.finetune.timeline import Timeline
from apps.common.ranks import Ranks
from pruning_core import ChannelReport, LogitDistillation, Plan, Pruning, Slimmed, WeightPruningConfig


@dataclass(frozen=True)
class App:
    """What makes one app: its model's head, and what is scored."""

    name: str
    kind: Any
    """``AutoModelFor...``"""
    task: str
    """What model cards call it."""
    logits: Callable[[Any], Sequence[Tensor]]
    """A model's outputs -> what a student learns from: one tensor per softmax."""
    counts: Callable[[Mapping[str, Tensor]], Tensor | None]
    """A batch -> which entries of the logits take part; None: all."""
    length: str
    """The option that says how many tokens a row may have."""
    full: float
    """A perfect score: 1 or 100."""
    epochs: int
    """What the tiny random BERT needs on the embedded data."""


@dataclass
class Data:
    """What one app has read: rows ready for the model, and how to score it on those that were held out."""

    name: str
    train: Any
    collate: Callable[[list[Any]], dict[str, Tensor]]
    validation: dict[str, DataLoader[Any]]
    score: Callable[[Run, dict[str, DataLoader[Any]]], dict[str, float]]
    """Called on every rank; the metrics, on every rank."""
    main: str
    metrics: tuple[str, ...]
    config: dict[str, Any]
    """What the model's configuration says of these data: labels."""
    embedded: bool
    summary: str
    identity: dict[str, Any]
    """Plain data that a resumed run must find again."""
    write: Callable[[Path], None] = lambda folder: None
    """What the app writes into the run's folder at its end, on rank 0."""

    def batches(self, size: int, generator: torch.Generator) -> DataLoader[Any]:
        """Of training rows, shuffled by a generator of their own."""
        return DataLoader(self.train, batch_size=size, shuffle=True, collate_fn=self.collate, generator=generator)

    def example(self, names: Collection[str]) -> dict[str, Tensor]:
        """The first two training rows: those of a model's inputs that have these names."""
        rows = self.collate([self.train[i] for i in range(min(2, len(self.train)))])
        return {name: value for name, value in rows.items() if name in names}


@dataclass(frozen=True)
class Cut:
    """Channels that were removed before the first step. ``report`` is on the rank that planned."""

    plan: Plan
    done: Slimmed
    report: ChannelReport | None


@dataclass
class Progress:
    """What a resumed run needs besides weights. Plain data."""

    epoch: int = 0
    batch: int = 0
    """Batches of this epoch that are done, on each rank."""
    step: int = 0
    """Optimizer steps that were made."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    dense: dict[str, float] = field(default_factory=dict)
    """The metrics of the model that pruning began with."""
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass
class Run:
    app: App
    options: Namespace
    accelerator: Accelerator
    ranks: Ranks
    data: Data
    tokenizer: PreTrainedTokenizerBase
    timeline: Timeline
    model: nn.Module
    architecture: str
    optimizer: Any
    scheduler: Any
    train_batches: Any
    validation: dict[str, Any]
    pruner: Pruning | None = None
    teacher: PreTrainedModel | None = None
    distillation: LogitDistillation | None = None
    recipe: WeightPruningConfig | None = None
    """The pruning configuration as it was given, before the app set its steps."""
    cut: Cut | None = None
    trained_head: bool = False
    """The model could do the task before the first step: it is measured, as the figure to beat."""
    progress: Progress = field(default_factory=Progress)
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Losses of this epoch so far, on this rank."""

    @property
    def bare(self) -> PreTrainedModel:
        """The model without what makes it run on several ranks."""
        return self.accelerator.unwrap_model(self.model)

    def add(self, losses: Mapping[str, Tensor]) -> None:
        for name, value in losses.items():
            here = self.sums.get(name, torch.zeros((), device=self.ranks.device))
            self.sums[name] = here + value.detach().float()
