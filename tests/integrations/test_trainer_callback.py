"""``PruningCallback`` in ``transformers.Trainer``: counts, saves, resumes, chooses the best model."""

import gc
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)

from pruning_core import Pruning, checkpoint
from pruning_core.integrations.transformers.callback import PruningCallback
from pruning_core.masks.report import SparsityReport
from tests.support import ROOT

CONFIG = {"pattern": "1x1", "target_sparsity": 0.8, "pruning_frequency": 2}
WINDOW = {"warmup": 0.1, "cooldown": 0.3}


@pytest.fixture(autouse=True, scope="module")
def _short_collections():
    """A Trainer collects garbage when it begins; what the imports left is not looked at each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _no_picture(request, monkeypatch):
    if "report" not in request.node.name and "matplotlib" not in request.node.name:
        monkeypatch.setattr(SparsityReport, "plot", lambda self, path: None)


class Net(nn.Module):
    """Dropout makes a resumed run differ unless everything is continued."""

    def __init__(self, dropout=0.2):
        super().__init__()
        self.hidden, self.drop, self.out = nn.Linear(16, 32), nn.Dropout(dropout), nn.Linear(32, 4)

    def forward(self, x, labels):
        logits = self.out(self.drop(self.hidden(x).relu()))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def data(rows=48):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, 16, generator=generator)
    return [{"x": row, "labels": int(row[:4].argmax())} for row in x]


def arguments(folder, **more):
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False}
    length = {"max_steps": 20, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    return TrainingArguments(str(folder), **{**quiet, **length, "save_strategy": "no", "logging_steps": 5, **more})


def trained(callback, folder, *, resume=None, model=None, others=(), compute_metrics=None, **more):
    torch.manual_seed(0)
    trainer = Trainer(
        model or Net(),
        arguments(folder, **more),
        train_dataset=data(),
        eval_dataset=data(8),
        callbacks=[callback, *others],
        compute_metrics=compute_metrics,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def zeros(model, *names):
    state = model.state_dict()
    weights = [state[name] for name in names or ("hidden.weight", "out.weight")]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def same_masks(a, b):
    left, right = a.masks(), b.masks()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True


# ---- the run ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_target_is_reached_exactly_and_steps_are_optimizer_steps(tmp_path, optim, accumulation):
    callback = PruningCallback(CONFIG, **WINDOW)
    trainer = trained(callback, tmp_path, optim=optim, gradient_accumulation_steps=accumulation)
    assert trainer.state.global_step == callback.pruner.step == 20
    assert [callback.pruner.config.pruners[0].start_step, callback.pruner.config.pruners[0].end_step] == [2, 14]
    group = callback.pruner.report().groups[0]
    assert group.zeros == round(0.8 * group.weights)
    assert zeros(trainer.model) == pytest.approx(0.8, abs=1e-3)


def test_without_shares_the_steps_of_the_configuration_hold(tmp_path):
    callback = PruningCallback({**CONFIG, "start_step": 3, "end_step": 9})
    trainer = trained(callback, tmp_path)
    assert callback.pruner.config.pruners[0].end_step == 9
    assert zeros(trainer.model) == pytest.approx(0.8, abs=1e-3)


def test_a_pattern_lock_keeps_its_own_step(tmp_path):
    model = Net()
    with torch.no_grad():
        model.out.weight[:, ::2] = 0
    locked = {"pruning_type": "pattern_lock", "op_names": ["out"]}
    callback = PruningCallback([locked, {**CONFIG, "op_names": ["hidden"]}], **WINDOW)
    trainer = trained(callback, tmp_path, model=model)
    assert zeros(trainer.model, "out.weight") == 0.5
    assert zeros(trainer.model, "hidden.weight") == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_skipped_steps_of_loss_scaling_do_not_count(tmp_path, fused):
    """fp16 needs a GPU in Accelerate; its scaler and its way of stepping do not."""

    class Spoiled(Net):
        calls = 0

        def forward(self, x, labels):
            out = super().forward(x, labels)
            Spoiled.calls += 1
            return {**out, "loss": out["loss"] * torch.inf} if Spoiled.calls in (3, 4, 9) else out

    callback = PruningCallback(CONFIG, **WINDOW)
    optim = "adamw_torch_fused" if fused else "adamw_torch"
    more = {"optim": optim, "max_grad_norm": 0.0, "logging_nan_inf_filter": False}
    torch.manual_seed(0)
    trainer = Trainer(Spoiled(), arguments(tmp_path, **more), train_dataset=data(), callbacks=[callback])
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    trainer.train()
    assert trainer.state.global_step == 20
    assert callback.pruner.step == 17
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert zeros(trainer.model) == pytest.approx(0.8, abs=1e-3)


def test_a_ready_pruner_is_used_and_used_again(tmp_path):
    pruner = Pruning(CONFIG)
    callback = PruningCallback(pruner, **WINDOW)
    for _ in range(2):
        trainer = trained(callback, tmp_path)
        assert callback.pruner is pruner
        trainer.optimizer.step()  # after the end, nothing counts any more
        assert pruner.step == 20
        assert pruner.report().groups[0].reached == pytest.approx(0.8, abs=1e-3)


def test_each_run_of_one_callback_has_a_fresh_pruner(tmp_path):
    callback = PruningCallback(CONFIG, **WINDOW)
    first, pruner = trained(callback, tmp_path), callback.pruner
    second = trained(callback, tmp_path)
    assert callback.pruner is not pruner
    assert same_weights(first.model, second.model)
    second.train()  # the same Trainer again
    assert callback.pruner.step == 20


class Broken(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            raise KeyboardInterrupt


@pytest.mark.parametrize("ready", [False, True])
def test_a_run_that_broke_off_leaves_nothing_in_the_way(tmp_path, ready):
    callback = PruningCallback(Pruning(CONFIG) if ready else CONFIG, **WINDOW)
    torch.manual_seed(0)
    trainer = Trainer(Net(), arguments(tmp_path), train_dataset=data(), callbacks=[callback, Broken()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(Broken)
    trainer.train()
    assert callback.pruner.step == 20
    assert zeros(trainer.model) == pytest.approx(0.8, abs=1e-3)


# ---- logs and reports ------------------------------------------------------------------------------------------------


class Seen(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def test_training_logs_hold_the_sparsity(tmp_path):
    callback, seen = PruningCallback(CONFIG, **WINDOW), Seen()
    trainer = trained(callback, tmp_path, others=[seen], eval_strategy="steps", eval_steps=10)
    for logs in (trainer.state.log_history, seen.logs):
        shares = [each["sparsity"] for each in logs if "loss" in each]
        assert len(shares) == 4
        assert shares == sorted(shares)
        assert 0 < shares[0] < 0.7
        assert shares[-1] == pytest.approx(zeros(trainer.model), abs=1e-9)
    assert not [each for each in trainer.state.log_history if "eval_loss" in each and "sparsity" in each]


def test_the_logged_sparsity_is_that_of_this_run(tmp_path):
    callback, shares = PruningCallback({"pruning_type": "pattern_lock", "op_names": ["hidden"]}), []
    for every in (2, 4):
        model = Net()
        with torch.no_grad():
            model.hidden.weight[:, ::every] = 0
        shares.append(trained(callback, tmp_path, model=model).state.log_history[0]["sparsity"])
    assert shares == [0.5, 0.25]


def test_a_report_is_written_at_the_end(tmp_path):
    pytest.importorskip("matplotlib")
    trained(PruningCallback(CONFIG, **WINDOW), tmp_path)
    assert json.loads((tmp_path / "pruning_report.json").read_text())["groups"][0]["reached"] == 0.8
    assert "reached 80.00%" in (tmp_path / "pruning_report.md").read_text()
    assert (tmp_path / "pruning_report.png").stat().st_size > 3000


def test_without_matplotlib_the_picture_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.warns(UserWarning, match=r"^pruning_report\.png: not drawn; plot: needs matplotlib"):
        trained(PruningCallback(CONFIG, **WINDOW), tmp_path)
    assert (tmp_path / "pruning_report.md").exists()
    assert not (tmp_path / "pruning_report.png").exists()


def test_a_run_that_stops_early_says_so(tmp_path):
    with pytest.warns(UserWarning, match="stopped at step 9 of end_step 14"):
        trained(PruningCallback(CONFIG, **WINDOW), tmp_path, others=[StopAfter(9)])


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def test_zeros_are_zero_in_the_saved_model(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForSequenceClassification(BertConfig(vocab_size=50, max_position_embeddings=16, **sizes))
    words = torch.randint(0, 50, (32, 8), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "labels": int(row[0] > 25)} for row in words]
    callback = PruningCallback({**CONFIG, "op_names": ["encoder"], "pattern": "4x1"}, **WINDOW)
    args = arguments(tmp_path, max_steps=10, save_strategy="steps", save_steps=10)
    Trainer(model, args, train_dataset=rows, callbacks=[callback]).train()
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-10").state_dict()
    masks = callback.pruner.masks()
    assert len(masks) == 6
    for name, mask in masks.items():
        assert not loaded[name][~mask].any()
        assert torch.equal(loaded[name] != 0, mask)
    share = sum(int((~mask).sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())
    assert share == pytest.approx(0.8, abs=2e-3)


SAVING = {"save_strategy": "steps", "save_steps": 7}


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize("kind", ["snip_momentum", "magnitude_progressive", "gradient"])
def test_a_resumed_run_is_the_uninterrupted_run(tmp_path, kind, optim):
    """Step 7 is amid the window and amid an epoch of 6 updates."""
    more = {**SAVING, "optim": optim, "gradient_accumulation_steps": 2}
    config = {**CONFIG, "pruning_type": kind, "pruning_frequency": 4}
    whole = PruningCallback(config, **WINDOW)
    model = trained(whole, tmp_path, **more).model
    assert not checkpoint.load(tmp_path / "checkpoint-7/pruner.pt")["best_is_early"]
    again = PruningCallback(config, **WINDOW)
    resumed = trained(again, tmp_path, resume=str(tmp_path / "checkpoint-7"), **more)
    assert resumed.state.global_step == again.pruner.step == 20
    assert same_weights(model, resumed.model)
    assert same_masks(whole.pruner, again.pruner)


def test_resume_true_takes_the_last_checkpoint(tmp_path):
    with pytest.warns(UserWarning, match="stopped at step 8"):
        trained(PruningCallback(CONFIG, **WINDOW), tmp_path, others=[StopAfter(8)], **SAVING)
    callback = PruningCallback(CONFIG, **WINDOW)
    resumed = trained(callback, tmp_path, resume=True, **SAVING)
    whole = trained(PruningCallback(CONFIG, **WINDOW), tmp_path / "whole")
    assert same_weights(whole.model, resumed.model)


def test_a_longer_resumed_run_keeps_its_window(tmp_path):
    trained(PruningCallback(CONFIG, **WINDOW), tmp_path, **SAVING)
    callback = PruningCallback(CONFIG, **WINDOW)
    trained(callback, tmp_path, resume=str(tmp_path / "checkpoint-7"), **{**SAVING, "max_steps": 30})
    assert callback.pruner.config.pruners[0].end_step == 14
    assert callback.pruner.step == 30


def test_resume_from_another_folder_and_from_one_that_was_moved(tmp_path):
    """A file of the same step that another run left in the output folder is not taken for ours."""
    whole = trained(PruningCallback(CONFIG, **WINDOW), tmp_path / "first", **SAVING)
    trained(PruningCallback({**CONFIG, "pattern": "4x1"}, **WINDOW), tmp_path / "second", **SAVING)
    source = tmp_path / "first/checkpoint-7"
    resumed = trained(PruningCallback(CONFIG, **WINDOW), tmp_path / "second", resume=str(source))
    assert same_weights(whole.model, resumed.model)
    moved = str(tmp_path / "moved")
    shutil.move(source, moved)
    with pytest.raises(ValueError, match=r"^pruner\.pt: the pruner's state at step 7 is missing, got none"):
        trained(PruningCallback(CONFIG, **WINDOW), tmp_path / "third", resume=moved)
    named = trained(PruningCallback(CONFIG, **WINDOW), tmp_path / "third", resume=moved, resume_from_checkpoint=moved)
    assert same_weights(whole.model, named.model)


def test_a_run_that_saves_nothing_leaves_older_checkpoints_alone(tmp_path):
    trained(PruningCallback(CONFIG, **WINDOW), tmp_path, **SAVING)
    files = {path: path.read_bytes() for path in tmp_path.glob("checkpoint-*/*.pt")}
    assert tmp_path / "checkpoint-20/pruner.pt" in files
    trained(PruningCallback({**CONFIG, "target_sparsity": 0.5}, **WINDOW), tmp_path)
    assert all(path.read_bytes() == content for path, content in files.items())


def test_a_checkpoint_without_the_pruner_is_an_error_not_a_fresh_start(tmp_path):
    trained(StopAfter(99), tmp_path, **SAVING)  # dense
    with pytest.raises(ValueError, match="begin anew from its weights with from_pretrained") as error:
        trained(PruningCallback(CONFIG, **WINDOW), tmp_path, resume=True, **SAVING)
    assert "\n" not in str(error.value)


def test_another_configuration_is_refused(tmp_path):
    trained(PruningCallback(CONFIG, **WINDOW), tmp_path, **SAVING)
    with pytest.raises(ValueError, match=r"pruning_configs\[0\]\.target_sparsity was 0.8, got 0.7"):
        trained(PruningCallback({**CONFIG, "target_sparsity": 0.7}, **WINDOW), tmp_path, resume=True, **SAVING)


@pytest.mark.parametrize("event", ["on_step_begin", "on_pre_optimizer_step", "on_step_end", "on_epoch_end"])
def test_a_checkpoint_just_in_time_resumes(tmp_path, event, monkeypatch):
    """``enable_jit_checkpoint`` saves amid a step, without ``on_save``; what dropout drew in that step is gone."""
    jit = pytest.importorskip("transformers.trainer_jit_checkpoint")
    monkeypatch.setattr(jit.CheckpointManager, "setup_signal_handler", lambda self: None)

    class Killed(TrainerCallback):  # stands before the Trainer's own callback
        def at(self, args, state, control, **kwargs):
            if state.global_step in (8, 12):  # 12: the end of an epoch
                manager.is_checkpoint_requested = True

    setattr(Killed, event, Killed.at)
    nets = [Net(dropout=0.0) for _ in range(3)]
    for net in nets[1:]:
        net.load_state_dict(nets[0].state_dict())
    args = arguments(tmp_path, enable_jit_checkpoint=True)
    trainer = Trainer(nets[0], args, train_dataset=data(), callbacks=[PruningCallback(CONFIG, **WINDOW)])
    callbacks = trainer.callback_handler.callbacks
    manager = next(each.jit_manager for each in callbacks if isinstance(each, jit.JITCheckpointCallback))
    callbacks.insert(0, Killed())
    with pytest.warns(UserWarning, match="stopped at step"):
        trainer.train()
    whole = trained(PruningCallback(CONFIG, **WINDOW), tmp_path / "whole", model=nets[1])
    (source,) = map(str, tmp_path.glob("checkpoint-*"))
    resumed = trained(PruningCallback(CONFIG, **WINDOW), tmp_path, resume=source, model=nets[2])
    assert same_weights(whole.model, resumed.model)


# ---- the best model --------------------------------------------------------------------------------------------------

BEST = {
    **{"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2},
    **{"load_best_model_at_end": True, "metric_for_best_model": "score", "greater_is_better": True},
}


class Scores:
    """Falls from the first evaluation on, and has a small peak at the step asked for."""

    def __init__(self, peak, begin=0):
        self.peak, self.step = peak, begin

    def __call__(self, predictions):
        self.step += 2
        return {"score": 1.0 if self.step < 14 else 0.5 if self.step == self.peak else 0.1}


def test_the_best_model_is_one_at_the_target(tmp_path):
    callback = PruningCallback(CONFIG, **WINDOW)
    trainer = trained(callback, tmp_path, compute_metrics=Scores(16), **BEST)
    assert trainer.state.best_global_step == 16
    assert trainer.state.best_metric == 0.5
    assert zeros(trainer.model) == callback.pruner.report().groups[0].reached == pytest.approx(0.8, abs=1e-3)


def test_a_resumed_run_knows_that_its_best_model_was_too_early(tmp_path):
    more = {**BEST, "eval_steps": 3, "save_steps": 3}
    early = {"compute_metrics": lambda predictions: {"score": 1.0}}
    trained(PruningCallback(CONFIG, **WINDOW), tmp_path, **early, **more)
    assert checkpoint.load(tmp_path / "checkpoint-12/pruner.pt")["best_is_early"]
    assert not checkpoint.load(tmp_path / "checkpoint-15/pruner.pt")["best_is_early"]
    late = {"compute_metrics": lambda predictions: {"score": 0.5}}
    source = str(tmp_path / "checkpoint-12")
    trainer = trained(PruningCallback(CONFIG, **WINDOW), tmp_path, resume=source, **late, **more)
    assert trainer.state.best_global_step == 15
    assert zeros(trainer.model) == pytest.approx(0.8, abs=1e-3)


# ---- wrong use -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"warmup": 0.6, "cooldown": 0.4}, r"^cooldown: warmup \+ cooldown leave no step to prune in, got 0.6 \+ 0.4;"),
        ({"warmup": -0.1}, r"^warmup: must be a share of the run, got -0.1; give a number from 0 to below 1$"),
        ({"cooldown": 1}, r"^cooldown: must be a share of the run, got 1;"),
        ({"cooldown": True}, r"^cooldown: must be a share of the run, got True;"),
        ({"warmup": "0.1"}, r"^warmup: must be a share of the run, got '0.1';"),
        ({"warmup": float("nan")}, r"^warmup: must be a share of the run, got nan;"),
    ],
)
def test_shares_that_cannot_be(shares, message):
    with pytest.raises(ValueError, match=message):
        PruningCallback(CONFIG, **shares)


def test_a_wrong_configuration_is_an_error_at_once():
    with pytest.raises(ValueError, match="target_sparsty: unknown option"):
        PruningCallback({"target_sparsty": 0.8})


@pytest.mark.parametrize("missing", ["model", "optimizer"])
def test_nothing_to_attach_to(tmp_path, missing):
    model = Net()
    given = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), missing: None}
    with pytest.raises(ValueError, match=f"^PruningCallback: needs the {missing} of a Trainer, got None;"):
        PruningCallback(CONFIG).on_train_begin(arguments(tmp_path), TrainerState(), TrainerControl(), **given)


def test_an_optimizer_of_another_model(tmp_path):
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(Net().parameters(), lr=0.1)
    both = (optimizer, LambdaLR(optimizer, lambda step: 1.0))
    callback = PruningCallback(CONFIG, **WINDOW)
    trainer = Trainer(Net(), arguments(tmp_path), train_dataset=data(), callbacks=[callback], optimizers=both)
    with pytest.raises(ValueError, match="the optimizers hold none of the pruned weights"):
        trainer.train()


def test_a_target_behind_the_last_step_is_said_before_training(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained(PruningCallback({**CONFIG, "end_step": 50}), tmp_path)
    assert any("50 lies after the last of 20 optimizer steps" in str(each.message) for each in caught)


# ---- two processes ---------------------------------------------------------------------------------------------------


def of_two(folder: Path) -> None:
    """What both processes run: a whole run, then one from its checkpoint."""
    results = {}
    for name, resume in (("whole", None), ("resumed", str(folder / "checkpoint-7"))):
        callback = PruningCallback(CONFIG, **WINDOW)
        trainer = trained(callback, folder, resume=resume, ddp_backend="gloo", **SAVING)
        results[name] = {"model": trainer.model.state_dict(), "masks": callback.pruner.masks()}
    results["sharded"] = sharded(folder / "sharded")
    checkpoint.save(results, folder / f"rank-{trainer.args.process_index}.pt")


def sharded(folder):
    """The Trainer shards on accelerators only: here its events are called by hand. Are both runs the same?"""
    args, control, weights, ends = arguments(folder), TrainerControl(), {}, []
    for resume in (False, True):
        torch.manual_seed(0)
        model = fully_shard(Net(dropout=0.0))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if resume:
            model.load_state_dict(weights)
            state = TrainerState.load_from_json(folder / "checkpoint-7/trainer_state.json")
        else:
            state = TrainerState(max_steps=20)
        callback = PruningCallback(CONFIG, **WINDOW)
        callback.on_train_begin(args, state, control, model=model, optimizer=optimizer)
        for step in range(state.global_step, 20):
            batch = default_data_collator(data()[step : step + 4])
            model(**batch)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            state.global_step += 1
            callback.on_step_end(args, state, control)
            if state.global_step == 7 and not resume:
                weights = {name: weight.clone() for name, weight in model.state_dict().items()}
                if args.should_save:
                    (folder / "checkpoint-7").mkdir(parents=True)
                    state.save_to_json(folder / "checkpoint-7/trainer_state.json")
                torch.distributed.barrier()
                callback.on_save(args, state, control)
                torch.distributed.barrier()
        logs = {"loss": 1.0}
        callback.on_log(args, state, control, logs=logs)
        callback.on_train_end(args, state, control)
        ends.append((logs, callback.pruner.masks(), [p.to_local() for p in model.parameters()]))
    (logs, masks, one), (again_logs, again_masks, two) = ends
    same = all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    same &= all(torch.equal(masks[name], again_masks[name]) for name in masks)
    return {"same": same and logs == again_logs, "sparsity": logs["sparsity"]}


@pytest.mark.slow
def test_two_processes(tmp_path):
    code = f"from pathlib import Path; from {__name__} import of_two; of_two(Path({str(tmp_path)!r}))"
    (tmp_path / "worker.py").write_text(f"import torch\ntorch.set_num_threads(1)\n{code}\n")
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = {"OMP_NUM_THREADS": "1", "MKL_CBWR": "COMPATIBLE", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command.append(str(tmp_path / "worker.py"))
    done = subprocess.run(
        command, check=False, env={**os.environ, **settings}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-6000:]
    left, right = (checkpoint.load(tmp_path / f"rank-{rank}.pt") for rank in range(2))
    for name, weight in left["whole"]["model"].items():
        for other in (right["whole"], left["resumed"], right["resumed"]):
            assert torch.equal(weight, other["model"][name])
    for name, mask in left["whole"]["masks"].items():
        assert not left["whole"]["model"][name][~mask].any()
    assert sum(int((~m).sum()) for m in left["whole"]["masks"].values()) == 512
    assert not list(tmp_path.glob("checkpoint-*/pruner-*.pt"))  # one file, by rank 0
    assert left["sharded"] == right["sharded"] == {"same": True, "sparsity": 0.8}
    assert (tmp_path / "sharded/pruning_report.md").exists()
    assert {path.name for path in tmp_path.glob("sharded/checkpoint-7/*.pt")} == {"pruner.pt", "pruner-1.pt"}
