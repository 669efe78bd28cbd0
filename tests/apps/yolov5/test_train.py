"""The YOLOv5 app end to end: what a run writes, reaches and keeps."""

import csv
import functools
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from apps.common.pruning import reached
from apps.yolov5 import train_prune
from apps.yolov5 import ultralytics_adapter as adapter
from apps.yolov5.arguments import parser
from data.shapes_detection import make
from pruning_core import Pruning, checkpoint
from tests.support import ROOT
from tests.support import yolov5_app as app
from tests.support.samples import NEURAL_COMPRESSOR_YAML

RECIPES = sorted((app.ROOT / "apps/yolov5/recipes").glob("[!h]*.yaml"))
WEIGHTS_IN_LAYERS = 320_848  # of the tiny model, without the constants of the box distances


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    make(folder / "set", train=14, val=6, size=64)
    (folder / "hyp.yaml").write_text("nbs: 8\nlr0: 0.002\nwarmup_epochs: 1\nclose_mosaic: 1\n")
    (folder / "recipe.yaml").write_text("pattern: 1x1\ntarget_sparsity: 0.7\npruning_type: magnitude\n")
    assert app.main(app.arguments(folder / "set/data.yaml", folder, "--name=dense", epochs=1)) == 0
    return folder


def words(place: Path, name: str, *more: str, **options: object) -> list[str]:
    start = {"cfg": None, "weights": place / "dense", "hyp": place / "hyp.yaml", "epochs": 4, "cooldown_epochs": 2}
    start |= {"pruning_config": place / "recipe.yaml", **options}
    return app.arguments(place / "set/data.yaml", place, f"--name={name}", "--do_prune", *more, **start)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return {name: value for name, value in adapter.load_model(path, "--weights").named_parameters() if value.dim() == 4}


