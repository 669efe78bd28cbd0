"""An interrupted run that goes on ends with the weights of one that was never interrupted, bit for bit."""

import csv
import signal
from pathlib import Path

import pytest
import torch
import yaml

from apps.yolov5 import ultralytics_adapter as adapter
from data.shapes_detection import make
from tests.support import yolov5_app as app

RECIPE = {"target_sparsity": 0.6, "pattern": "4x1", "pruning_frequency": 2, "sparsity_decay_type": "linear"}
EPOCHS, BATCHES = 4, 4


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A data set, a dense model, a recipe, settings that take a step every second batch."""
    folder = tmp_path_factory.mktemp("resume")
    make(folder / "set", train=14, val=6, size=64)
    (folder / "hyp.yaml").write_text("nbs: 8\nlr0: 0.002\nwarmup_epochs: 1\nclose_mosaic: 2\n")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    assert app.main(app.arguments(folder / "set/data.yaml", folder, "--name=dense", epochs=1)) == 0
    return folder


def words(place: Path, name: str, *more: str) -> list[str]:
    start = {"cfg": None, "weights": place / "dense/weights/best.pt", "hyp": place / "hyp.yaml"}
    prune = {"pruning_config": place / "recipe.yaml", "cooldown_epochs": 1, "dist_loss": "kl", "epochs": EPOCHS}
    return app.arguments(place / "set/data.yaml", place, f"--name={name}", "--do_prune", *more, **start, **prune)


class StopAt:
    """Stands in for a signal that comes before the n-th look at it."""

    exit_code = 143

    def __init__(self, look: int) -> None:
        self.left = look

    def __enter__(self) -> "StopAt":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    @property
    def signal(self) -> int | None:
        self.left -= 1
        return signal.SIGTERM if self.left <= 0 else None


def weights(path: Path) -> dict[str, torch.Tensor]:
    return adapter.load_model(path, "--weights").state_dict()


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open() as file:
        return [{name: value for name, value in row.items() if name != "time"} for row in csv.DictReader(file)]


def assert_same(one: Path, other: Path) -> None:
    for name in ("last.pt", "best.pt", "best_dense.pt"):
        a, b = weights(one / "weights" / name), weights(other / "weights" / name)
        different = [key for key in a if not torch.equal(a[key], b[key])]
        assert not different, f"{name}: {different[:3]}"
    assert rows(one) == rows(other)
    assert not (other / "weights/resume.pt").exists()


@pytest.fixture(scope="module")
def uninterrupted(place) -> Path:
    assert app.main(words(place, "whole")) == 0
    return place / "whole"


LOOKS = EPOCHS * (BATCHES // 2 + 1) + 1  # a look after every step and epoch; the warm-up epoch has steps of one batch


@pytest.mark.slow
@pytest.mark.parametrize("look", range(1, LOOKS + 1))
def test_interrupted_after_any_step_or_epoch(place, uninterrupted, monkeypatch, capsys, look):
    from apps.yolov5 import train_prune

    name = f"stopped{look}"
    with monkeypatch.context() as patch:
        patch.setattr(train_prune, "Interrupt", lambda: StopAt(look))
        code = app.main(words(place, name))
    printed = capsys.readouterr().out
    assert code == 143, f"no look number {look}: {printed}"
    assert f"--resume {place / name}" in printed
    assert app.main(["--resume", str(place / name), "--device=cpu"]) == 0
    assert_same(uninterrupted, place / name)


def test_the_looks_above_are_all_there_are(place, monkeypatch):
    from apps.yolov5 import train_prune

    interrupt = StopAt(10**6)
    monkeypatch.setattr(train_prune, "Interrupt", lambda: interrupt)
    assert app.main(words(place, "counted")) == 0
    assert 10**6 - interrupt.left == LOOKS


def test_interrupted_twice_and_resumed_by_its_checkpoint(place, uninterrupted, monkeypatch):
    from apps.yolov5 import train_prune

    for number, look in enumerate((2, 4)):
        go_on = words(place, "twice") if number == 0 else ["--resume", str(place / "twice/weights/last.pt")]
        with monkeypatch.context() as patch:
            patch.setattr(train_prune, "Interrupt", lambda look=look: StopAt(look))
            assert app.main(go_on) == 143
    assert app.main(["--resume", str(place / "twice/weights/last.pt"), "--workers=1"]) == 0
    assert_same(uninterrupted, place / "twice")


def test_resume_without_a_name_takes_the_latest_of_the_project(place, monkeypatch, tmp_path, capsys):
    from apps.yolov5 import train_prune

    with monkeypatch.context() as patch:
        patch.setattr(train_prune, "Interrupt", lambda: StopAt(1))
        assert app.main([*words(place, "lost"), f"--project={tmp_path}"]) == 143
    assert app.main(["--resume", f"--project={tmp_path}"]) == 0
    assert "going on with" in capsys.readouterr().out


def test_dense_training_that_names_a_recipe_goes_on(place, monkeypatch, tmp_path, capsys):
    """The recipe is not used, neither when the run is begun nor when it goes on."""
    from apps.yolov5 import train_prune

    recipe = f"--pruning_config={place / 'recipe.yaml'}"
    begin = app.arguments(place / "set/data.yaml", tmp_path, "--name=plain", recipe, "--noplots", epochs=2)
    with monkeypatch.context() as patch:
        patch.setattr(train_prune, "Interrupt", lambda: StopAt(1))
        assert app.main(begin) == 143
    assert app.main(["--resume", str(tmp_path / "plain"), recipe]) == 0
    assert "has changed" not in capsys.readouterr().out


def wait_for(process, text: str) -> str:
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(seen)


def interrupted(place: Path, name: str, number: int, ranks: int = 1) -> tuple[Path, int, str]:
    """A run that got a signal after its second epoch. One that ended before the signal came is tried again."""
    for attempt in range(5):
        folder = place / f"{name}{attempt}"
        process = app.start(words(place, folder.name), ranks)
        wait_for(process, "epoch 2/4")
        process.send_signal(number)
        output, _ = process.communicate(timeout=120)
        if (folder / "weights/resume.pt").exists():
            return folder, process.returncode, output
    raise AssertionError(output)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_real_signal_saves_and_leaves(place, uninterrupted, number):
    folder, code, output = interrupted(place, f"signal{number}_", number)
    assert code == 128 + number, output
    assert "everything is saved" in output and "Traceback" not in output
    code, output = app.run(["--resume", str(folder)])
    assert code == 0, output
    assert_same(uninterrupted, folder)


@pytest.mark.slow
def test_a_killed_run_goes_on(place, uninterrupted):
    """kill -9: what was trained since the last save is trained again, to the same weights."""
    folder, _, _ = interrupted(place, "killed", signal.SIGKILL)
    code, output = app.run(["--resume", str(folder)])
    assert code == 0, output
    assert_same(uninterrupted, folder)


@pytest.mark.slow
def test_two_ranks_interrupted_by_sigterm(place):
    code, output = app.run(words(place, "ranks"), ranks=2)
    assert code == 0, output
    folder, _, output = interrupted(place, "ranks_stopped", signal.SIGTERM, ranks=2)
    assert "everything is saved" in output, output
    code, output = app.run(["--resume", str(folder)], ranks=2)
    assert code == 0, output
    assert_same(place / "ranks", folder)


@pytest.mark.slow
def test_two_ranks_go_on_with_the_run_of_one(place, stopped_run):
    """Not bit for bit, and it says so; `--sync-bn` without CUDA says that it does nothing."""
    code, output = app.run(["--resume", str(stopped_run)], ranks=2)
    assert code == 0, output
    assert output.count("--resume: begun on 1 ranks, goes on on 2: the weights will differ a little") == 1
    code, output = app.run(words(place, "sync", "--sync-bn"), ranks=2)
    assert code == 0 and "--sync-bn: needs CUDA" in output, output


@pytest.fixture
def stopped_run(place, tmp_path, monkeypatch) -> Path:
    """A run with a recipe and a data set of its own, stopped in its first epoch."""
    from apps.yolov5 import train_prune

    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    make(tmp_path / "set", train=14, val=6, size=64)
    more = [f"--project={tmp_path}", f"--data={tmp_path}/set/data.yaml", f"--pruning_config={tmp_path}/recipe.yaml"]
    with monkeypatch.context() as patch:
        patch.setattr(train_prune, "Interrupt", lambda: StopAt(1))
        assert app.main([*words(place, "stopped"), *more]) == 143
    return tmp_path / "stopped"


def test_a_changed_recipe_is_noticed(stopped_run, capsys):
    recipe = stopped_run.parent / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**RECIPE, "target_sparsity": 0.9}))
    assert app.main(["--resume", str(stopped_run), f"--pruning_config={recipe}"]) == 2
    assert "--pruning_config: changed since this run was begun" in capsys.readouterr().err
    assert app.main(["--resume", str(stopped_run)]) == 0
    printed = capsys.readouterr().out
    assert "has changed; this run goes on with what it was begun with" in printed
    assert "60.00%" in printed


def test_changed_data_are_refused(stopped_run, capsys):
    (stopped_run.parent / "set/images/train/shapes-00003.png").unlink()
    assert app.main(["--resume", str(stopped_run)]) == 2
    assert "--data: this run was begun with 14 images of 3 classes, got 13 of 3" in capsys.readouterr().err
    assert (stopped_run / "weights/resume.pt").exists()
