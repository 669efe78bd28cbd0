"""Train, prune and distil a YOLOv5 model. Read on from ``main``: ``train``, ``one_epoch``, ``judge``, ``finish``.

python apps/yolov5/train_prune.py --help
"""

from __future__ import annotations

import time

from apps.common.arguments import leave
from apps.yolov5.arguments import parser

if __name__ == "__main__":
    OPTIONS, GIVEN = parser().parse_args(), parser().given()  # before the slow imports: mistakes are answered at once

from argparse import Namespace
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from apps.common import ranks as processes
from apps.common.errors import BadInput
from apps.common.interrupt import Interrupt, leave_with
from apps.common.pruning import end_pruning, reached
from apps.common.results import duration, epochs_of
from apps.common.run_folder import ResultsTable
from apps.yolov5 import results
from apps.yolov5 import ultralytics_adapter as adapter
from apps.yolov5.build import build
from apps.yolov5.data_set import to_device
from apps.yolov5.resume import RESUME, state_of
from apps.yolov5.run import Run
from pruning_core import checkpoint, structure


def main(options: Namespace, given: dict[str, Any]) -> int:
    try:
        ranks = processes.start(options.device)
        with ranks.together():  # what is wrong on one rank ends all of them, before anything is written
            run = build(options, given, ranks)
    except BadInput as error:
        leave(str(error))
    with Interrupt() as interrupt:
        try:
            return train(run, interrupt)
        finally:
            processes.leave_group()


def train(run: Run, interrupt: Interrupt) -> int:
    options, ranks, progress = run.options, run.ranks, run.progress
    folder = results.open_folder(run)
    table = ResultsTable(folder / "results.csv", progress.rows)
    net = wrap(run)
    evaluator = adapter.Evaluator(run.hyp, run.data.names, ranks.device, folder)
    results.introduce(run, folder)
    if run.pruner is not None and run.start is not None:
        measure_dense(run, run.start, evaluator, folder)
    writer = results.tensorboard(folder) if ranks.first else None
    began = time.monotonic() - progress.seconds

    while progress.epoch < options.epochs:
        if progress.epoch >= options.epochs - run.hyp.close_mosaic:
            adapter.close_mosaic(run.train_batches.images, run.hyp)
        finished = one_epoch(run, net, interrupt, began)
        progress.seconds = time.monotonic() - began
        check_loss(run)
        final = progress.epoch + 1 == options.epochs
        if not finished or not options.nosave:
            save_state(run, folder)  # before the evaluation: a kill during it costs nothing
        if not finished:
            return stopped(run, folder, interrupt)
        metrics = evaluate(run, run.ema.ema, evaluator) if final or not options.noval else {}
        stop = ranks.from_first(judge(run, metrics, folder, table, final) if ranks.first else None)
        progress.epoch, progress.batch, progress.sums = progress.epoch + 1, 0, {}
        progress.rows, progress.seconds = table.rows, time.monotonic() - began
        if writer is not None:
            for name, value in table.rows[-1].items():
                writer.add_scalar(name, value, progress.epoch)
            writer.flush()
        interrupted = ranks.any(interrupt.signal is not None)
        if interrupted or not options.nosave:
            save_state(run, folder)
        if stop:
            break
        if interrupted:
            return stopped(run, folder, interrupt)
    finish(run, evaluator, folder, table)
    return 0


def one_epoch(run: Run, net: nn.Module, interrupt: Interrupt, began: float) -> bool:
    """Trains to the end of the epoch, or to the optimizer step after a signal: then False."""
    ranks, timeline, progress, pruner = run.ranks, run.timeline, run.progress, run.pruner
    net.train()
    for name, module in run.model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and name.startswith(run.frozen):
            module.eval()
    batches = run.train_batches.epoch(progress.epoch, first=progress.batch)
    bar = tqdm(batches, disable=None if ranks.first else True, leave=False, unit="batch")
    shown = 0.0
    for batch in bar:
        number = progress.epoch * timeline.batches + progress.batch  # since training began
        set_rates(run, number)
        if pruner:
            pruner.on_step_begin(local_step=timeline.steps_before(number))
        batch = to_device(batch, ranks.device)
        last_of_step = timeline.ends_step(number)
        with net.no_sync() if isinstance(net, DistributedDataParallel) and not last_of_step else nullcontext():
            with torch.autocast(ranks.device.type, dtype=run.amp or torch.bfloat16, enabled=run.amp is not None):
                loss, items = losses(run, net, batch)
            run.scaler.scale(loss * ranks.size).backward()  # ranks' gradients are averaged; the loss is a sum
        for name, value in items.items():
            progress.sums[name] = progress.sums.get(name, torch.zeros((), device=ranks.device)) + value.detach()
        progress.batch += 1
        if not last_of_step:
            continue

        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.model.parameters(), max_norm=10.0)
        if pruner:
            pruner.on_before_optimizer_step()
        run.scaler.step(run.optimizer)
        if pruner:
            pruner.on_after_optimizer_step()
        run.scaler.update()
        run.optimizer.zero_grad()
        run.ema.update(run.model)
        if not bar.disable and time.monotonic() - shown > 0.5:  # reading the loss waits for the GPU
            shown = time.monotonic()
            bar.set_description_str(results.status(run, shown - began))
        if ranks.any(interrupt.signal is not None):
            break
    return progress.batch == timeline.batches


