"""What a run writes and says: its folder, a line an epoch, and at the end a model that others can load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from apps.common.errors import BadInput
from apps.common.finetune import card, processes, slim
from apps.common.finetune.arguments import public
from apps.common.finetune.run import Run
from apps.common.finetune.state import STATE
from apps.common.results import (
    ASKED,
    REACHED,
    duration,
    epochs_of,
    plot_curves,
    share,
    write_report,
)
from apps.common.run_folder import ResultsTable, check_writable, new_folder
from apps.common.yaml_file import write_yaml
from pruning_core import structure
from pruning_core.checkpoint import write_atomically
from pruning_core.report import text_table

RESULTS = "all_results.json"
ARGUMENTS = "args.yaml"


def check_folder(folder: Path | None, *, overwrite: bool) -> None:
    """A folder with a run in it is written over only when asked."""
    check_writable(folder or Path("runs"), "--output_dir")
    if folder is None:
        return
    if not overwrite and any((folder / name).exists() for name in (ARGUMENTS, RESULTS, "config.json")):
        do = "choose another, add --overwrite_output_dir, or go on with --resume_from_checkpoint"
        raise BadInput(f"--output_dir: holds a run already, got {str(folder)!r}; {do}")


def open_folder(run: Run) -> Path:
    """The run's folder with its settings in it; a run that goes on has its own."""
    options, ranks = run.options, run.ranks
    given = options.output_dir
    if given is None:
        given = new_folder(Path("runs") / run.app.name, "exp", exist_ok=False) if ranks.first else None
    options.output_dir = folder = Path(ranks.from_first(given))
    mistake = None
    if ranks.first:
        try:
            _write_settings(run, folder)
        except OSError as error:
            mistake = f"--output_dir: cannot be written ({error.strerror}), got {str(folder)!r}; choose another"
    mistake = ranks.from_first(mistake)
    if mistake is not None:
        raise BadInput(mistake)
    if options.with_tracking:
        plain = (str, int, float, bool)
        settings = {name: value for name, value in public(options).items() if isinstance(value, plain)}
        run.accelerator.init_trackers(run.app.name, settings)
    return folder


def _write_settings(run: Run, folder: Path) -> None:
    if not run.options.resume_from_checkpoint:
        for old in folder.glob(f"*/{STATE}"):  # of the run that is written over
            shutil.rmtree(old.parent)
    folder.mkdir(parents=True, exist_ok=True)
    write_yaml(folder / ARGUMENTS, public(run.options))
    if run.pruner is not None:
        write_yaml(folder / "pruning_config.yaml", run.pruner.config.to_dict())
    slim.write(run.cut, folder, goes_on=bool(run.options.resume_from_checkpoint))


def introduce(run: Run, folder: Path) -> None:
    options, timeline, ranks, progress = run.options, run.timeline, run.ranks, run.progress
    if progress.step:
        ranks.say(f"going on with {options.resume_from_checkpoint} after optimizer step {progress.step}")
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    ends = "process" if ranks.size == 1 else "processes"
    where = f"{ranks.size} {ends} on {ranks.device.type} in {processes.precision(run.accelerator)}"
    kind = "" if not processes.sharded(run.accelerator) else ", FSDP2"
    ranks.say(f"{run.data.summary}; {run.architecture}, {parameters:,} weights; {where}{kind}")
    epochs = epochs_of(round(timeline.steps / timeline.steps_per_epoch, 2))
    ranks.say(f"{epochs} of {timeline.steps_per_epoch} optimizer steps, {timeline.steps} in all; writing {folder}")
    if run.cut is not None:
        ranks.say(slim.summary(run.cut))
    if run.pruner is not None:
        for config, names, weights in run.pruner.pruners:
            what = f"{len(names)} layers, {weights:,} weights"
            if config.kind == "pattern_lock":
                ranks.say(f"today's zeros stay zero in {what}")
                continue
            goal = f"{config.target_sparsity:.0%} in {config.pattern} ({config.pruning_type})"
            window = f"steps {config.start_step} to {config.end_step} every {config.pruning_frequency}"
            ranks.say(f"pruning {goal} of {what}: {window}")
    if run.distillation is not None:
        teacher = options.teacher_model_name_or_path or options.model_name_or_path
        what = f"{options.dist_loss} of the logits"
        if options.feature_weight:
            what += f" and l2 of the hidden states (x{options.feature_weight:g})"
        ranks.say(f"learning from {teacher}: {what}, {options.distill_loss_weight:.0%} of the loss")


def scores_of(run: Run, metrics: dict[str, float]) -> str:
    return " ".join(f"{name} {metrics[name] / run.app.full:.3f}" for name in run.data.metrics if name in metrics)


def row_of(run: Run, metrics: dict[str, float]) -> dict[str, Any]:
    """Losses are the mean over the epoch and the ranks. Every rank must ask for it."""
    progress = run.progress
    row: dict[str, Any] = {"epoch": progress.epoch + 1, "step": progress.step, "time": progress.seconds}
    if run.sums:
        totals = run.accelerator.reduce(torch.stack(list(run.sums.values())), reduction="mean")
        means = (totals / max(progress.batch, 1)).tolist()
        row |= {f"train/{name}": value for name, value in zip(run.sums, means, strict=True)}
    row |= metrics
    row["learning_rate"] = run.optimizer.param_groups[0]["lr"]
    if run.pruner is not None:
        row[ASKED], row[REACHED] = run.pruner.asked, run.pruner.report().reached
    return row


