"""Going on with a run: what is saved, where it is found, and which options may change. Tensors and plain data only."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from apps.common.arguments import plain
from apps.common.errors import BadInput
from apps.common.ranks import Ranks
from apps.common.resume import saved_options
from apps.common.run_folder import latest_folder
from apps.yolov5.arguments import MAY_CHANGE
from apps.yolov5.hyp import KEYS
from apps.yolov5.run import Progress, Run
from pruning_core import CheckpointError, WeightPruningConfig, checkpoint, structure

RESUME = Path("weights/resume.pt")


def find_state(options: Namespace, ranks: Ranks) -> dict[str, Any]:
    folder = latest_folder(options.project, str(RESUME)) if options.resume is True else Path(options.resume)
    if folder.suffix == ".pt":  # .../weights/last.pt, as YOLOv5 users write it
        folder = folder.parent.parent
    if not folder.is_dir():
        raise BadInput(f"--resume: no such run, got {str(options.resume)!r}; give its folder, as runs/train/exp")
    if not (folder / RESUME).is_file():
        raise BadInput(f"--resume: nothing to go on with, got {str(folder)!r}; a finished run has no {RESUME}")
    try:
        state = checkpoint.load(folder / RESUME)
    except CheckpointError as error:
        raise BadInput(f"--resume: {error}") from error
    missing = {"app", "options", "model", "progress"} - state.keys()
    if missing or state["app"] != "yolov5":
        raise BadInput(f"--resume: no state of a yolov5 run, got {str(folder / RESUME)!r}")
    state["options"]["folder"] = str(folder)
    if state["ranks"] != ranks.size:
        ranks.say(
            f"--resume: begun on {state['ranks']} ranks, goes on on {ranks.size}: the weights will differ a little"
        )
    return state


def begun_with(options: Namespace, given: dict[str, Any], saved: dict[str, Any]) -> Namespace:
    dashes = ("batch_size", "cos_lr", "sync_bn")
    merged = saved_options(options, given, saved, may_change=MAY_CHANGE, with_dashes=dashes, without="--resume")
    return Namespace(**{**vars(merged), "resume": True, "project": Path(merged.project)})


def check_same(run: Run, state: dict[str, Any], given: dict[str, Any]) -> None:
    """The data and the recipe are still those the run was begun with."""
    images = len(run.train_batches.images)
    if (images, run.data.names) != (state["images"], state["names"]):
        was, now = f"{state['images']} images of {len(state['names'])} classes", f"{images} of {len(run.data.names)}"
        raise BadInput(f"--data: this run was begun with {was}, got {now}; put them back, or begin a new run")
    path = run.options.pruning_config
    if path is None or run.recipe is None or not Path(path).is_file():
        return
    try:
        same = WeightPruningConfig(path).to_dict() == state["recipe"]
    except ValueError:
        same = False
    if same:
        return
    if "pruning_config" in given:
        raise BadInput(f"--pruning_config: changed since this run was begun, got {path}; put it back or leave it out")
    run.ranks.say(f"--pruning_config: {path} has changed; this run goes on with what it was begun with")


def state_of(run: Run) -> dict[str, Any]:
    """Tensors and plain data; exact at every optimizer step."""
    return {
        "app": "yolov5",
        "ranks": run.ranks.size,
        "options": {name: plain(value) for name, value in vars(run.options).items() if name != "folder"},
        "architecture": run.model.yaml,
        "structure": structure(run.model),
        "hyp": {key: getattr(run.hyp, key) for key in KEYS},
        "model": run.model.state_dict(),
        "ema": run.ema.ema.state_dict(),
        "ema_updates": run.ema.updates,
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "images": len(run.train_batches.images),
        "names": run.data.names,
        "recipe": run.recipe.to_dict() if run.recipe else None,
        "pruner": run.pruner.state_dict() if run.pruner else None,
        "progress": dict(vars(run.progress)),
        "rng": checkpoint.rng_state(),
    }


def load_state(run: Run, state: dict[str, Any]) -> None:
    run.model.load_state_dict(state["model"])
    run.ema.ema.load_state_dict(state["ema"])
    run.ema.updates = state["ema_updates"]
    run.optimizer.load_state_dict(state["optimizer"])
    run.scaler.load_state_dict(state["scaler"])
    run.progress = Progress(**state["progress"])
    run.progress.sums = {name: value.to(run.ranks.device) for name, value in run.progress.sums.items()}
    try:
        if run.pruner is not None:
            run.pruner.load_state_dict(state["pruner"])
    except ValueError as error:
        raise BadInput(f"--resume: {error}") from error
    checkpoint.load_rng_state({**state["rng"], "cuda": []})
