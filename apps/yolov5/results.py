"""What a run writes and says: its folder, a line an epoch, ``results.png``, the report, the last table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from apps.common.arguments import plain
from apps.common.pruning import reached
from apps.common.results import ASKED, REACHED, duration, epochs_of, plot_curves, share, write_report
from apps.common.run_folder import ResultsTable, new_folder
from apps.common.yaml_file import write_yaml
from apps.yolov5.hyp import KEYS
from apps.yolov5.run import Run
from pruning_core import Pruning
from pruning_core.report import text_table

BOTH = "metrics/mAP50-95"
MAP50 = "metrics/mAP50"
TableRow = tuple[str, dict[str, float], float | None, float | None, int]


def open_folder(run: Run) -> Path:
    """The run's folder with its settings in it; a run that goes on has its own."""
    options, ranks = run.options, run.ranks
    if options.resume:
        return Path(options.folder)
    folder = new_folder(options.project, options.name, exist_ok=options.exist_ok) if ranks.first else None
    folder = ranks.from_first(folder)
    if ranks.first:
        (folder / "weights").mkdir(parents=True, exist_ok=True)
        write_yaml(folder / "args.yaml", {name: plain(value) for name, value in vars(options).items()})
        write_yaml(folder / "hyp.yaml", {key: getattr(run.hyp, key) for key in KEYS})
        if run.pruner is not None:
            write_yaml(folder / "pruning_config.yaml", run.pruner.config.to_dict())
    return folder


def introduce(run: Run, folder: Path) -> None:
    options, timeline, ranks = run.options, run.timeline, run.ranks
    if run.progress.epoch or run.progress.batch:
        ranks.say(f"going on with {folder} in epoch {run.progress.epoch + 1}, after batch {run.progress.batch}")
    images, held_out, ends = len(run.train_batches.images), len(run.val_batches.dataset), "" if ranks.size == 1 else "s"
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    ranks.say(
        f"{images} training and {held_out} validation images, {len(run.data.names)} classes; {parameters:,} weights; "
        f"{ranks.size} rank{ends} on {ranks.device.type}"
    )
    ranks.say(
        f"{epochs_of(options.epochs)} of {timeline.batches} batches, {timeline.steps} optimizer steps; writing {folder}"
    )
    if run.pruner is not None:
        window = f"steps {timeline.pruning_starts} to {timeline.pruning_ends}"
        targets = ", ".join(f"{config.target_sparsity:.0%} in {config.pattern}" for config, _, _ in run.pruner.pruners)
        ranks.say(f"pruning {targets} in {window}, then {epochs_of(options.cooldown_epochs)} with fixed masks")
        layers = sum(len(names) for _, names, _ in run.pruner.pruners)
        weights = sum(total for _, _, total in run.pruner.pruners)
        ranks.say(f"{layers} layers take part, {weights:,} weights")
    if run.distillation is not None:
        ranks.say(f"learning from {options.teacher_weights or options.weights} as well ({options.dist_loss})")


def tensorboard(folder: Path) -> Any:
    """A writer when TensorBoard is installed, else None."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder))


def row_of(run: Run, metrics: dict[str, float]) -> dict[str, Any]:
    progress = run.progress
    row: dict[str, Any] = {"epoch": progress.epoch + 1, "time": progress.seconds}
    row.update({f"train/{name}": float(value) / run.timeline.batches for name, value in progress.sums.items()})
    row.update({name: value for name, value in metrics.items() if name != "fitness"})
    row.update({f"lr/{group['kind']}": group["lr"] for group in run.optimizer.param_groups})
    if run.pruner is not None:
        row[ASKED], row[REACHED] = run.pruner.asked, reached(run.pruner, run.ema.ema)
        row["pruner_step"] = run.pruner.step
    return row


def epoch_line(row: dict[str, Any], epochs: int, seconds_left: float) -> str:
    losses = " ".join(
        f"{name.removeprefix('train/').removesuffix('_loss')} {value:.3g}"
        for name, value in row.items()
        if name.startswith("train/")
    )
    parts = [f"epoch {row['epoch']}/{epochs}", f"loss {losses}"]
    if MAP50 in row:
        parts.append(f"mAP50 {row[MAP50]:.3f} mAP50-95 {row[BOTH]:.3f}")
    if ASKED in row:
        parts.append(f"sparsity {row[REACHED]:.1%}")
    return "  ".join([*parts, f"{duration(seconds_left)} left"])


def plot(table: ResultsTable, dense: dict[str, float], path: Path) -> None:
    level = ("mAP50", dense[MAP50]) if MAP50 in dense else None
    scores = [(MAP50, "mAP50"), (BOTH, "mAP50-95")]
    plot_curves(table, scores, path, title="validation mAP, share of zeros", dense=level)


def last_table(rows: Sequence[TableRow]) -> str:
    """A row a model: name, metrics, asked and reached sparsity of its pruned layers, bytes of its file."""
    head, cells = ("model", "mAP50", "mAP50-95", "asked", "reached", "file"), []
    for name, metrics, wanted, counted, size in rows:
        figures = [f"{metrics[key]:.3f}" if key in metrics else "-" for key in (MAP50, BOTH)]
        cells.append(
            (name, figures[0], figures[1], share(wanted), share(counted), f"{size / 1e6:.1f} MB" if size else "-")
        )
    return text_table(head, cells, right=head[1:])


def status(run: Run, seconds: float) -> str:
    progress, timeline = run.progress, run.timeline
    done = progress.epoch * timeline.batches + progress.batch
    left = seconds / done * (timeline.epochs * timeline.batches - done)
    loss = sum(float(value) for value in progress.sums.values()) / progress.batch
    parts = [f"epoch {progress.epoch + 1}/{timeline.epochs}", f"loss {loss:.3g}"]
    if run.pruner is not None:
        parts.append(f"sparsity {run.pruner.asked:.1%}")
    if run.ranks.device.type == "cuda":
        parts.append(f"GPU {torch.cuda.max_memory_reserved() / 2**30:.1f} GiB")
    return "  ".join([*parts, f"{duration(left)} left"])


def report(run: Run, pruner: Pruning, metrics: dict[str, float], folder: Path) -> None:
    """The table of every layer, as text, JSON and a picture."""
    named = {"dense": run.progress.dense_metrics, "sparse": metrics}
    pruner.metrics = {
        f"{kind} {name.removeprefix('metrics/')}": round(values[name], 4)
        for kind, values in named.items()
        for name in (MAP50, BOTH)
        if name in values
    }
    write_report(pruner.report(), folder, plots=not run.options.noplots)
