"""The Transformers apps on two ranks of the CPU, DDP and FSDP2: one model, rows counted once, going on to the bit."""

import csv
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from apps.common.finetune import processes, results
from pruning_core import checkpoint
from pruning_core.masks.report import SparsityReport
from tests.support import ROOT
from tests.support import finetune_apps as apps

pytestmark = pytest.mark.slow
ROWS, HELD_OUT, BATCH = 23, 11, 2  # 12 batches, the last one of 1 row; 6 of each rank: 3 steps of 2 an epoch
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
WILD = {"initializer_range": 0.3}
WEIGHTS = 2 * (4 * 16 * 16 + 2 * 16 * 32)
BOTH = pytest.mark.parametrize("app", apps.APPS)
NO_GRADIENT = ("key.bias", "layer.1.output.LayerNorm.bias", "qa_outputs.bias")  # each shifts all inputs of a softmax
PIPED = {"cwd": apps.ROOT, "capture_output": True, "text": True, "timeout": 300}
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def words(place: Path, app: str, name: str, *more: str, **options: object) -> list[str]:
    start: dict[str, object] = {"model_name_or_path": place / app / "bert", "per_device_train_batch_size": BATCH}
    start |= {"per_device_eval_batch_size": 4, "num_train_epochs": 3, "gradient_accumulation_steps": 2}
    start |= {"learning_rate": 0.01, "dist_loss": "kl", "cooldown_epochs": 1, "pruning_frequency": 1}
    start |= {"max_seq_length": 64, "doc_stride": 16} if app == "qa" else {"max_length": 64, "max_grad_norm": 1000}
    files = place / app / "train.jsonl", place / app / "validation.jsonl"
    return apps.arguments(*files, place / app / name, "--do_prune", *more, **{**start, **options})


def go_on(place: Path, app: str, name: str, output: str) -> list[str]:
    return [f"--resume_from_checkpoint={place / app / name}", f"--output_dir={place / app / output}"]


def plan(place: Path, app: str) -> list[dict]:
    """What runs under one torchrun: (words, sharded, the batch in which rank 1 gets a signal) and its exit code."""
    every = {"checkpointing_steps": 1}
    runs = [
        (words(place, app, "ddp", **every), False, 0),
        (go_on(place, app, "ddp/step_2", "ddp2"), False, 0),
        (go_on(place, app, "ddp/step_5", "ddp5"), False, 0),
        (words(place, app, "stopped"), False, 7),
        (go_on(place, app, "stopped/step_4", "stopped"), False, 0),
        (words(place, app, "fsdp", **every), True, 0),
        (go_on(place, app, "fsdp/step_2", "fsdp2"), True, 0),
        (go_on(place, app, "fsdp/step_5", "fsdp5"), True, 0),
        (go_on(place, app, "ddp/step_2", "mixed"), True, 0),
        (go_on(place, app, "fsdp/step_2", "mixed"), False, 0),
        (words(place, app, "slim", slim_config=place / "slim.yaml", **every), False, 0),
        (go_on(place, app, "slim/step_5", "slim5"), False, 0),
        (words(place, app, "fsdp-slim", slim_config=place / "slim.yaml"), True, 0),
    ]
    environment = {True: FSDP2, False: {}}
    return [
        {"app": app, "words": each, "environment": environment[sharded], "interrupt": batch}
        for each, sharded, batch in runs
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Both apps' runs are made here, side by side: starting them takes the time."""
    folder = tmp_path_factory.mktemp("ranks")
    for app in apps.APPS:
        rows = apps.reviews if app == "text_classification" else apps.questions
        apps.write(folder / app / "train.jsonl", rows(ROWS))
        apps.write(folder / app / "validation.jsonl", rows(HELD_OUT, seed=1))
        apps.save_model(folder / app / "bert", app, **DROPOUT, **WILD)
    (folder / "slim.yaml").write_text("{batches: 2, round_to: 4, limits: {embeddings: 0}, budget: {macs: 0.8}}")
    runs = [each for app in apps.APPS for each in plan(folder, app)]
    (folder / "plan.json").write_text(json.dumps(runs))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = [str(ROOT / "tests/support/finetune_two_ranks.py"), str(folder / "plan.json")]
    done = subprocess.run([*launcher, *script], env=apps.ENVIRONMENT, check=False, **PIPED)
    (folder / "output").write_text(done.stdout + done.stderr)
    return folder


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch) -> None:
    monkeypatch.setattr(results, "plot_curves", lambda *_, **__: None)
    monkeypatch.setattr(SparsityReport, "plot", lambda *_: None)


