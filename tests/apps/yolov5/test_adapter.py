"""The contract with ultralytics: what ``ultralytics_adapter.py`` takes from it is as this app relies on it."""

from __future__ import annotations

import ast
import os
import random
import re
import socket
import subprocess
import sys
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from apps.common.errors import BadInput
from apps.common.ranks import Ranks
from apps.yolov5 import ultralytics_adapter as adapter
from apps.yolov5.data_set import ValBatches, read_data, to_device
from apps.yolov5.hyp import KEYS
from apps.yolov5.trainer import pruning_trainer
from data.shapes_detection import make
from tests.support.yolov5_app import ROOT, SCRIPT, TINY, arguments

CPU = torch.device("cpu")
ONE = Ranks(0, 1, 0, CPU)
NAMES = {0: "circle", 1: "square", 2: "triangle"}
LOW, HIGH = adapter.SUPPORTED
CODE = ("apps", "pruning_core", "data", "benchmarks")
MAP50, BOTH = "metrics/mAP50", "metrics/mAP50-95"


@pytest.fixture(autouse=True)
def attempts(monkeypatch):
    """Every test here runs without a network, and fails when it asks for one."""
    made: list[str] = []

    def refuse(*args: Any, **_: Any) -> None:
        made.append(str(args))
        raise OSError("no network in this test")

    for owner, name in ((socket.socket, "connect"), (socket, "create_connection"), (socket, "getaddrinfo")):
        monkeypatch.setattr(owner, name, refuse)
    yield made
    assert not made


@pytest.fixture
def upstreams(tmp_path, monkeypatch) -> Path:
    """Shapes for upstream's own loops, which leave a cache beside the labels and ask the network for a font."""
    monkeypatch.setattr("ultralytics.data.utils.check_font", lambda *_: None)
    return make(tmp_path / "set", train=12, val=6, size=64)


@pytest.fixture
def tiny() -> adapter.Model:
    return adapter.new_model(TINY, NAMES)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shapes) -> Path:
    """A checkpoint of the tiny model that has learned something of the validation images."""
    torch.manual_seed(0)
    model = adapter.new_model(TINY, NAMES).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.3  # a short training needs statistics at its end, too
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.005)
    batches = [to_device(batch, CPU) for batch in batches_of(shapes)]
    for _ in range(30):
        for batch in batches:
            optimizer.zero_grad()
            losses(model, batch)[0].sum().backward()
            optimizer.step()
    return save(model, tmp_path_factory.mktemp("trained") / "model.pt")


def hyp(**changes: Any) -> SimpleNamespace:
    return adapter.hyperparameters({"imgsz": 64, **changes})


def images(file: Path, split: str = "val", cache: bool = False, **changes: Any) -> adapter.Images:
    kind = {"names": NAMES, "hyp": hyp(**changes), "size": 64, "batch": 4, "stride": 32, "cache": cache}
    return adapter.images(getattr(read_data(str(file)), split), split=split, **kind)


def batches_of(file: Path, ranks: Any = ONE) -> ValBatches:
    """4 and 2 images."""
    return ValBatches(images(file), 0, ranks)


