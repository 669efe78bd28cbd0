"""A run of the Transformers apps that goes on ends with the model of one that never stopped, bit for bit."""

import csv
import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from apps.common.finetune import build, loop, processes, results, state
from pruning_core import checkpoint
from pruning_core.masks.report import SparsityReport
from tests.support import finetune_apps as apps

ROWS, HELD_OUT, BATCH = 46, 11, 4  # 12 batches an epoch, the last one of 2 rows
STEPS = 12  # 2 epochs of 6 steps of 2 batches; masks change in steps 3 to 9
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
WILD = {"initializer_range": 0.3}
BOTH = pytest.mark.parametrize("app", apps.APPS)
EXACT = ("model.safetensors", "config.json", "pruning_report.json")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    for app in apps.APPS:
        rows = apps.reviews if app == "text_classification" else apps.questions
        apps.write(folder / app / "train.jsonl", rows(ROWS))
        apps.write(folder / app / "validation.jsonl", rows(HELD_OUT, seed=1))
        apps.save_model(folder / app / "bert", app, **DROPOUT, **WILD)
        apps.save_model(folder / app / "teacher", app, seed=1, **WILD)
    return folder


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    """Drawing takes longer than the training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "plot_curves", lambda *_, **__: None)
        patch.setattr(SparsityReport, "plot", lambda *_: None)
        yield


def words(place: Path, app: str, output: Path, *more: str, **options: object) -> list[str]:
    start: dict[str, object] = {"model_name_or_path": place / app / "bert", "per_device_train_batch_size": BATCH}
    start |= {"num_train_epochs": 2, "gradient_accumulation_steps": 2, "warm_epochs": 0.5, "cooldown_epochs": 0.5}
    start |= {"dist_loss": "kl", "teacher_model_name_or_path": place / app / "teacher", "pruning_frequency": 1}
    start |= {"max_seq_length": 64, "doc_stride": 16} if app == "qa" else {"max_length": 64}
    files = place / app / "train.jsonl", place / app / "validation.jsonl"
    return apps.arguments(*files, output, "--do_prune", *more, **{**start, **options})


def go_on(place: Path, app: str, folder: Path, output: Path | None = None, *more: str) -> int:
    elsewhere = [] if output is None else [f"--output_dir={output}"]
    return apps.main(app, [f"--resume_from_checkpoint={folder}", *elsewhere, *more])


@pytest.fixture(scope="module")
def whole(place) -> dict[str, Path]:
    """Of each app a run that was never stopped, saved at every step; and one saved at every epoch."""
    for app in apps.APPS:
        assert apps.main(app, words(place, app, place / app / "whole", checkpointing_steps=1)) == 0
    return {app: place / app / "whole" for app in apps.APPS}


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open() as file:
        return [{name: value for name, value in row.items() if name != "time"} for row in csv.DictReader(file)]


def summary(folder: Path) -> dict[str, float]:
    found = json.loads((folder / "all_results.json").read_text())
    return {name: value for name, value in found.items() if name != "seconds"}


def assert_same(one: Path, other: Path, *, predictions: bool = True) -> None:
    names = [*EXACT, *(path.name for path in one.glob("*predictions.json") if predictions)]
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert rows(one) == rows(other)
    assert summary(one) == summary(other)


def digest(masks: dict[str, Tensor]) -> str:
    return hashlib.sha256(b"".join(mask.numpy().tobytes() for mask in masks.values())).hexdigest()


def leaves(value: object, where: str = ""):
    if isinstance(value, dict):
        for key, each in value.items():
            yield from leaves(each, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for i, each in enumerate(value):
            yield from leaves(each, f"{where}.{i}")
    else:
        yield where, value


def assert_same_state(one: Path, other: Path) -> None:
    """Everything that a checkpoint holds, but where it lies and how long it took."""
    for name in ("state.pt", "rank_0.pt"):
        pair = [dict(leaves(checkpoint.load(folder / name))) for folder in (one, other)]
        assert pair[0].keys() == pair[1].keys()
        for key, value in pair[0].items():
            if not key.startswith(".options.") and not key.endswith((".seconds", ".time")):
                same = torch.equal(value, pair[1][key]) if isinstance(value, Tensor) else value == pair[1][key]
                assert same, (name, key)


# ---- bit for bit ----------------------------------------------------------------------------------------------------


@BOTH
def test_the_uninterrupted_run_is_worth_comparing_with(whole, app):
    assert sorted(path.name for path in whole[app].glob("step_*")) == sorted(f"step_{i}" for i in range(1, STEPS))
    pruned = [checkpoint.load(whole[app] / f"step_{i}/state.pt")["model"] for i in (3, 6, 9)]
    zeros = [sum(int((value == 0).sum()) for name, value in each.items() if ".layer." in name) for each in pruned]
    assert zeros[0] < zeros[1] < zeros[2]
    assert summary(whole[app])["sparsity"] == pytest.approx(0.8, abs=1e-3)
    assert len({row["train/dist_logits"] for row in rows(whole[app])}) == 2


QUICK = (1, 5, 6, 7, 11)


@BOTH
@pytest.mark.parametrize(
    "step", [i if i in QUICK else pytest.param(i, marks=pytest.mark.slow) for i in range(1, STEPS)]
)
def test_from_every_step(place, whole, tmp_path, app, step):
    """Steps 6 and 12 end an epoch: 6 was saved before the epoch was scored, 12 is the end."""
    more = () if step == 1 else ("--checkpointing_steps=epoch",)
    assert go_on(place, app, whole[app] / f"step_{step}", tmp_path / "out", *more) == 0
    assert_same(whole[app], tmp_path / "out")
    if step == 1:
        for i in range(2, STEPS):
            assert_same_state(whole[app] / f"step_{i}", tmp_path / f"out/step_{i}")


@BOTH
def test_from_every_epoch(place, whole, tmp_path, app):
    """The second is the last: what was trained is written once more."""
    assert apps.main(app, words(place, app, tmp_path / "epochs", checkpointing_steps="epoch")) == 0
    assert_same(whole[app], tmp_path / "epochs")
    assert go_on(place, app, tmp_path / "epochs/epoch_1", tmp_path / "out") == 0
    assert_same(whole[app], tmp_path / "out")
    (tmp_path / "epochs/model.safetensors").unlink()
    assert go_on(place, app, tmp_path / "epochs/epoch_2") == 0
    for name in ("model.safetensors", "pruning_report.json"):
        assert (tmp_path / "epochs" / name).read_bytes() == (whole[app] / name).read_bytes()
    assert summary(tmp_path / "epochs") == summary(whole[app]) and rows(tmp_path / "epochs") == rows(whole[app])


@pytest.mark.parametrize("elsewhere", [False, True])
def test_from_the_last_epoch_everything_is_written(place, whole, tmp_path, elsewhere):
    assert apps.main("qa", words(place, "qa", tmp_path / "epochs", checkpointing_steps="epoch")) == 0
    out = tmp_path / ("elsewhere" if elsewhere else "epochs")
    assert go_on(place, "qa", tmp_path / "epochs/epoch_2", out) == 0
    assert rows(out) == rows(whole["qa"])
    assert elsewhere or (out / "predictions.json").read_bytes() == (whole["qa"] / "predictions.json").read_bytes()


def test_the_tokenizer_is_the_same_whether_rows_were_cached(place, tmp_path):
    app = "text_classification"
    for name, more in (("fresh", ["--overwrite_cache"]), ("cached", [])):
        assert (
            apps.main(
                app, words(place, app, tmp_path / name, *more, max_train_steps=2, warm_epochs=0, cooldown_epochs=0)
            )
            == 0
        )
    fresh, cached = ((tmp_path / name / "tokenizer.json").read_bytes() for name in ("fresh", "cached"))
    assert fresh == cached


def test_masks_are_put_back_too(place, whole, tmp_path, monkeypatch):
    """Those that the pruner holds, which need not be those of the weights."""
    app, train, seen = "qa", build.train, {}

    def look(run, *rest):
        seen["loaded"] = digest(run.pruner.masks())
        code = train(run, *rest)
        seen["at the end"] = digest(run.pruner.masks())
        return code

    monkeypatch.setattr(build, "train", look)
    assert apps.main(app, words(place, app, tmp_path / "whole")) == 0
    begun = dict(seen)
    assert go_on(place, app, whole[app] / "step_5", tmp_path / "out") == 0
    assert seen["at the end"] == begun["at the end"] and seen["loaded"] not in begun.values()


def test_it_goes_on_where_it_was_and_without_a_name_with_the_latest(place, whole, tmp_path, capsys):
    app = "qa"
    for i in (2, 7):
        shutil.copytree(whole[app] / f"step_{i}", tmp_path / f"run/step_{i}")
    os.utime(tmp_path / "run/step_2/state.pt", (1, 1))
    assert apps.main(app, ["--resume_from_checkpoint", f"--output_dir={tmp_path / 'run'}"]) == 0
    assert f"going on with {tmp_path / 'run/step_7'} after optimizer step 7" in capsys.readouterr().out
    assert_same(whole[app], tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").glob("step_*")} == {"step_2", *(f"step_{i}" for i in range(7, 12))}


def test_resumed_twice(place, whole, tmp_path):
    """The second time from a checkpoint that the resumed run wrote."""
    assert go_on(place, "qa", whole["qa"] / "step_2", tmp_path / "once") == 0
    assert go_on(place, "qa", tmp_path / "once/step_8", tmp_path / "twice") == 0
    assert_same(whole["qa"], tmp_path / "twice")


# ---- signals and kills ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(  # in a step and at its end, at the end of an epoch, in the next one
    ("app", "batch"), [("qa", 5), ("text_classification", 6), ("qa", 12), ("text_classification", 13)]
)
def test_ctrl_c_saves_and_says_how_to_go_on(place, whole, tmp_path, monkeypatch, capsys, app, batch):
    original, seen = loop.losses, []

    def losses(run, each):
        seen.append(each)
        if len(seen) == batch:
            os.kill(os.getpid(), signal.SIGINT)
        return original(run, each)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "losses", losses)
        assert apps.main(app, words(place, app, tmp_path / "out")) == 128 + signal.SIGINT
    step = -(-batch // 2)
    printed = capsys.readouterr().out
    assert f"stopped after optimizer step {step}; everything is saved. Go on with:" in printed
    assert f"  --resume_from_checkpoint {tmp_path / 'out' / f'step_{step}'}\n" in printed
    assert not (tmp_path / "out/model.safetensors").exists()
    assert go_on(place, app, tmp_path / f"out/step_{step}") == 0
    assert_same(whole[app], tmp_path / "out")


def test_a_signal_during_the_scoring_of_an_epoch(place, whole, tmp_path, monkeypatch):
    """The epoch is written down, and not scored again."""
    original, seen = loop.evaluate, []

    def evaluate(run):
        seen.append(run.progress.step)
        if len(seen) == 2:  # the first one is that of the dense model
            os.kill(os.getpid(), signal.SIGTERM)
        return original(run)

    monkeypatch.setattr(loop, "evaluate", evaluate)
    assert apps.main("qa", words(place, "qa", tmp_path / "out")) == 128 + signal.SIGTERM
    assert go_on(place, "qa", tmp_path / "out/step_6") == 0
    assert seen == [0, 6, 12]
    assert_same(whole["qa"], tmp_path / "out")


def test_a_signal_in_the_last_step_changes_nothing(place, whole, tmp_path, monkeypatch):
    original = loop.losses

    def losses(run, batch):
        if run.progress.step == STEPS - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(run, batch)

    monkeypatch.setattr(loop, "losses", losses)
    assert apps.main("qa", words(place, "qa", tmp_path / "out")) == 0
    assert_same(whole["qa"], tmp_path / "out")


SLOWLY = """
import sys, time
from tests.support import finetune_apps
from apps.common.finetune import loop
original = loop.losses
loop.losses = lambda run, batch: (time.sleep(0.1), original(run, batch))[1]
sys.exit(finetune_apps.main("qa", sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_real_signal_and_a_kill(place, whole, tmp_path, number):
    """SIGTERM saves; after kill -9 what was trained since the last save is trained again, to the same weights."""
    code = SLOWLY
    cadence = {"checkpointing_steps": 3 if number == signal.SIGKILL else None}
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words(place, "qa", tmp_path / "out", **cadence)],
        env=apps.ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    seen = ""
    for line in process.stdout:
        seen += line
        if line.startswith("dense:"):
            break
    while number == signal.SIGKILL and not (tmp_path / "out/step_3").is_dir() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    seen += process.communicate(timeout=120)[0]
    assert process.returncode == (128 + number if number == signal.SIGTERM else -number), seen
    assert ("everything is saved" in seen) == (number == signal.SIGTERM) and "Traceback" not in seen, seen
    assert apps.main("qa", ["--resume_from_checkpoint", f"--output_dir={tmp_path / 'out'}"]) == 0
    assert_same(whole["qa"], tmp_path / "out")


class Killed(BaseException):
    """As a kill: nothing catches it."""


@pytest.mark.parametrize("files", [0, 1, 2])
def test_a_kill_during_saving_leaves_the_earlier_checkpoints(place, whole, tmp_path, monkeypatch, files):
    """After no file, after that of the rank, after both: before the folder has its name."""
    save, folder, seen = checkpoint.save, tmp_path / "out", []

    def stop(content, path):
        if "step_4" in str(path):
            if len(seen) == files:
                raise Killed
            seen.append(path)
        save(content, path)

    def rename(path, target):
        if target.name == "step_4":
            raise Killed
        return original(path, target)

    original = Path.rename
    with monkeypatch.context() as patch:
        patch.setattr(state.checkpoint, "save", stop)
        patch.setattr(Path, "rename", rename)
        with pytest.raises(Killed):
            apps.main("qa", words(place, "qa", folder, checkpointing_steps=2))
    assert len(seen) == files
    assert [path.name for path in folder.glob("[!.]*_*") if path.is_dir()] == ["step_2"]
    assert go_on(place, "qa", folder / "step_2") == 0
    assert_same(whole["qa"], folder)
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == sorted(
        f"step_{i}" for i in (2, 4, 6, 8, 10)
    )
    assert go_on(place, "qa", folder / "step_4", tmp_path / "again") == 0
    assert_same(whole["qa"], tmp_path / "again")


def test_a_kill_while_a_step_is_saved_again_leaves_one_of_them(place, whole, tmp_path, monkeypatch):
    """Ctrl-C in a step that --checkpointing_steps has saved already."""
    folder = tmp_path / "run/step_4"
    shutil.copytree(whole["qa"] / "step_4", folder)

    def rename(path, target):
        raise Killed

    train = build.train

    def save_again(run, *rest):
        monkeypatch.setattr(Path, "rename", rename)
        state.save(run, folder)
        return train(run, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(build, "train", save_again)
        with pytest.raises(Killed):
            go_on(place, "qa", folder)
    monkeypatch.undo()
    assert (folder / "state.pt").is_file()


# ---- what is refused, and what is said ------------------------------------------------------------------------------


class Runs:
    """Pickled, it leaves a mark where it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["state.pt", "rank_0.pt"])
def test_nothing_is_unpickled(place, whole, tmp_path, capsys, name):
    folder, mark = tmp_path / "run/step_5", tmp_path / "mark"
    shutil.copytree(whole["qa"] / "step_5", folder)
    torch.save({**checkpoint.load(folder / name), "more": Runs(mark)}, folder / name)
    assert go_on(place, "qa", folder) == 2
    assert "holds an object" in capsys.readouterr().err
    (folder / name).write_bytes(pickle.dumps(Runs(mark)))
    assert go_on(place, "qa", folder) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not mark.exists()


def changed(whole: Path, folder: Path, **options: object) -> Path:
    """A copy of a checkpoint that says something else."""
    shutil.copytree(whole / "step_5", folder)
    checkpoint.save({**checkpoint.load(folder / "state.pt"), **options}, folder / "state.pt")
    return folder


def test_another_number_of_ranks_is_refused(place, whole, tmp_path, capsys):
    """An epoch would have another number of steps."""
    folder = changed(whole["qa"], tmp_path / "run/step_5", ranks=2)
    assert go_on(place, "qa", folder) == 2
    assert "--resume_from_checkpoint: begun on 2 ranks, got 1; use as many\n" in capsys.readouterr().err


def test_a_checkpoint_of_something_else_is_refused(place, whole, tmp_path, capsys):
    folder = changed(whole["qa"], tmp_path / "run/step_5", precision="bf16")
    assert go_on(place, "qa", folder) == 2
    assert "--mixed_precision: this run was begun in bf16, got fp32" in capsys.readouterr().err
    assert go_on(place, "text_classification", whole["qa"] / "step_5") == 2
    assert "no state of a text_classification run" in capsys.readouterr().err
    assert go_on(place, "qa", whole["qa"] / "step_5", tmp_path / "out", "--learning_rate=0.5") == 2
    assert "--learning_rate: this run was begun with 0.001, got 0.5" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_data_are_refused(place, whole, tmp_path, capsys):
    file = place / "qa/train.jsonl"
    before = file.read_text()
    try:
        apps.write(file, apps.questions(ROWS, seed=3))
        assert go_on(place, "qa", whole["qa"] / "step_5", tmp_path / "out") == 2
    finally:
        file.write_text(before)
    assert "the data have changed: training windows was" in capsys.readouterr().err


# ---- fp16 -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Seems like `optimizer.step")  # see test_finetune_train.py
def test_the_scale_of_fp16_is_put_back(place, tmp_path, monkeypatch):
    """A scaler that skipped step 1 and doubles its scale every 3 steps."""
    begin_as_ever, original, seen, scales = processes.begin, loop.losses, [], {}

    def begin(options):
        accelerator, ranks = begin_as_ever(options)
        accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
        return accelerator, ranks

    def losses(run, batch):
        loss, parts = original(run, batch)
        seen.append(batch)
        scales.setdefault(run.progress.step, run.accelerator.scaler.get_scale())
        return loss * (float("inf") if len(seen) == 3 else 1.0), parts

    monkeypatch.setattr(processes, "begin", begin)
    monkeypatch.setattr(loop, "losses", losses)
    assert apps.main("qa", words(place, "qa", tmp_path / "whole", checkpointing_steps=5)) == 0
    begun = dict(scales)
    assert [begun[step] for step in (0, 2, 5, 8)] == [64, 32, 64, 128]
    for step in (5, 10):
        scales.clear()
        assert go_on(place, "qa", tmp_path / f"whole/step_{step}", tmp_path / f"{step}") == 0
        assert scales == {key: value for key, value in begun.items() if key >= step}
        assert_same(tmp_path / "whole", tmp_path / f"{step}")