def summary(folder: Path) -> dict[str, float]:
    found = json.loads((folder / "all_results.json").read_text())
    return {name: value for name, value in found.items() if name != "seconds"}


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open() as file:
        return [{name: value for name, value in row.items() if name != "time"} for row in csv.DictReader(file)]


def assert_same(one: Path, other: Path) -> None:
    for name in ("model.safetensors", "pruning_report.json", *(path.name for path in one.glob("*predictions.json"))):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert rows(one) == rows(other)
    assert summary(one) == summary(other)


def test_every_run_ends_as_it_should(place):
    output = (place / "output").read_text()
    codes = [0, 0, 0, 128 + signal.SIGTERM, 0, 0, 0, 0, 2, 2, 0, 0, 0]
    assert output.count(f"exit codes {codes * 2}") == 2, output
    assert output.count("2 ranks agree") == 2 * codes.count(0)  # on weights, masks, metrics and the schedule
    assert output.count("every training row was seen") == 2 * 4
    assert output.count("2 processes on cpu in fp32, FSDP2\n") == 2 * 4
    assert "Warning" not in output and "Traceback" not in output, output


@BOTH
def test_asked_is_reached(place, app):
    for name in ("ddp", "fsdp"):
        assert summary(place / app / name)["sparsity"] == pytest.approx(0.8, abs=1e-3)
        saved = load_file(place / app / name / "model.safetensors")
        zeros = sum(int((value == 0).sum()) for key, value in saved.items() if ".layer." in key and value.dim() == 2)
        assert zeros == int(0.8 * WEIGHTS / 4) * 4
        assert summary(place / app / name)["steps"] == 9


@BOTH
def test_every_row_of_the_validation_set_counts_once(place, app, tmp_path):
    """As one process scores the model that two have saved."""
    again = {"model_name_or_path": place / app / "ddp", "pruning_type": "pattern_lock", "pruning_frequency": None}
    more = {"max_train_steps": 1, "num_train_epochs": None, "cooldown_epochs": 0, "output_dir": tmp_path / "one"}
    assert apps.main(app, words(place, app, "", **again, **more)) == 0
    names = ("exact_match", "f1") if app == "qa" else ("accuracy", "f1")
    for name in names:
        theirs = summary(place / app / "ddp")[f"eval_{name}"]
        assert theirs == pytest.approx(summary(tmp_path / "one")[f"dense_{name}"], abs=1e-6)
    right = summary(place / app / "ddp")[f"eval_{names[0]}"] * HELD_OUT / (100 if app == "qa" else 1)
    assert right == pytest.approx(round(right), abs=1e-3)


@BOTH
def test_both_ranks_remove_the_same_channels(place, app):
    dense, slim, sharded = (
        load_file(place / app / name / "model.safetensors") for name in ("ddp", "slim", "fsdp-slim")
    )
    shapes = {name: value.shape for name, value in slim.items()}
    assert shapes == {name: value.shape for name, value in sharded.items()} != {n: v.shape for n, v in dense.items()}
    assert_same(place / app / "slim", place / app / "slim5")


@BOTH
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("step", [2, 5])  # within an epoch: each has 3 steps
def test_going_on_within_an_epoch_is_exact(place, app, kind, step):
    assert_same(place / app / kind, place / app / f"{kind}{step}")


