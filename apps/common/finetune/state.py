"""Checkpoints of a whole run, and going on from one. Tensors and plain data only.

``accelerator.save_state`` is not used: ``load_state`` unpickles what objects had registered, whatever it is, and goes
on in silence where it cannot restore the random generators.

A checkpoint is a folder: ``state.pt``, and ``rank_0.pt``, ``rank_1.pt``, ... for what each rank has of its own: random
generators, and under FSDP2 its part of the weights. It is written under another name and then renamed.
"""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Collection
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from apps.common.errors import BadInput
from apps.common.finetune import processes
from apps.common.finetune.arguments import MAY_CHANGE, public
from apps.common.finetune.run import Progress, Run
from apps.common.resume import saved_options
from apps.common.run_folder import latest_folder
from pruning_core import CheckpointError, checkpoint

STATE = "state.pt"
OPTION = "--resume_from_checkpoint"
COMMON = ("app", "ranks", "sharded", "precision", "options", "data", "recipe", "scheduler", "scaler", "progress")
WEIGHTS = ("model", "optimizer", "pruner")


def save(run: Run, folder: Path) -> None:
    ranks = run.ranks
    temporary = folder.with_name(f".{folder.name}.tmp")
    if ranks.first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    run.accelerator.wait_for_everyone()
    checkpoint.save(_own(run), temporary / f"rank_{ranks.rank}.pt")
    if ranks.first:
        checkpoint.save(_common(run), temporary / STATE)
    run.accelerator.wait_for_everyone()
    if ranks.first:
        old = folder.with_name(f".{folder.name}.old")
        if folder.exists():  # of the same step, perhaps of a run that went another way: the newest counts
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    run.accelerator.wait_for_everyone()


def _common(run: Run) -> dict[str, Any]:
    state = {
        "app": run.app.name,
        "ranks": run.ranks.size,
        "sharded": processes.sharded(run.accelerator),
        "precision": processes.precision(run.accelerator),
        "options": public(run.options),
        "data": run.data.identity,
        "recipe": [each.model_dump(exclude_unset=True) for each in run.recipe.pruners] if run.recipe else None,
        "slim": run.cut.plan.to_dict() if run.cut else None,
        "scheduler": run.scheduler.state_dict(),
        "scaler": run.accelerator.scaler.state_dict() if run.accelerator.scaler else None,
        "progress": dict(vars(run.progress)),
    }
    return state if state["sharded"] else {**state, **_weights(run)}


def _own(run: Run) -> dict[str, Any]:
    own = {"rng": checkpoint.rng_state(), "sums": run.sums}
    return {**own, **_weights(run)} if processes.sharded(run.accelerator) else own


def _weights(run: Run) -> dict[str, Any]:
    return {
        "model": run.bare.state_dict(),
        "optimizer": run.optimizer.optimizer.state_dict(),
        "pruner": run.pruner.state_dict() if run.pruner else None,
    }


def find(options: Namespace, app: str) -> dict[str, Any]:
    """``state.pt`` of the checkpoint that was asked for, with its ``folder``."""
    if options.resume_from_checkpoint is True:
        if options.output_dir is None:
            raise BadInput(f"{OPTION}: which run? give its folder, or --output_dir")
        folder = latest_folder(options.output_dir, STATE, option=OPTION, what="checkpoint")
    else:
        folder = Path(options.resume_from_checkpoint)
    if not (folder / STATE).is_file():
        raise BadInput(
            f"{OPTION}: no checkpoint, got {str(folder)!r}; give a folder such as step_100 that holds {STATE}"
        )
    state = _read(folder / STATE)
    if state.get("app") != app:
        raise BadInput(f"{OPTION}: no state of a {app} run, got {str(folder / STATE)!r}")
    _complete(state, COMMON if state.get("sharded") else {*COMMON, *WEIGHTS}, folder / STATE)
    return {**state, "folder": folder}


def _complete(state: dict[str, Any], keys: Collection[str], path: Path) -> None:
    missing = sorted(set(keys) - state.keys())
    if missing:
        raise BadInput(f"{OPTION}: is damaged, {missing[0]!r} is missing, got {str(path)!r}; use an earlier checkpoint")


def _read(path: Path) -> dict[str, Any]:
    try:
        return checkpoint.load(path)
    except CheckpointError as error:
        raise BadInput(f"{OPTION}: {error}") from error


def begun_with(options: Namespace, given: dict[str, Any], state: dict[str, Any]) -> Namespace:
    """The options of the checkpoint; the run goes on in the folder that the checkpoint lies in."""
    saved = {name: value for name, value in state["options"].items() if name not in ("resume_from_checkpoint",)}
    merged = saved_options(options, given, saved, may_change=MAY_CHANGE, without=OPTION)
    merged.output_dir = given.get("output_dir", state["folder"].parent)
    merged.resume_from_checkpoint = str(state["folder"])
    return merged


def check_same(state: dict[str, Any], identity: dict[str, Any], accelerator: Accelerator) -> None:
    """The data, the precision and the kind of parallel run are those that the checkpoint was made with."""
    for name, value in identity.items():
        if state["data"].get(name) != value:
            do = "put them back, or begin a new run"
            raise BadInput(f"{OPTION}: the data have changed: {name} was {state['data'].get(name)}, got {value}; {do}")
    now = processes.precision(accelerator)
    if state["precision"] != now:
        raise BadInput(f"--mixed_precision: this run was begun in {state['precision']}, got {now}; keep it")
    if state["sharded"] != processes.sharded(accelerator):
        raise BadInput(f"{OPTION}: under FSDP2 a run goes on under FSDP2 only, and without it only without")
    if state["ranks"] != accelerator.num_processes:  # the number of steps an epoch is another one
        raise BadInput(f"{OPTION}: begun on {state['ranks']} ranks, got {accelerator.num_processes}; use as many")


def load(run: Run, state: dict[str, Any]) -> None:
    """Puts everything back."""
    path = state["folder"] / f"rank_{run.ranks.rank}.pt"
    own = _read(path)
    _complete(own, {"rng", "sums", *(WEIGHTS if state["sharded"] else ())}, path)
    held = own if state["sharded"] else state
    try:
        run.bare.load_state_dict(held["model"])
        run.optimizer.optimizer.load_state_dict(held["optimizer"])
        run.scheduler.load_state_dict(state["scheduler"])
        run.progress = Progress(**state["progress"])
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise BadInput(f"{OPTION}: is of another model ({message}), got {str(state['folder'])!r}") from error
    try:
        if run.pruner is not None:
            run.pruner.load_state_dict(held["pruner"])
    except ValueError as error:
        raise BadInput(f"{OPTION}: {error}") from error
    if run.accelerator.scaler is not None:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    run.sums = {name: value.to(run.ranks.device) for name, value in own["sums"].items()}
    checkpoint.load_rng_state(own["rng"])