def losses(run: Run, net: nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The sum to minimize, scaled with the number of images as upstream does, and its parts by name."""
    outputs = net(batch["img"])
    parts, items = run.criterion(outputs, batch)
    loss = parts.sum()
    if run.distillation is not None and run.teacher is not None:
        with torch.no_grad():
            taught = run.teacher(batch["img"])
        terms = run.distillation(adapter.detections(outputs), adapter.detections(taught))
        loss = loss + run.options.dist_weight * sum(terms.values()) * len(batch["img"])
        items = {**items, **{f"dist_{name}_loss": run.options.dist_weight * term for name, term in terms.items()}}
    return loss, items


def set_rates(run: Run, number: int) -> None:
    """Learning rate and momentum of this batch: warm-up, then decay."""
    hyp, timeline = run.hyp, run.timeline
    for group in run.optimizer.param_groups:
        group["lr"] = timeline.learning_rate(
            number,
            first=hyp.lr0,
            last_factor=hyp.lrf,
            cosine=run.options.cos_lr,
            warmup_from=hyp.warmup_bias_lr if group["kind"] == "bias" else 0.0,
        )
        if "momentum" in group:
            group["momentum"] = timeline.momentum(number, full=hyp.momentum, warmup_from=hyp.warmup_momentum)


def evaluate(run: Run, model: nn.Module, evaluator: adapter.Evaluator) -> dict[str, float]:
    """Every rank evaluates its share of the images with rank 0's weights. The metrics, on rank 0."""
    if run.pruner is not None and model is run.ema.ema:
        run.pruner.mask_(model)  # an average of pruned weights is not sparse
    if run.ranks.size > 1:
        for buffer in model.buffers():  # running statistics are each rank's own
            torch.distributed.broadcast(buffer, 0)
    return evaluator.evaluate(model, run.val_batches, run.criterion, run.ranks)


def judge(run: Run, metrics: dict[str, float], folder: Path, table: ResultsTable, final: bool) -> bool:
    """Writes down the epoch and keeps the models worth keeping. True: no better one for ``--patience`` epochs.

    While weights become zero nothing is "best": the choice starts anew at the first model that has reached its target.
    """
    options, progress = run.options, run.progress
    row = results.row_of(run, metrics)
    table.add(row)
    fraction = (progress.epoch + 1) / options.epochs
    run.ranks.say(results.epoch_line(row, options.epochs, progress.seconds * (1 / fraction - 1)))
    name, record = contest(run)
    better = bool(name) and metrics.get("fitness", -1.0) > record.get("fitness", -1.0)
    if better:
        record.update(metrics, epoch=float(progress.epoch + 1))
    if final or not options.nosave:
        save_model(run, run.ema.ema, folder / "weights/last.pt", metrics)
        if better:
            save_model(run, run.ema.ema, folder / "weights" / name, metrics)
            progress.has_best |= name == "best.pt"
        if options.save_period > 0 and (progress.epoch + 1) % options.save_period == 0:
            save_model(run, run.ema.ema, folder / f"weights/epoch{progress.epoch + 1}.pt", metrics)
    waited = progress.epoch + 1 - progress.best.get("epoch", progress.epoch + 1)
    if options.patience and waited >= options.patience and not final:
        run.ranks.say(f"no better model for {options.patience} epochs (--patience): stopping")
        return True
    return False


def contest(run: Run) -> tuple[str, dict[str, float]]:
    """The file that this epoch's model may become, and the record of what is in it."""
    if run.pruner is None or run.pruner.done:
        return "best.pt", run.progress.best
    if run.pruner.asked == 0:
        return "best_dense.pt", run.progress.best_dense
    return "", {}


def finish(run: Run, evaluator: adapter.Evaluator, folder: Path, table: ResultsTable) -> None:
    """Measures the file that is shipped, and says what came of the run."""
    ranks, progress = run.ranks, run.progress
    if run.pruner is not None:
        end_pruning(run.pruner, ranks.say)
    shipped = folder / "weights" / ("best.pt" if ranks.from_first(progress.has_best) else "last.pt")
    model = adapter.load_model(shipped, "weights").to(ranks.device)
    metrics = evaluate(run, model, evaluator)
    if not ranks.first:
        return
    rows: list[results.TableRow] = []
    if run.pruner is None:
        kind = "slim" if structure(run.model) else "dense"
        rows.append((f"{kind} ({shipped.name})", metrics, None, None, shipped.stat().st_size))
    else:
        if progress.dense_metrics:
            source = Path(run.options.weights)
            size = source.stat().st_size if source.is_file() else 0
            rows.append((f"dense ({source.name})", progress.dense_metrics, None, None, size))
        shares = run.pruner.asked, reached(run.pruner, model)
        rows.append((f"sparse ({shipped.name})", metrics, *shares, shipped.stat().st_size))
        results.report(run, run.pruner, metrics, folder)
    if not run.options.noplots:
        results.plot(table, progress.dense_metrics, folder / "results.png")
    print(f"\n{epochs_of(progress.epoch)} in {duration(progress.seconds)}, all in {folder}")
    print(results.last_table(rows))
    if run.pruner is not None:
        print(f"{shipped} loads with ultralytics.YOLO. What its zeros are good for: apps/yolov5/README.md")
    (folder / RESUME).unlink(missing_ok=True)


# ---- small parts ----------------------------------------------------------------------------------------------------


def wrap(run: Run) -> nn.Module:
    """The model as the loop calls it: with its ranks, and with batch statistics over all of them if asked."""
    ranks = run.ranks
    if ranks.size == 1:
        return run.model
    if run.options.sync_bn:
        if ranks.device.type != "cuda":
            ranks.say("--sync-bn: needs CUDA, so each rank keeps its own batch statistics")
        else:
            nn.SyncBatchNorm.convert_sync_batchnorm(run.model)
    return DistributedDataParallel(run.model, device_ids=[ranks.device] if ranks.device.type == "cuda" else None)


def measure_dense(run: Run, start: adapter.Model, evaluator: adapter.Evaluator, folder: Path) -> None:
    """The model that pruning starts from: the figure to beat."""
    metrics = evaluate(run, start.to(run.ranks.device), evaluator)
    run.start = None
    if not run.ranks.first:
        return
    run.progress.dense_metrics = metrics
    run.progress.best_dense = {**metrics, "epoch": 0.0}
    save_model(run, start, folder / "weights/best_dense.pt", metrics)
    run.ranks.say(f"dense: mAP50 {metrics[results.MAP50]:.3f} mAP50-95 {metrics[results.BOTH]:.3f}")


def check_loss(run: Run) -> None:
    bad = [name for name, value in run.progress.sums.items() if not torch.isfinite(value)]
    if run.ranks.any(bool(bad)):
        do = "the state before this epoch is kept; lower lr0 in --hyp"
        leave(
            f"loss: is not finite in epoch {run.progress.epoch + 1}, got {', '.join(bad) or 'it on another rank'}; {do}"
        )


def save_model(run: Run, model: nn.Module, path: Path, metrics: dict[str, float]) -> None:
    arguments = {
        **vars(run.hyp),
        "data": run.options.data,
        "epochs": run.options.epochs,
        "batch": run.options.batch_size,
    }
    adapter.save_model(model, path, arguments=arguments, metrics=metrics, epoch=run.progress.epoch)


def save_state(run: Run, folder: Path) -> None:
    if run.ranks.first:
        checkpoint.save(state_of(run), folder / RESUME)


def stopped(run: Run, folder: Path, interrupt: Interrupt) -> int:
    progress = run.progress
    run.ranks.say(
        f"stopped in epoch {progress.epoch + 1} after batch {progress.batch}; everything is saved. Go on with:"
    )
    run.ranks.say(f"  --resume {folder}")
    return interrupt.exit_code


if __name__ == "__main__":
    leave_with(lambda: main(OPTIONS, GIVEN))