@BOTH
def test_a_signal_to_one_rank_stops_both(place, app):
    assert (place / app / "stopped/step_4/rank_1.pt").is_file()
    assert (place / "output").read_text().count("stopped after optimizer step 4; everything is saved") == 2
    assert_same(place / app / "ddp", place / app / "stopped")


@pytest.mark.parametrize("app", apps.APPS)
def test_sharded_and_whole_runs_end_alike(place, app):
    """The norm is added up in another order. Where the true gradient is 0, Adam makes steps of its rounding error."""
    ddp, fsdp = (load_file(place / app / name / "model.safetensors") for name in ("ddp", "fsdp"))
    assert ddp.keys() == fsdp.keys()
    for name, value in ddp.items():
        assert torch.equal(fsdp[name] == 0, value == 0), name
        if not name.endswith(NO_GRADIENT):
            torch.testing.assert_close(
                fsdp[name], value, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name} {text}"
            )
    for one, other in zip(rows(place / app / "ddp"), rows(place / app / "fsdp"), strict=True):
        assert {name: float(value) for name, value in one.items()} == pytest.approx(
            {name: float(value) for name, value in other.items()}, rel=1e-4
        )


def test_each_rank_draws_its_own_dropout_and_has_its_own_checkpoint(place):
    one, other = (checkpoint.load(place / f"qa/ddp/step_2/rank_{i}.pt") for i in range(2))
    assert not torch.equal(one["rng"]["torch"], other["rng"]["torch"])
    assert one["sums"]["loss"] != other["sums"]["loss"]
    assert "model" not in one
    sharded = checkpoint.load(place / "qa/fsdp/step_2/rank_1.pt")
    assert {"model", "optimizer", "pruner"} < sharded.keys()


def test_ddp_and_fsdp2_do_not_mix(place):
    output = (place / "output").read_text()
    line = "--resume_from_checkpoint: under FSDP2 a run goes on under FSDP2 only, and without it only without\n"
    assert output.count(line) == 4
    assert not (place / "qa/mixed").exists()


def test_sharded_parts_are_refused_on_another_number_of_ranks(place, capsys, monkeypatch):
    monkeypatch.setattr(processes, "sharded", lambda accelerator: True)
    assert apps.main("qa", go_on(place, "qa", "fsdp/step_2", "parts")) == 2
    assert "begun on 2 ranks, got 1; use as many" in capsys.readouterr().err


def test_bad_input_is_one_line_and_all_ranks_leave(place, tmp_path):
    apps.write(tmp_path / "validation.jsonl", [*apps.reviews(4), {"sentence": "the plot .", "label": 7}])
    more = {"validation_file": tmp_path / "validation.jsonl", "output_dir": tmp_path / "out"}
    began = time.monotonic()
    code, output = apps.run("text_classification", words(place, "text_classification", "", **more), ranks=2)
    assert code != 0 and time.monotonic() - began < 120
    assert len(re.findall("^--validation_file: the label of row 5 is not in the list", output, re.M)) == 1, output
    assert not (tmp_path / "out").exists()
    assert 'Traceback (most recent call last):\n  File "' + str(apps.ROOT / "apps") not in output


def test_accelerate_launch_on_the_cpu_starts_one_process(place, tmp_path):
    """Whatever --num_processes says. docs/finetuning.md has the way to two."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    script = str(apps.ROOT / "apps/qa/train_prune.py")
    more = {"max_train_steps": 1, "num_train_epochs": None, "cooldown_epochs": 0, "output_dir": tmp_path / "out"}
    environment = {name: value for name, value in apps.ENVIRONMENT.items() if not name.startswith("ACCELERATE")}
    environment["HF_HOME"] = str(tmp_path)  # nobody's configuration
    command = [*launcher, script, *words(place, "qa", "", **more)]
    done = subprocess.run(command, env=environment, check=False, **PIPED)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("; 1 process on cpu in fp32\n") == 1, done.stdout