def test_a_run_writes_everything(place, capsys):
    assert app.main(words(place, "all", "--save-period=1", "--dist_loss=kl")) == 0
    folder, printed = place / "all", capsys.readouterr().out
    for name in ("args.yaml", "hyp.yaml", "pruning_config.yaml", "results.csv", "pruning_report.md"):
        assert (folder / name).stat().st_size
    for name in ("results.png", "pruning_report.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 100
    names = sorted(path.name for path in (folder / "weights").iterdir())
    assert names == ["best.pt", "best_dense.pt", *(f"epoch{i}.pt" for i in range(1, 5)), "last.pt"]
    assert yaml.safe_load((folder / "args.yaml").read_text())["cooldown_epochs"] == 2
    assert yaml.safe_load((folder / "hyp.yaml").read_text())["nbs"] == 8
    table = rows(folder)
    assert [int(row["epoch"]) for row in table] == [1, 2, 3, 4]
    expected = {"train/box_loss", "train/dist_cls_loss", "metrics/mAP50", "val/cls_loss", "sparsity/reached", "lr/bias"}
    assert expected < table[0].keys()
    report = json.loads((folder / "pruning_report.json").read_text())
    assert sum(layer["zeros"] for layer in report["groups"][0]["layers"]) == round(0.7 * WEIGHTS_IN_LAYERS)
    assert {"dense mAP50", "sparse mAP50"} < report["metrics"].keys()
    assert re.search(r"dense \(best\.pt\) .*\nsparse \(best\.pt\) .* 70\.00% +70\.00%", printed)


@pytest.mark.parametrize(("batch", "nominal"), [(4, 4), (4, 8), (4, 64), (2, 6)])
def test_the_target_is_reached_when_the_cooldown_begins(place, batch, nominal, tmp_path):
    (tmp_path / "hyp.yaml").write_text(f"nbs: {nominal}\nwarmup_epochs: 1\n")
    options = {"batch-size": batch, "hyp": tmp_path / "hyp.yaml"}
    assert app.main(words(place, "exact", "--noplots", f"--project={tmp_path}", **options)) == 0
    shares = [(float(row["sparsity/asked"]), float(row["sparsity/reached"])) for row in rows(tmp_path / "exact")]
    exact = pytest.approx(round(0.7 * WEIGHTS_IN_LAYERS) / WEIGHTS_IN_LAYERS, abs=1e-6)
    assert shares[0] == (0.0, pytest.approx(0.0, abs=1e-4))
    assert [counted for _, counted in shares[1:]] == [exact, exact, exact]


def test_best_is_sparse_and_best_dense_is_dense(place, monkeypatch):
    """Even when every dense model is better than every sparse one."""
    fitness = iter([0.9, 0.95, 0.97, 0.3, 0.2, 0.1])  # of the start, four epochs, the file at the end

    def evaluate(self, model, batches, criterion, ranks):
        value = next(fitness)
        return {"metrics/mAP50": value, "metrics/mAP50-95": value, "fitness": value}

    monkeypatch.setattr(adapter.Evaluator, "evaluate", evaluate)
    assert app.main(words(place, "best", cooldown_epochs=1)) == 0
    folder = place / "best/weights"
    best, dense = adapter.content_of(folder / "best.pt"), adapter.content_of(folder / "best_dense.pt")
    assert (best["epoch"], best["train_metrics"]["fitness"]) == (2, 0.3)
    assert dense["train_metrics"]["fitness"] == 0.95
    share = sum(int((value == 0).sum()) for value in weights_of(folder / "best.pt").values())
    assert share / WEIGHTS_IN_LAYERS == pytest.approx(0.7, abs=1e-3)
    assert sum(int((value == 0).sum()) for value in weights_of(folder / "best_dense.pt").values()) < 100


def test_losses_are_means_over_the_batches(place, monkeypatch):
    original, seen = train_prune.losses, []

    def losses(run, net, batch):
        loss, items = original(run, net, batch)
        seen.append(float(items["box_loss"]))
        return loss, items

    monkeypatch.setattr(train_prune, "losses", losses)
    assert app.main(words(place, "means", "--noplots")) == 0
    written = [float(row["train/box_loss"]) for row in rows(place / "means")]
    assert written == [pytest.approx(sum(seen[i : i + 4]) / 4, rel=1e-4) for i in range(0, 16, 4)]


def test_an_old_best_in_the_folder_is_not_this_runs(place, monkeypatch, capsys):
    assert app.main(words(place, "again", "--noplots")) == 0
    old = (place / "again/weights/best.pt").read_bytes()
    nothing = {"metrics/mAP50": float("nan"), "metrics/mAP50-95": float("nan"), "fitness": float("nan")}
    monkeypatch.setattr(adapter.Evaluator, "evaluate", lambda *_: nothing)
    assert app.main(words(place, "again", "--noplots", "--exist-ok")) == 0
    assert "sparse (last.pt)" in capsys.readouterr().out
    assert (place / "again/weights/best.pt").read_bytes() == old


def test_patience_waits_for_the_target(place, monkeypatch, capsys):
    def evaluate(self, model, batches, criterion, ranks):
        return {"metrics/mAP50": 0.5, "metrics/mAP50-95": 0.5, "fitness": 0.5}

    monkeypatch.setattr(adapter.Evaluator, "evaluate", evaluate)
    assert app.main(words(place, "patience", "--patience=2", epochs=9, cooldown_epochs=5)) == 0
    assert "no better model for 2 epochs" in capsys.readouterr().out
    assert len(rows(place / "patience")) == 4 + 2  # the target is reached with epoch 4


def test_every_evaluated_average_is_masked(place, monkeypatch):
    seen, original = [], adapter.Evaluator.evaluate

    def evaluate(self, model, batches, criterion, ranks):
        seen.append(sum(int((p == 0).sum()) for p in model.parameters() if p.dim() == 4) / WEIGHTS_IN_LAYERS)
        return original(self, model, batches, criterion, ranks)

    monkeypatch.setattr(adapter.Evaluator, "evaluate", evaluate)
    assert app.main(words(place, "average", "--noplots")) == 0
    assert seen[:2] == [pytest.approx(0, abs=1e-3)] * 2  # the start and the warm-up
    assert seen[2:] == [pytest.approx(0.7, abs=1e-3)] * 4


def test_masks_are_fixed_in_the_cooldown_and_weights_are_not(place):
    assert app.main(words(place, "fixed", "--save-period=1", "--noplots", epochs=5, cooldown_epochs=3)) == 0
    models = [weights_of(place / f"fixed/weights/epoch{epoch}.pt") for epoch in (3, 4, 5)]
    for name in models[0]:
        zeros = [model[name] == 0 for model in models]
        assert torch.equal(zeros[0] & zeros[1], zeros[0]) and torch.equal(zeros[0] & zeros[2], zeros[0]), name
    assert any(not torch.equal(models[0][name], models[2][name]) for name in models[0])


@pytest.mark.parametrize("kind", ["fp16", "bf16"])
def test_mixed_precision_reaches_the_target(place, kind, monkeypatch):
    scaler = functools.partial(torch.amp.GradScaler, init_scale=64.0)  # 65536 skips every step of so short a run
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    assert app.main(words(place, kind, f"--amp={kind}", "--noplots", "--dist_loss=l2", "--feature_weight=0.1")) == 0
    assert float(rows(place / kind)[-1]["sparsity/reached"]) == pytest.approx(0.7, abs=1e-5)


def test_features_of_another_size_are_refused_at_once(place, capsys):
    adapter.save_model(
        adapter.new_model("yolov5n", {0: "circle", 1: "square", 2: "triangle"}),
        place / "larger.pt",
        arguments={},
        metrics={},
        epoch=0,
    )
    more = ("--dist_loss=kl", f"--teacher_weights={place}/larger.pt")
    assert app.main(words(place, "features", "--feature_weight=1", *more)) == 2
    assert "--feature_weight: features of [16, 32, 64] and [64, 128, 256] channels" in capsys.readouterr().err
    assert not (place / "features").exists()
    assert app.main(words(place, "features", "--noplots", *more)) == 0


def test_nosave_noval_noplots(place):
    assert app.main(words(place, "little", "--nosave", "--noval", "--noplots")) == 0
    names = sorted(path.name for path in (place / "little/weights").iterdir())
    assert names == ["best.pt", "best_dense.pt", "last.pt"]  # the last epoch's, and the model it began with
    assert not list((place / "little").glob("*.png"))
    assert [row["metrics/mAP50"] != "" for row in rows(place / "little")] == [False, False, False, True]


def test_a_pruning_configuration_without_do_prune_is_dense_training(place, capsys):
    """The third command of the documentation of Neural Compressor's example."""
    given = {"weights": place / "dense", "cfg": None, "pruning_config": place / "recipe.yaml", "epochs": 1}
    assert app.main(app.arguments(place / "set/data.yaml", place, "--name=unpruned", "--noplots", **given)) == 0
    said = f"--pruning_config: {place / 'recipe.yaml'} is not used; this is dense training without --do_prune"
    assert said in capsys.readouterr().out.splitlines()
    weights = weights_of(place / "unpruned/weights/last.pt")
    assert all(value.count_nonzero() > 0.99 * value.numel() for name, value in weights.items() if ".dfl." not in name)


def test_data_alone_trains_yolov5s_from_its_yaml(place, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"cfg": None, "epochs": 1, "img": 32}
    assert app.main(app.arguments(place / "set/data.yaml", place, "--name=alone", "--noplots", **given)) == 0
    said = "--weights: none is given and yolov5s.pt is not here; training yolov5s from random weights"
    assert said in capsys.readouterr().out.splitlines()
    (tmp_path / "yolov5s.pt").write_bytes((place / "dense/weights/best.pt").read_bytes())
    assert app.main(app.arguments(place / "set/data.yaml", place, "--name=here", "--noplots", **given)) == 0
    assert "random weights" not in capsys.readouterr().out


def test_frozen_layers_stay_as_they_are(place):
    assert app.main(words(place, "frozen", "--freeze=3", "--noplots")) == 0
    before, after = weights_of(place / "dense/weights/best.pt"), weights_of(place / "frozen/weights/last.pt")
    for name in before:
        frozen = name.startswith(("model.0.", "model.1.", "model.2."))
        assert torch.equal(before[name], after[name]) == (frozen or ".dfl." in name), name
    files = (place / "dense/weights/best.pt", place / "frozen/weights/last.pt")
    before, after = (adapter.load_model(file, "--weights").state_dict() for file in files)
    assert torch.equal(before["model.1.bn.running_mean"], after["model.1.bn.running_mean"])
    assert not torch.equal(before["model.3.bn.running_mean"], after["model.3.bn.running_mean"])


def test_a_loss_that_is_not_finite_ends_the_run(place, monkeypatch, capsys):
    def losses(run, net, batch):
        total = sum(parameter.sum() for parameter in net.parameters()) * float("nan")
        return total, {"box_loss": total}

    monkeypatch.setattr(train_prune, "losses", losses)
    assert app.main(words(place, "nan")) == 2
    assert re.search(r"loss: is not finite in epoch 1, got box_loss; .*lower lr0", capsys.readouterr().err)
    assert not (place / "nan/weights/last.pt").exists()


def test_weights_with_a_new_head(place, tmp_path):
    data = tmp_path / "data.yaml"
    data.write_text(
        f"path: {place / 'set'}\ntrain: images/train\nval: images/val\nnames: [circle, square, triangle, star]\n"
    )
    again = app.arguments(data, tmp_path, "--noplots", weights=place / "dense/weights/best.pt", epochs=1)
    assert app.main(again) == 0
    assert len(adapter.load_model(tmp_path / "exp/weights/last.pt", "").names) == 4


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_opens_with_its_command_and_trains(place, recipe):
    comments = [line.removeprefix("#").strip() for line in recipe.read_text().splitlines() if line.startswith("#")]
    command = re.search(r"train_prune\.py (.*?--epochs \d+ --cooldown_epochs \d+)", " ".join(comments))[1]
    options = parser().parse_args(command.replace("\\ ", "").split())
    assert app.ROOT / options.pruning_config == recipe and options.do_prune
    more = [f"--dist_loss={options.dist_loss}"] if options.dist_loss else []
    short = {"pruning_config": recipe, "epochs": 2, "cooldown_epochs": 1}
    assert app.main(words(place, recipe.stem, *more, "--noplots", **short)) == 0
    asked, counted = (float(rows(place / recipe.stem)[-1][f"sparsity/{kind}"]) for kind in ("asked", "reached"))
    target = yaml.safe_load(recipe.read_text())["target_sparsity"]
    assert asked == pytest.approx(target)
    assert target - 0.01 < counted <= target + 1e-4


def test_all_recipes_are_there():
    names = {"1x1", "4x1", "2-4", "channel-progressive", "distilled", "local"}
    assert {recipe.stem for recipe in RECIPES} == names


SEED = "--data coco.yaml --hyp hyp.scratch-low.yaml --device 0,1 --img 640 --batch-size 64"
SEED_COMMANDS = {
    "prune": SEED + " --pruning_config p.yaml --weights dense/ --do_prune --epochs 250"
    " --cooldown_epochs 150 --patience 0",
    "distil": SEED + " --pruning_config p.yaml --do_prune --dist_loss l2 --temperature 10 --epochs 250"
    " --cooldown_epochs 150 --patience 0",
    "dense": SEED + " --weights dense/ --epochs 300",
}


@pytest.mark.parametrize("command", SEED_COMMANDS.values(), ids=SEED_COMMANDS)
def test_commands_of_neural_compressor_are_understood(command):
    options = parser().parse_args(command.split())
    assert (options.device, options.img, options.batch_size) == ("0,1", 640, 64)
    assert options.do_prune == ("--do_prune" in command)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["prune", "distil"])
