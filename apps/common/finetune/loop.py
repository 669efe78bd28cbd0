"""The training loop of the Transformers apps. Read on from ``train``: ``one_epoch``, ``losses``, ``end_of_epoch``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate.data_loader import skip_first_batches
from torch import Tensor
from tqdm import tqdm

from apps.common.arguments import leave
from apps.common.finetune import processes, results, state
from apps.common.finetune.run import Run
from apps.common.interrupt import Interrupt
from apps.common.pruning import end_pruning
from apps.common.run_folder import ResultsTable
from pruning_core import Outputs


def train(run: Run, folder: Path, interrupt: Interrupt) -> int:
    options, ranks, progress, timeline = run.options, run.ranks, run.progress, run.timeline
    table = ResultsTable(folder / "results.csv", progress.rows)
    results.introduce(run, folder)
    if run.pruner is not None and run.trained_head and not progress.step:
        progress.dense = evaluate(run)
        ranks.say(f"dense: {results.scores_of(run, progress.dense)}")
    began = time.monotonic() - progress.seconds
    if progress.step == timeline.steps and not progress.batch:  # from a checkpoint of the end: only files are missing
        evaluate(run)
        if ranks.first:
            table.write()

    while progress.step < timeline.steps:
        finished = one_epoch(run, interrupt, folder, began)
        progress.seconds = time.monotonic() - began
        check_loss(run)
        if not finished:
            return stopped(run, folder, interrupt)
        end_of_epoch(run, table, began)
        if options.checkpointing_steps == "epoch":
            state.save(run, folder / f"epoch_{progress.epoch}")
        if ranks.any(interrupt.signal is not None) and progress.step < timeline.steps:
            return stopped(run, folder, interrupt)
    if run.pruner is not None:
        end_pruning(run.pruner, ranks.say)
    results.finish(run, table, folder)
    return 0


def one_epoch(run: Run, interrupt: Interrupt, folder: Path, began: float) -> bool:
    """Trains to the end of the epoch or of the steps; after a signal to the next optimizer step: then False."""
    accelerator, ranks, timeline, progress, pruner = (
        run.accelerator,
        run.ranks,
        run.timeline,
        run.progress,
        run.pruner,
    )
    cadence = run.options.checkpointing_steps
    run.model.train()
    run.train_batches.set_epoch(progress.epoch)
    rest = skip_first_batches(run.train_batches, progress.batch) if progress.batch else run.train_batches
    bar = tqdm(rest, disable=None if ranks.first else True, leave=False, unit="batch")
    bar.total, bar.n = timeline.batches, progress.batch
    shown = 0.0
    for batch in bar:
        with accelerator.accumulate(run.model):
            if pruner is not None:
                pruner.on_step_begin(local_step=progress.step)
            loss, parts = losses(run, batch)
            accelerator.backward(loss)
            run.add(parts)
            progress.batch += 1
            if accelerator.sync_gradients:  # the last batch of an optimizer step
                accelerator.clip_grad_norm_(run.model.parameters(), run.options.max_grad_norm)
                if pruner is not None:
                    pruner.on_before_optimizer_step()
                scale = processes.scale(accelerator)
                run.optimizer.step()
                if pruner is not None:
                    pruner.on_after_optimizer_step()
                made = not processes.skipped(accelerator, scale)
                if made:
                    run.scheduler.step()
                    progress.step += 1
                run.optimizer.zero_grad()
        if not accelerator.sync_gradients:
            continue
        if not bar.disable and time.monotonic() - shown > 0.5:  # reading the loss waits for the GPU
            shown = time.monotonic()
            bar.set_description_str(results.status(run, shown - began))
        if progress.step == timeline.steps:
            break
        if made and cadence and cadence != "epoch" and progress.step % int(cadence) == 0:
            progress.seconds = time.monotonic() - began
            check_loss(run)
            state.save(run, folder / f"step_{progress.step}")
        if ranks.any(interrupt.signal is not None):
            return False
    return True


def losses(run: Run, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """``(1 - w) task + w distillation``, and its parts by name."""
    hidden = bool(run.distillation and run.distillation.feature_weight)
    outputs = run.model(**batch, output_hidden_states=hidden)
    if run.teacher is None or run.distillation is None:
        return outputs.loss, {"loss": outputs.loss}
    inputs = {name: value for name, value in batch.items() if name in run.tokenizer.model_input_names}
    with torch.no_grad(), run.accelerator.autocast():
        taught = run.teacher(**inputs, output_hidden_states=hidden)
    counts, tokens = run.app.counts(batch), batch["attention_mask"].bool()
    student, teacher = (
        Outputs(run.app.logits(each), counts, each.hidden_states if hidden else (), tokens)
        for each in (outputs, taught)
    )
    terms = run.distillation(student, teacher)
    share = run.options.distill_loss_weight
    loss = (1 - share) * outputs.loss + share * sum(terms.values())
    return loss, {"loss": loss, "task": outputs.loss, **{f"dist_{name}": term for name, term in terms.items()}}


def evaluate(run: Run) -> dict[str, float]:
    run.model.eval()
    with torch.no_grad():
        return run.data.score(run, run.validation)


def end_of_epoch(run: Run, table: ResultsTable, began: float) -> None:
    """Scores the model and writes down the epoch. Every rank has the row: any of them may be asked for it."""
    progress = run.progress
    metrics = evaluate(run)
    row = results.row_of(run, metrics)
    progress.metrics = metrics
    progress.epoch, progress.batch, run.sums = progress.epoch + 1, 0, {}
    if run.ranks.first:
        table.add(row)
        progress.rows = table.rows
        done = max(progress.step, 1) / run.timeline.steps
        run.ranks.say(results.epoch_line(run, row, progress.seconds * (1 / done - 1)))
    if run.options.with_tracking:
        run.accelerator.log({name: value for name, value in row.items() if name != "epoch"}, step=progress.step)
    progress.seconds = time.monotonic() - began


def check_loss(run: Run) -> None:
    """And the weights: the loss does not tell what the last step has made of them."""
    bad = [name for name, value in run.sums.items() if not torch.isfinite(value)]
    if not bad and not processes.finite(run.model):
        bad = ["weights"]
    if run.ranks.any(bool(bad)):
        do = "go on from an earlier checkpoint with none of this epoch, or lower --learning_rate"
        leave(
            f"loss: is not finite in epoch {run.progress.epoch + 1}, got {', '.join(bad) or 'it on another rank'}; {do}"
        )


def stopped(run: Run, folder: Path, interrupt: Interrupt) -> int:
    progress = run.progress
    state.save(run, folder / f"step_{progress.step}")
    run.ranks.say(f"stopped after optimizer step {progress.step}; everything is saved. Go on with:")
    run.ranks.say(f"  --resume_from_checkpoint {folder / f'step_{progress.step}'}")
    return interrupt.exit_code