def losses(model: adapter.Model, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return adapter.criterion_of(model, hyp())(model(batch["img"]), batch)


def save(model: nn.Module, path: Path) -> Path:
    adapter.save_model(model, path, arguments=vars(hyp()), metrics={MAP50: 0.5}, epoch=7)
    return path


def load(path: Path) -> adapter.Model:
    return adapter.load_model(path, "--weights")


# ---- the package ----------------------------------------------------------------------------------------------------


def test_the_supported_versions_are_those_of_the_requirements(monkeypatch):
    bounds = re.search(r"^ultralytics>=([\d.]+),<([\d.]+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert bounds.groups() == adapter.SUPPORTED
    for number in (version("ultralytics"), LOW, f"{LOW}.post1", "8.4.1000"):
        monkeypatch.setattr(adapter, "version", lambda _, number=number: number)
        adapter.check_version()


@pytest.mark.parametrize(
    "number", ["8.4.99", "8.4", "8.3.200", "7.0", HIGH, f"{HIGH}.0", f"{HIGH}.0rc1", "8.10.0", "9.0.0"]
)
def test_a_version_that_was_never_tested(monkeypatch, number):
    monkeypatch.setattr(adapter, "version", lambda _: number)
    with pytest.raises(BadInput, match=f"got {number}; pip install 'ultralytics>={LOW},<{HIGH}'$"):
        adapter.check_version()


def importers(root: Path) -> set[str]:
    """The files that import ultralytics, by a statement or by a call such as ``import_module``."""
    found = set()
    for file in (file for folder in CODE for file in root.glob(f"{folder}/**/*.py")):
        names: list[str | None] = []
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.append(node.module)
            elif isinstance(node, ast.Call) and "import" in ast.unparse(node.func):
                names += [ast.unparse(argument).strip("'") for argument in node.args]
        if any(str(name).partition(".")[0] == "ultralytics" for name in names):
            found.add(file.relative_to(root).as_posix())
    return found


def test_one_module_imports_ultralytics():
    assert importers(ROOT) == {"apps/yolov5/ultralytics_adapter.py"}


def test_the_walk_sees_imports(tmp_path):
    (tmp_path / "data/deep").mkdir(parents=True)
    inside = ["import ultralytics", "import os, ultralytics.nn as t", "def f():\n    from ultralytics.cfg import a"]
    inside += ["importlib.import_module('ultralytics.nn')", "__import__('ultralytics')"]
    outside = ['"""import ultralytics"""\nfrom apps.yolov5 import ultralytics_adapter', "print('ultralytics')"]
    for number, text in enumerate(inside + outside):
        (tmp_path / f"data/deep/{number}.py").write_text(text)
    assert importers(tmp_path) == {f"data/deep/{number}.py" for number in range(len(inside))}


# ---- models ---------------------------------------------------------------------------------------------------------


def test_the_spellings_of_a_model():
    names = {f"yolov5{scale}.yaml": [f"yolov5{scale}", f"yolov5{scale}.yaml", f"yolov5{scale}u"] for scale in "nsmlx"}
    names["yolov5s-p6.yaml"] = ["yolov5s6", "yolov5s-p6", "yolov5s6.yaml", "yolov5s6u", "yolov5s-p6.yml"]
    names[TINY] = [TINY]
    for expected, spellings in names.items():
        assert {adapter.architecture(name) for name in spellings} == {expected}
    for name in ("", "yolov5", "yolov5t", "yolov5s7", "yolov8n", "yolov5s.pt", "no.yaml"):
        with pytest.raises(BadInput, match=f"--cfg: no such model, got '{name}'; use yolov5n, .*yolov5s6"):
            adapter.architecture(name)


@pytest.mark.parametrize("name", ["yolov5s6.yaml", "yolov5su.yaml", "yolov5/menu.yaml"])  # upstream would rename them
def test_a_yaml_file_is_taken_as_it_is_named(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(Path(TINY).read_text().replace("  n: [", "  s: [") + "mark: mine\n")
    assert adapter.new_model(str(path), NAMES).yaml["mark"] == "mine"


@pytest.mark.parametrize(("name", "parameters"), [("n", 2_654_816), ("s", 9_153_152), ("s6", 15_309_328)])
def test_the_models_are_the_known_ones(name, parameters):
    head, strides = ("model.33", [8, 16, 32, 64]) if name == "s6" else ("model.24", [8, 16, 32])
    model = adapter.new_model(f"yolov5{name}", {i: f"class{i}" for i in range(80)})
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert adapter.head_of(model) == head
    assert type(model.get_submodule(head)).__name__ == "Detect"
    assert model.stride.tolist() == strides
    assert adapter.largest_stride(model) == strides[-1]
    assert adapter.class_names(model) == {i: f"class{i}" for i in range(80)}


@pytest.mark.parametrize("name", [TINY, "yolov5n6"])
def test_the_raw_outputs_of_the_head(name):
    model = adapter.new_model(name, NAMES)
    head, neck, image = model.model[-1], {}, torch.rand(2, 3, 128, 192)
    for index in head.f:
        model.model[index].register_forward_hook(lambda *call, index=index: neck.update({index: call[2]}))
    training, inference = model.train()(image), model.eval()(image)
    assert set(training) == {"boxes", "scores", "feats"}
    sizes = [(128 // int(stride), 192 // int(stride)) for stride in head.stride]
    points = sum(height * width for height, width in sizes)
    for outputs in (training, inference):
        found = adapter.detections(outputs)
        assert found.scores.shape == (2, len(NAMES), points)
        assert found.bins.shape == (2, 4 * head.reg_max, points)
        assert [tuple(feature.shape[2:]) for feature in found.features] == sizes
    assert all(feature is neck[index] for feature, index in zip(found.features, head.f, strict=True))
    assert inference[0].shape == (2, 4 + len(NAMES), points)
    assert torch.equal(inference[0][:, 4:], found.scores.sigmoid())


def test_bins_lie_side_by_side(tiny):
    head = tiny.model[-1]
    raw = {"boxes": 3 * torch.randn(2, 4 * head.reg_max, 5), "scores": None, "feats": ()}
    bins = adapter.detections(raw).bins.unflatten(1, (4, -1))
    torch.testing.assert_close((bins.softmax(2) * torch.arange(head.reg_max)[:, None]).sum(2), head.dfl(raw["boxes"]))


def test_nothing_is_frozen_but_the_distances(tiny, tmp_path):
    """Nor is it in a copy of a frozen model, which has the weights of that and shares none."""
    loaded = load(save(tiny.requires_grad_(False), tmp_path / "a.pt"))
    copied = adapter.trainable_copy(loaded, NAMES)
    for model in (adapter.new_model(TINY, NAMES), copied):
        frozen = {name: value for name, value in model.named_parameters() if not value.requires_grad}
        assert list(frozen) == [f"{adapter.head_of(model)}.dfl.conv.weight"]
        assert frozen.popitem()[1].flatten().tolist() == list(range(model.model[-1].reg_max))
    for ours, theirs in zip(copied.state_dict().values(), loaded.state_dict().values(), strict=True):
        assert ours.equal(theirs) and ours.data_ptr() != theirs.data_ptr()


def test_the_moving_average(tiny):
    ema = adapter.Ema(tiny)
    start = deepcopy(ema.ema.state_dict())
    assert not any(value.requires_grad for value in ema.ema.parameters())
    with torch.no_grad():
        for value in tiny.parameters():
            value += torch.rand_like(value)
    assert all(value.equal(start[name]) for name, value in ema.ema.state_dict().items())  # it shares none
    for updates in (1, 2):
        before = deepcopy(list(ema.ema.parameters()))
        ema.update(tiny)
        assert ema.updates == updates
        for old, new, goal in zip(before, ema.ema.parameters(), tiny.parameters(), strict=True):
            assert (goal - new).abs().sum() < (goal - old).abs().sum()


# ---- hyperparameters and loss ---------------------------------------------------------------------------------------


def test_our_hyperparameters_are_known_upstream():
    default = vars(adapter.hyperparameters({}))
    assert vars(adapter.hyperparameters({key: default[key] for key in KEYS})) == default
    assert adapter.hyperparameters({"lr0": 0.125}).lr0 == 0.125


@pytest.mark.parametrize("values", [{"lr0": "fast"}, {"box": None}, {"mosaic": 2.0}, {"close_mosaic": 1.5}, {"lrO": 1}])
def test_a_bad_hyperparameter(values):
    with pytest.raises(BadInput, match=f"^--hyp: .*{next(iter(values))}.*; see ultralytics' default.yaml$"):
        adapter.hyperparameters(values)


def test_the_loss_is_a_sum_over_images(trained, shapes):
    """Twice the images, twice the loss: the gradients of ranks are averaged, so the loop multiplies by their number."""
    model, batch = load(trained), to_device(next(iter(batches_of(shapes))), CPU)
    parts, items = losses(model, batch)
    assert list(items) == ["box_loss", "cls_loss", "dfl_loss"]
    assert (parts > 0).all()
    torch.testing.assert_close(parts, len(batch["img"]) * torch.stack(list(items.values())))
    twice = {name: torch.cat([batch[name]] * 2) for name in ("img", "cls", "bboxes")}
    twice["batch_idx"] = torch.cat([batch["batch_idx"], batch["batch_idx"] + len(batch["img"])])
    for found, expected in zip(losses(model, twice), (2 * parts, items), strict=True):
        torch.testing.assert_close(found, expected)


def test_the_loss_of_a_batch_without_objects(tiny):
    empty = {"cls": torch.zeros(0, 1), "bboxes": torch.zeros(0, 4), "batch_idx": torch.zeros(0)}
    parts, _ = losses(tiny.train(), {"img": torch.rand(2, 3, 64, 64), **empty})
    assert parts[1] > 0 and parts[[0, 2]].tolist() == [0, 0]
    parts.sum().backward()
    assert all(torch.isfinite(value.grad).all() for value in tiny.parameters() if value.requires_grad)


def test_gradients_reach_all_that_trains(tiny, shapes):
    for batch in batches_of(shapes):
        losses(tiny.train(), to_device(batch, CPU))[0].sum().backward()
    still = [name for name, value in tiny.named_parameters() if value.requires_grad and not value.grad.any()]
    assert not still


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def test_upstream_reads_what_is_saved(tiny, shapes, tmp_path):
    from ultralytics import YOLO

    with torch.no_grad():
        tiny.model[1].conv.weight[:, ::2] = 0
        tiny.model[0].conv.weight[0, 0, 0, 0] = 1e6  # more than fp16 can hold
    criterion = tiny.train().criterion = adapter.criterion_of(tiny, hyp())
    before = deepcopy(tiny.state_dict())
    path = save(tiny, tmp_path / "model.pt")
    assert tiny.training and tiny.criterion is criterion
    torch.testing.assert_close(dict(tiny.state_dict()), dict(before), rtol=0, atol=0)  # and of the same dtypes
    content = adapter.content_of(path)
    assert (content["epoch"], content["train_metrics"], content["train_args"]) == (7, {MAP50: 0.5}, vars(hyp()))
    assert {value.dtype for value in content["model"].parameters()} == {torch.float16}
    assert content["model"].criterion is None
    picture = next(shapes.parent.glob("images/val/*.png"))
    kind = {"imgsz": 64, "device": "cpu", "verbose": False, "project": tmp_path, "conf": 1e-4}
    assert YOLO(path).predict(picture, **kind)[0].names == NAMES
    loaded = load(path)
    assert not loaded.training
    assert {value.dtype for value in loaded.parameters()} == {torch.float32}
    assert adapter.class_names(loaded) == NAMES
    for ours, theirs in zip(tiny.state_dict().values(), loaded.state_dict().values(), strict=True):
        assert ours.half().nan_to_num().to(ours.dtype).equal(theirs)  # so what was 0 is 0


def test_a_failed_save_leaves_the_old_file(tiny, tmp_path, monkeypatch):
    path = save(tiny, tmp_path / "model.pt")
    old = path.read_bytes()

    def fail(content: Any, file: Any) -> None:
        file.write(b"half of it")
        raise OSError("the disk is full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="the disk is full"):
        save(tiny, path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["yolov5s.pt", "yolov5n6.pt", "it's.pt"])  # upstream looks for yolov5su.pt and its.pt
def test_a_file_is_loaded_under_the_name_it_has(trained, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(trained.read_bytes())
    load(Path(name))
    assert adapter.content_of(Path(name))["epoch"] == 7


class Foreign:
    """Unpickled, it makes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("proof"),)


def test_code_in_a_checkpoint_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Foreign()}, "foreign.pt")
    with pytest.raises(BadInput, match=r"^--weights: not an ultralytics model \(.*\), got 'foreign.pt'; use a .pt of"):
        load(Path("foreign.pt"))
    assert not Path("proof").exists()
    torch.load("foreign.pt", weights_only=False)
    assert Path("proof").exists()


# ---- images ---------------------------------------------------------------------------------------------------------


def item(dataset: adapter.Images, index: int, seed: int = 3) -> dict[str, Any]:
    random.seed(seed)
    np.random.seed(seed)
    return dataset[index]


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[name].equal(other[name]) for name in ("img", "cls", "bboxes"))


def test_mosaic_draws_from_the_whole_set(shapes, monkeypatch):
    fresh, used = images(shapes, "train", mosaic=1.0), images(shapes, "train", mosaic=1.0)
    loaded, read = set(), used.load_image
    monkeypatch.setattr(used, "load_image", lambda index, **kind: loaded.add(index) or read(index, **kind))
    for seed in range(12):
        item(used, 0, seed)
    assert loaded == set(range(12))  # not only those that were asked for lately
    assert not used.buffer
    assert same(item(fresh, 1), item(used, 1))
    assert not same(item(fresh, 1), item(fresh, 1, seed=4))


def test_the_cache_changes_no_pixel_and_writes_no_file(shapes):
    before = {path: path.stat().st_mtime_ns for path in shapes.parent.rglob("*")}
    for split in ("train", "val"):
        cached, plain = images(shapes, split, cache=True), images(shapes, split)
        assert all(same(item(cached, index), item(plain, index)) for index in range(len(plain)))
        assert all(kept is not None for kept in cached.ims) and all(kept is None for kept in plain.ims)
    assert {path: path.stat().st_mtime_ns for path in shapes.parent.rglob("*")} == before


def test_closing_the_mosaic(shapes):
    settings = dict.fromkeys(("degrees", "scale", "translate", "fliplr", "hsv_h", "hsv_s", "hsv_v"), 0.0)
    settings["mosaic"] = 1.0
    dataset, kept = images(shapes, "train", **settings), hyp(**settings)
    mixed = item(dataset, 0)
    adapter.close_mosaic(dataset, kept)
    assert kept.mosaic == 1.0  # not the caller's
    assert not same(mixed, item(dataset, 0))
    assert same(item(images(shapes, "train", **settings | {"mosaic": 0.0}), 0), item(dataset, 0))


# ---- metrics --------------------------------------------------------------------------------------------------------


def evaluate(model: nn.Module, folder: Path, batches: Any, criterion: Any = None) -> dict[str, float]:
    evaluator = adapter.Evaluator(hyp(), NAMES, CPU, folder)
    return evaluator.evaluate(model, batches, criterion or adapter.criterion_of(model, hyp()), ONE)


def test_the_metrics_are_those_of_upstream(trained, upstreams, tmp_path):
    from ultralytics import YOLO

    kind = {"imgsz": 64, "batch": 4, "device": "cpu", "plots": False, "verbose": False, "project": tmp_path}
    theirs = YOLO(trained).val(data=str(upstreams), **kind).results_dict
    ours = evaluate(load(trained), tmp_path, batches_of(upstreams))
    assert ours[MAP50] > 0.15
    assert ours["fitness"] == ours[BOTH]
    for name in (MAP50, BOTH, "metrics/precision", "metrics/recall"):
        assert ours[name] == pytest.approx(theirs[f"{name}(B)"], abs=1e-3)


def test_losses_are_means_over_images(trained, shapes, tmp_path):
    """Not over batches: of the two, one has 4 images and one has 2."""

    def brightness(_: Any, batch: dict[str, Any]) -> tuple[None, dict[str, torch.Tensor]]:
        return None, {"pixel": batch["img"].mean()}

    pixels = torch.cat([batch["img"] for batch in batches_of(shapes)]) / 255
    found = evaluate(load(trained), tmp_path, batches_of(shapes), brightness)
    assert found["val/pixel"] == pytest.approx(pixels.mean().item(), rel=1e-5)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_together_find_what_one_finds(trained, shapes, tmp_path, size):
    """Of 3 ranks one has no image. An evaluator can be used again."""
    model, evaluator, sent = load(trained), adapter.Evaluator(hyp(), NAMES, CPU, tmp_path), {}

    def gather(rank: int, value: Any) -> list[Any]:
        sent[rank] = deepcopy(value)
        return [] if rank else [sent[each] for each in range(size)]

    def found(rank: int) -> dict[str, float]:
        ranks = SimpleNamespace(rank=rank, size=size, first=not rank, device=CPU, gather=lambda x: gather(rank, x))
        return evaluator.evaluate(model, batches_of(shapes, ranks), adapter.criterion_of(model, hyp()), ranks)

    assert not any(found(rank) for rank in range(1, size))
    assert found(0) == pytest.approx(evaluate(model, tmp_path, batches_of(shapes)), abs=1e-6)


@pytest.mark.parametrize(("kind", "kept"), [(adapter.PatientValidator, 4), (adapter.PatientValidator.__base__, 1)])
def test_no_image_is_dropped_for_lack_of_time(monkeypatch, tmp_path, kind, kept):
    """Upstream's own validator drops those that are left when its time is up."""
    clock = iter(range(0, 10**6, 100))
    monkeypatch.setattr("ultralytics.utils.nms.time", SimpleNamespace(time=lambda: next(clock)))
    validator = kind(save_dir=tmp_path, args={"mode": "val", "task": "detect"})
    validator.end2end = False
    boxes = torch.tensor([20.0, 20, 10, 10, 0.9, 0, 0])[:, None].repeat(4, 1, 1)
    assert sum(len(found["conf"]) for found in validator.postprocess(boxes)) == kept


# ---- no network -----------------------------------------------------------------------------------------------------


def test_the_guard_of_these_tests_can_fail(attempts):
    with pytest.raises(OSError, match="no network in this test"):
        socket.create_connection(("localhost", 9))
    assert attempts
    attempts.clear()


WATCHED = """
import atexit, runpy, sys
seen = []
asks = {"socket.connect", "socket.getaddrinfo", "socket.sendto"}
sys.addaudithook(lambda event, _: event in asks and seen.append(event))
atexit.register(lambda: print("seen", seen))
"""


@pytest.mark.slow
@pytest.mark.parametrize("asks", [False, True])
def test_a_fresh_process_asks_for_no_network(shapes, tmp_path, asks):
    """Not in a whole run of the app. Upstream alone does when it is imported."""
    words = arguments(shapes, tmp_path, "--do_prune", epochs=1)
    ours = f"sys.argv[:] = {[str(SCRIPT), *words]}\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-W", "ignore", "-c", WATCHED + ("import ultralytics.utils" if asks else ours)]
    set_here = ("YOLO_", "ULTRALYTICS_", "PYTEST_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(set_here)}
    kind = {"cwd": ROOT, "env": environment | {"OMP_NUM_THREADS": "1"}, "timeout": 300, "text": True}
    done = subprocess.run(command, capture_output=True, check=False, **kind)
    assert done.returncode == 0, done.stderr
    assert ("seen []" not in done.stdout) == asks, done.stdout
    assert asks or (tmp_path / "exp/weights/best.pt").exists()


# ---- upstream's own loop --------------------------------------------------------------------------------------------


def upstream_run(file: Path, **changes: Any) -> dict[str, Any]:
    kind = {"data": str(file), "epochs": 3, "imgsz": 64, "batch": 8, "nbs": 8, "warmup_epochs": 1, "device": "cpu"}
    return {**kind, "plots": False, "workers": 0, "project": str(file.parent.parent), "name": "x", **changes}


@pytest.mark.slow
def test_upstreams_loop_reaches_the_target(upstreams, monkeypatch):
    """The best model is the best of those that have reached it, and exactly as sparse as asked."""
    from ultralytics import YOLO

    fitness = iter([0.5, 0.9, 0.3, 0.2, 0.0])  # dense, between, target, cooldown; and best.pt once more at the end
    monkeypatch.setattr("ultralytics.utils.metrics.DetMetrics.fitness", property(lambda _: next(fitness)))
    config, saved = {"target_sparsity": 0.6, "pattern": "1x1", "pruning_type": "magnitude"}, []
    upstream = YOLO(TINY)
    upstream.add_callback("on_model_save", lambda made: saved.append((made.pruner.done, made.best.exists())))
    upstream.train(trainer=pruning_trainer(config, cooldown_epochs=1), **upstream_run(upstreams, epochs=4))
    assert saved == [(False, False), (False, False), (True, True), (True, True)]
    masks, folder = upstream.trainer.pruner.masks(), upstream.trainer.wdir
    total = sum(mask.numel() for mask in masks.values())
    for name, share, quality in (("best", 0.6, 0.3), ("last", 0.6, 0.2), ("best_dense", 0, 0.5)):
        model = load(folder / f"{name}.pt")
        assert sum(int((model.get_parameter(each) == 0).sum()) for each in masks) == round(share * total)
        assert adapter.content_of(folder / f"{name}.pt")["train_metrics"]["fitness"] == quality
    assert not any(".dfl." in name for name in masks)


@pytest.mark.parametrize("changes", [{}, {"resume": "trained"}, {"world_size": 2}])
def test_what_upstreams_loop_cannot_do(upstreams, trained, changes):
    resume = {"resume": str(trained)} if "resume" in changes else {}
    kind = pruning_trainer({}, cooldown_epochs=1 if changes else 3)
    trainer = kind(overrides=upstream_run(upstreams, model=TINY, **resume))
    trainer.world_size = changes.get("world_size", 0)
    message = {"": "--cooldown_epochs: must be below --epochs 3, got 3", "resume": "resume: .*save its masks"}
    message["world_size"] = "device: this trainer runs one process, got 2"
    with pytest.raises(BadInput, match=f"^{message[''.join(changes)]}"):
        trainer.train()
