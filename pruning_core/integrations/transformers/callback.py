"""``PruningCallback``: pruning inside ``transformers.Trainer``."""

from __future__ import annotations

import uuid
import warnings
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from pruning_core import checkpoint
from pruning_core.checkpoint import CheckpointError
from pruning_core.masks import Pruning
from pruning_core.masks.config import WeightPruningConfig
from pruning_core.masks.options import LOCK

FILE = "pruner.pt"
TRAINER_STATE = "trainer_state.json"
NOTE = "pruning_core"
"""Our entry in ``TrainerState.stateful_callbacks``, which the Trainer writes into that file."""


class PruningCallback(TrainerCallback):
    """Zeroes weights while a ``Trainer`` trains: ``Trainer(..., callbacks=[PruningCallback(config)])``.

    ``config``: whatever ``Pruning`` takes, or a ``Pruning``. ``warmup``, ``cooldown``: shares of the run before the
    first and after the last mask change; one of them given, they replace the ``start_step`` and ``end_step`` of every
    pruner but ``pattern_lock``. ``pruner`` is the ``Pruning`` of the current or last run. Each ``train()`` starts a
    fresh one from ``config``; a ``Pruning`` that was given is used again.
    """

    def __init__(self, config: Any = None, *, warmup: float | None = None, cooldown: float | None = None) -> None:
        _check_share("warmup", warmup)
        _check_share("cooldown", cooldown)
        self._shares = None if warmup is None and cooldown is None else (warmup or 0.0, cooldown or 0.0)
        if self._shares and sum(self._shares) >= 1:
            raise ValueError(
                f"cooldown: warmup + cooldown leave no step to prune in, got {warmup} + {cooldown}; "
                "lower one, so that the sum is below 1"
            )
        self._ready = isinstance(config, Pruning)
        self.pruner: Pruning = config if isinstance(config, Pruning) else Pruning(config)
        self._running = False
        self._run = ""  # names this run in its checkpoints
        self._sparsity = 0.0
        self._best_is_early = False  # the best evaluation so far was of a model that had not reached the target

    # ---- the run ------------------------------------------------------------------------------------------------

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if model is None or optimizer is None:
            missing = "model" if model is None else "optimizer"
            raise ValueError(f"PruningCallback: needs the {missing} of a Trainer, got None; let the Trainer make it")
        self._leave_broken_run()
        # A Trainer that starts anew is at step 0; where it stands elsewhere, a checkpoint was loaded.
        saved = self._load(args, state) if state.global_step else {}
        if not self._ready:
            self.pruner = Pruning(self.pruner.config)
        if self._shares is not None:
            self.pruner.config = self._with_window(*self._shares, state.max_steps, saved.get("pruner"))
        if saved:
            self.pruner.load_state_dict(saved["pruner"])
        self.pruner.attach(model, optimizer, total_steps=state.max_steps)
        self._running, self._best_is_early = True, saved.get("best_is_early", False)
        self._run = uuid.uuid4().hex
        notes: Any = state.stateful_callbacks
        notes[NOTE] = {"run": self._run, "output_dir": str(_output(args).resolve())}
        self._count()

    def _leave_broken_run(self) -> None:
        """An exception ended the last run, or the Trainer tries again with smaller batches: its hooks must not stay."""
        if self._running:
            self._running = False
            self.pruner.detach()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it stopped short of its target is no news
                self.pruner.on_train_end()

    def _with_window(
        self, warmup: float, cooldown: float, total: int, saved: dict[str, Any] | None
    ) -> WeightPruningConfig:
        """The configuration with the shares as steps; a resumed run keeps the steps it began with."""
        window = {"start_step": round(warmup * total), "end_step": total - round(cooldown * total)}
        for old in saved["config"]["pruning_configs"] if saved else []:
            if old["pruning_type"] != LOCK:
                window = {option: old[option] for option in window}
        pruners = self.pruner.config.pruners
        return WeightPruningConfig([p if p.kind == LOCK else p.model_copy(update=window) for p in pruners])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._running:
            return
        self._running = False
        self.pruner.detach()
        self.pruner.on_train_end()
        report = self.pruner.report()  # sums over ranks under fully_shard: every rank asks
        if not args.should_save or state.is_hyper_param_search:
            return
        path = _output(args) / "pruning_report"
        report.save_json(path.with_suffix(".json"))
        report.save_markdown(path.with_suffix(".md"))
        try:
            report.plot(path.with_suffix(".png"))
        except ModuleNotFoundError as error:
            warnings.warn(f"{path.name}.png: not drawn; {error}", stacklevel=2)

    # ---- logs and the best model --------------------------------------------------------------------------------

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._count()
        self._save_unannounced(args, state, control)

    def _count(self) -> None:
        """Every rank asks, at every step: counting is collective under ``fully_shard``."""
        if self._running:
            self._sparsity = self.pruner.sparsity

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds ``sparsity`` to the logs of training steps, for the callbacks that follow and for ``log_history``."""
        if self._running and logs is not None and "loss" in logs:
            logs["sparsity"] = self._sparsity
            if state.log_history and state.log_history[-1].get("step") == state.global_step:
                state.log_history[-1]["sparsity"] = self._sparsity

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Models compete for "best" only once they are at the target: a denser one would win and be loaded.

        The Trainer compares right after this event. Without a best metric so far, the model at hand becomes the best.
        """
        if self._running:
            early = not self.pruner.done
            if early or self._best_is_early:
                state.best_metric = None
            self._best_is_early = early

    # ---- checkpoints --------------------------------------------------------------------------------------------

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Writes the pruner's state into the checkpoint folder, which the Trainer has just filled."""
        sharded = self.pruner.sharded
        if not self._running or state.is_hyper_param_search or not (args.should_save or sharded):
            return
        folder = _folder(_output(args), state)
        if args.should_save and not folder.is_dir():  # making it would give the Trainer a checkpoint without a model
            warnings.warn(f"{folder / FILE}: not written, the folder is missing; this run cannot resume", stacklevel=2)
            return
        content = {"pruner": self.pruner.state_dict(), "step": state.global_step, "best_is_early": self._best_is_early}
        name = _file_of(args.process_index) if sharded else FILE
        checkpoint.save({**content, "run": self._run}, folder / name)

    def _save_unannounced(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """``enable_jit_checkpoint`` saves and stops when the machine is taken away, without calling ``on_save``."""
        if self._running and control.should_training_stop:
            trainer_state = _folder(_output(args), state) / TRAINER_STATE
            if trainer_state.is_file() and self._run in trainer_state.read_text():
                self.on_save(args, state, control)

    on_step_begin = on_pre_optimizer_step = on_epoch_end = _save_unannounced

    def _load(self, args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
        """What ``on_save`` wrote beside the weights that the Trainer has loaded.

        The Trainer does not say from which folder. ``trainer_state.json``, which it has read there, names the run; the
        file of that run and step is the right one, wherever it is found.
        """
        notes: Any = state.stateful_callbacks
        note = notes.get(NOTE, {})
        folders = [_folder(_output(args), state)]
        if "output_dir" in note:
            folders.append(_folder(note["output_dir"], state))
        if isinstance(args.resume_from_checkpoint, str):
            folders.append(Path(args.resume_from_checkpoint))
        for folder in folders:
            for path in (folder / _file_of(args.process_index), folder / FILE):
                saved = checkpoint.load(path) if path.is_file() else {}
                mine = path.name != FILE or saved.get("run") == note.get("run", "")
                if saved and mine and saved.get("step") == state.global_step:
                    return saved
        looked = ", ".join(dict.fromkeys(str(folder) for folder in folders))
        raise CheckpointError(
            f"{FILE}: the pruner's state at step {state.global_step} is missing, got none of this run in {looked}; "
            "resume from a checkpoint that a run with PruningCallback wrote (if it was moved, name it in "
            "TrainingArguments(resume_from_checkpoint=...) too), or begin anew from its weights with from_pretrained"
        )


def _output(args: TrainingArguments) -> Path:
    return Path(args.output_dir or ".")


def _folder(output_dir: str | Path, state: TrainerState) -> Path:
    return Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _file_of(process: int) -> str:
    """Under ``fully_shard`` each process keeps the state of its slices."""
    return FILE if process == 0 else f"pruner-{process}.pt"


def _check_share(name: str, share: float | None) -> None:
    number = isinstance(share, int | float) and not isinstance(share, bool)
    if share is not None and not (number and 0 <= share < 1):
        raise ValueError(f"{name}: must be a share of the run, got {share!r}; give a number from 0 to below 1")