def test_commands_of_neural_compressor_run_on_two_ranks(place, kind):
    """With its own yaml file, whose head pattern means nothing today, and an old hyp file."""
    (place / "nc.yaml").write_text(NEURAL_COMPRESSOR_YAML)
    (place / "old.yaml").write_text("lr0: 0.01\nbox: 0.05\nobj: 1.0\nanchor_t: 4.0\n")
    options = {"hyp": place / "old.yaml", "pruning_config": place / "nc.yaml", "epochs": 3, "cooldown_epochs": 1}
    more = ["--dist_loss=l2", "--temperature=10"] if kind == "distil" else []
    code, output = app.run(words(place, kind, "--patience=0", *more, **options), ranks=2)
    assert code == 0, output
    assert "head of this model is model.24" in output
    assert output.count("--hyp: box: 0.05 becomes 7.5") == 1
    assert ("--temperature: 10 is not used" in output) == (kind == "distil")
    assert re.search(r"sparse \(best\.pt\) .* 80\.00% +(80\.00|79\.99)%", output), output


@pytest.mark.slow
def test_two_ranks_hold_the_same_weights_and_masks(place):
    script = ROOT / "tests/support/yolov5_two_ranks.py"
    code, output = app.run(words(place, "same", "--noplots"), ranks=2, script=script)
    assert code == 0, output
    assert "2 ranks agree" in output, output
    assert output.count("gradients agree") == 2
    assert float(rows(place / "same")[-1]["sparsity/reached"]) == pytest.approx(0.7, abs=1e-5)


def test_a_saved_run_is_inspected_by_the_core(place, monkeypatch):
    """The resume state is tensors and plain data: the core's command reads it, and nothing is unpickled."""
    states = []
    monkeypatch.setattr(train_prune, "save_state", lambda run, folder: states.append(train_prune.state_of(run)))
    assert app.main(words(place, "state", "--noplots")) == 0
    checkpoint.save(states[-1], place / "state.pt")
    state = checkpoint.load(place / "state.pt")
    pruner = Pruning(state["pruner"]["config"])
    pruner.model = adapter.new_model(state["architecture"], {0: "a", 1: "b", 2: "c"})
    pruner.model.load_state_dict(state["model"])
    pruner.load_state_dict(state["pruner"])
    pruner.on_train_begin()
    assert reached(pruner, pruner.model) == pytest.approx(0.7, abs=1e-5)