def epoch_line(run: Run, row: dict[str, Any], seconds_left: float) -> str:
    parts = [
        f"epoch {row['epoch']}/{max(row['epoch'], run.timeline.epochs)}",
        f"loss {row.get('train/loss', float('nan')):.3g}",
    ]
    parts.append(scores_of(run, row))
    if REACHED in row:
        parts.append(f"sparsity {row[REACHED]:.1%}")
    return "  ".join([*parts, f"{duration(seconds_left)} left"])


def status(run: Run, seconds: float) -> str:
    progress, timeline = run.progress, run.timeline
    loss = float(run.sums["loss"]) / progress.batch
    parts = [f"epoch {progress.epoch + 1}/{timeline.epochs}", f"loss {loss:.3g}"]
    if progress.metrics:
        parts.append(f"{run.data.main} {progress.metrics[run.data.main] / run.app.full:.3f}")
    if run.pruner is not None:
        parts.append(f"sparsity {run.pruner.asked:.1%}")
    left = seconds / max(progress.step, 1) * (timeline.steps - progress.step)
    return "  ".join([*parts, f"{duration(left)} left"])


def finish(run: Run, table: ResultsTable, folder: Path) -> None:
    """Every rank must come here: under FSDP2 each holds a part of the weights."""
    ranks, progress = run.ranks, run.progress
    report = None
    if run.pruner is not None:
        run.pruner.metrics = _both(run)
        report = run.pruner.report()
    weights = processes.whole_weights(run.bare)
    if ranks.first:
        size = _save_model(run, folder, weights)
        results: dict[str, Any] = {f"eval_{name}": value for name, value in progress.metrics.items()}
        results |= {f"dense_{name}": value for name, value in progress.dense.items()}
        results |= {"epochs": progress.epoch, "steps": progress.step, "seconds": round(progress.seconds, 1)}
        if report is not None and run.pruner is not None:
            results |= {"sparsity_asked": run.pruner.asked, "sparsity": report.reached}
            write_report(report, folder)
        _write(folder / RESULTS, json.dumps(results, indent=2))
        scores = [(name, name) for name in run.data.metrics]
        level = (run.data.main, progress.dense[run.data.main]) if progress.dense else None
        title = "validation, share of zeros"
        plot_curves(table, scores, folder / "training_curves.png", title=title, dense=level, full=run.app.full)
        run.data.write(folder)
        _write(folder / "README.md", card.model_card(run, report))
        print(f"\n{epochs_of(progress.epoch)} in {duration(progress.seconds)}, all in {folder}")
        print(_last_table(run, size, report.reached if report else None))
        first = " after `import pruning_core`" if slim.needs_import(run.bare) else ""
        loads = f"{folder} loads with {run.app.kind.__name__}.from_pretrained{first}"
        print(f"{loads}; report, curves and model card are in it")
    if run.options.with_tracking:
        run.accelerator.end_training()
    if ranks.first and run.options.push_to_hub:
        card.push(run, folder)


def _both(run: Run) -> dict[str, float]:
    kinds = {"dense": run.progress.dense, "sparse": run.progress.metrics}
    return {f"{kind} {name}": round(value, 4) for kind, metrics in kinds.items() for name, value in metrics.items()}


def _save_model(run: Run, folder: Path, weights: dict[str, Any]) -> int:
    """Written beside the place and moved there, so that a kill leaves no half model. The bytes of the weights."""
    temporary = folder / ".model.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    run.bare.save_pretrained(temporary, state_dict=weights)
    run.tokenizer.save_pretrained(temporary)
    size = 0
    for path in sorted(temporary.iterdir(), key=lambda each: each.name == "config.json"):  # it comes last
        size += path.stat().st_size if path.suffix == ".safetensors" else 0
        path.chmod((temporary / "config.json").stat().st_mode)  # the weights come readable by their owner alone
        path.replace(folder / path.name)
    temporary.rmdir()
    return size


def _last_table(run: Run, size: int, zeros: float | None) -> str:
    names = run.data.metrics
    head, rows = ("model", *names, "asked", "reached", "file"), []
    dense, metrics = run.progress.dense, run.progress.metrics

    def figures(of: dict[str, float]) -> list[str]:
        return [f"{of[name] / run.app.full:.3f}" if name in of else "-" for name in names]

    if dense:
        rows.append((f"dense ({Path(run.options.model_name_or_path).name})", *figures(dense), "-", "-", "-"))
    kind = "sparse" if run.pruner else "slim" if structure(run.bare) else "dense"
    wanted = None if run.pruner is None else run.pruner.asked
    rows.append((kind, *figures(metrics), share(wanted), share(zeros), f"{size / 1e6:.1f} MB"))
    return text_table(head, rows, right=head[1:])


def _write(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write((text.rstrip() + "\n").encode()))
