"""The contract with ultralytics: what ``ultralytics_adapter.py`` takes from it is as this app relies on it."""

from __future__ import annotations

import ast
import os
import random
import re
import socket
import subprocess
import sys
import urllib.request
from copy import deepcopy
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from yolov5_app import ROOT, TINY

from apps.common.errors import BadInput
from apps.common.ranks import Ranks
from apps.yolov5 import ultralytics_adapter as adapter
from apps.yolov5.data_set import ValBatches, read_data, to_device
from apps.yolov5.hyp import KEYS
from apps.yolov5.pruning import reached, target_reached
from apps.yolov5.trainer import pruning_trainer
from data.shapes_detection import make

CPU = torch.device("cpu")
ONE = Ranks(0, 1, 0, CPU)
NAMES = {0: "circle", 1: "square", 2: "triangle"}
COCO = {i: f"class{i}" for i in range(80)}
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


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("shapes") / "set", train=12, val=6, size=64)


def hyp(**changes: Any) -> SimpleNamespace:
    return adapter.hyperparameters({"imgsz": 64, **changes})


def images(file: Path, split: str = "val", cache: bool = False, **changes: Any) -> adapter.Images:
    paths = getattr(read_data(str(file)), split)
    kind = {"names": NAMES, "hyp": hyp(**changes), "size": 64, "batch": 4, "stride": 32}
    return adapter.images(paths, split=split, cache=cache, **kind)


def batches_of(file: Path, ranks: Any = ONE) -> ValBatches:
    """4 and 2 images."""
    return ValBatches(images(file), 0, ranks)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shapes) -> Path:
    """A checkpoint of the tiny model that has learned something of the validation images."""
    torch.manual_seed(0)
    model = adapter.new_model(TINY, NAMES).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.3  # a short training needs statistics at its end, too
    criterion = adapter.criterion_of(model, hyp())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.005)
    batches = [to_device(batch, CPU) for batch in batches_of(shapes)]
    for _ in range(30):
        for batch in batches:
            optimizer.zero_grad()
            criterion(model(batch["img"]), batch)[0].sum().backward()
            optimizer.step()
    path = tmp_path_factory.mktemp("trained") / "model.pt"
    adapter.save_model(model, path, arguments=vars(hyp()), metrics={}, epoch=30)
    return path


@pytest.fixture
def tiny() -> adapter.Model:
    return adapter.new_model(TINY, NAMES)


def save(model: nn.Module, path: Path) -> Path:
    adapter.save_model(model, path, arguments=vars(hyp()), metrics={"metrics/mAP50": 0.5}, epoch=7)
    return path


# ---- the package ----------------------------------------------------------------------------------------------------


def test_the_supported_versions_are_those_of_the_requirements():
    bounds = re.search(r"^ultralytics>=([\d.]+),<([\d.]+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert bounds.groups() == adapter.SUPPORTED
    adapter.check_version()


@pytest.mark.parametrize("number", ["8.4.100", "8.4.190", "8.4.100.post1", "8.4.1000"])
def test_a_tested_version(monkeypatch, number):
    monkeypatch.setattr(adapter, "version", lambda _: number)
    adapter.check_version()


@pytest.mark.parametrize("number", ["8.4.99", "8.4", "8.3.200", "7.0", "8.5", "8.5.0", "8.5.0rc1", "8.10.0", "9.0.0"])
def test_a_version_that_was_never_tested(monkeypatch, number):
    monkeypatch.setattr(adapter, "version", lambda _: number)
    do = "pip install 'ultralytics>=8.4.100,<8.5'"
    with pytest.raises(BadInput, match=re.escape(f"never tested here, got {number}; {do}") + "$"):
        adapter.check_version()


def importers(root: Path) -> set[str]:
    """The files that import ultralytics, by a statement or by a call such as ``import_module``."""
    found = set()
    for folder in ("apps", "pruning_core", "data", "benchmarks"):
        for file in (root / folder).rglob("*.py"):
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


@pytest.mark.parametrize(
    ("text", "imports"),
    [
        ("import ultralytics", True),
        ("import os, ultralytics.nn.tasks as tasks", True),
        ("def f():\n    from ultralytics.utils import nms", True),
        ("import importlib\nimportlib.import_module('ultralytics.nn')", True),
        ("__import__('ultralytics')", True),
        ('"""import ultralytics"""\nfrom apps.yolov5 import ultralytics_adapter', False),
        ("import ultralytics_adapter\nprint('ultralytics')", False),
    ],
)
def test_the_walk_sees_imports(tmp_path, text, imports):
    (tmp_path / "benchmarks/deep").mkdir(parents=True)
    (tmp_path / "benchmarks/deep/file.py").write_text(text)
    assert importers(tmp_path) == ({"benchmarks/deep/file.py"} if imports else set())


# ---- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [(f"yolov5{scale}", f"yolov5{scale}.yaml") for scale in "nsmlx"]
    + [(name, "yolov5s-p6.yaml") for name in ("yolov5s6", "yolov5s-p6", "yolov5s6.yaml", "yolov5s6u", "yolov5s-p6.yml")]
    + [
        (name, "yolov5s.yaml")
        for name in ("yolov5su", "yolov5s.yaml", "yolov5s.yml", "yolov5su.yaml", "models/yolov5s")
    ]
    + [(TINY, TINY)],
)
def test_the_spellings_of_a_model(name, expected):
    assert adapter.architecture(name) == expected


@pytest.mark.parametrize(
    "name", ["", "yolov5", "yolov5t", "yolov5s7", "yolov8n", "yolov5s.pt", "yolov5s.yaml.bak", "no.yaml"]
)
def test_no_such_model(name):
    with pytest.raises(BadInput, match=f"--cfg: no such model, got '{re.escape(name)}'; use yolov5n, .*yolov5s6"):
        adapter.architecture(name)


@pytest.mark.parametrize("name", ["yolov5s6.yaml", "yolov5su.yaml", "yolov5/menu.yaml"])  # upstream would rename them
def test_a_yaml_file_is_taken_as_it_is_named(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(Path(TINY).read_text().replace("  n: [", "  s: [") + "mark: mine\n")
    model = adapter.new_model(str(path), NAMES)
    assert (model.yaml["mark"], model.yaml["yaml_file"]) == ("mine", str(path))


@pytest.mark.parametrize(
    "text", ["", "a", "[1]", "a: [", "nc: 3", "backbone: []\nhead: []", "backbone: [[-1, 1, Evil, []]]"]
)
def test_a_yaml_file_that_is_no_model(tmp_path, text):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(BadInput, match=r"^--cfg: upstream cannot build it \(.*\), got .*/bad.yaml; see yolov5n.yaml$"):
        adapter.new_model(str(tmp_path / "bad.yaml"), NAMES)


@pytest.mark.parametrize(
    ("name", "parameters", "head", "strides"),
    [
        ("yolov5n", 2_654_816, "model.24", [8, 16, 32]),
        ("yolov5s", 9_153_152, "model.24", [8, 16, 32]),
        ("yolov5s6", 15_309_328, "model.33", [8, 16, 32, 64]),
    ],
)
def test_the_models_are_the_known_ones(name, parameters, head, strides):
    model = adapter.new_model(name, COCO)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert adapter.head_of(model) == head
    assert type(model.get_submodule(head)).__name__ == "Detect"
    assert model.stride.tolist() == strides
    assert adapter.largest_stride(model) == strides[-1]
    assert adapter.class_names(model) == COCO


@pytest.mark.parametrize("name", [TINY, "yolov5n6"])
def test_the_raw_outputs_of_the_head(name):
    model = adapter.new_model(name, NAMES)
    head = model.get_submodule(adapter.head_of(model))
    neck = {}
    for index in head.f:
        model.model[index].register_forward_hook(lambda *call, index=index: neck.update({index: call[2]}))
    image = torch.rand(2, 3, 128, 192)
    points = sum(128 * 192 // int(stride) ** 2 for stride in model.stride)

    training = model.train()(image)
    assert set(training) == {"boxes", "scores", "feats"}
    inference = model.eval()(image)
    assert isinstance(inference, tuple)
    assert inference[0].shape == (2, 4 + len(NAMES), points)
    for outputs in (training, inference):
        found = adapter.detections(outputs)
        assert found.scores.shape == (2, len(NAMES), points)
        assert found.bins.shape == (2, 4 * head.reg_max, points)
        sizes = [tuple(feature.shape[2:]) for feature in found.features]
        assert sizes == [(128 // int(stride), 192 // int(stride)) for stride in head.stride]
        assert sum(height * width for height, width in sizes) == points
    for feature, index in zip(adapter.detections(inference).features, head.f, strict=True):
        assert feature.equal(neck[index])
    assert torch.equal(inference[0][:, 4:], adapter.detections(inference).scores.sigmoid())


def test_bins_lie_side_by_side(tiny):
    head = tiny.model[-1]
    bins = 3 * torch.randn(2, 4 * head.reg_max, 5)
    expected = (bins.unflatten(1, (4, -1)).softmax(2) * torch.arange(head.reg_max)[:, None]).sum(2)
    torch.testing.assert_close(expected, head.dfl(bins))


def test_nothing_is_frozen_but_the_distances(tiny, tmp_path):
    loaded = adapter.load_model(save(tiny.requires_grad_(False), tmp_path / "a.pt"), "--weights")
    for model in (adapter.new_model(TINY, NAMES), adapter.trainable_copy(loaded, NAMES)):
        frozen = {name: value for name, value in model.named_parameters() if not value.requires_grad}
        assert list(frozen) == [f"{adapter.head_of(model)}.dfl.conv.weight"]
        assert frozen.popitem()[1].flatten().tolist() == list(range(model.model[-1].reg_max))


def test_a_trainable_copy_has_the_weights_and_shares_none(trained):
    loaded = adapter.load_model(trained, "--weights")
    copy = adapter.trainable_copy(loaded, NAMES)
    for (name, ours), theirs in zip(copy.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert ours.equal(theirs), name
        assert ours.data_ptr() != theirs.data_ptr()


# ---- hyperparameters and loss ---------------------------------------------------------------------------------------


def test_our_hyperparameters_are_known_upstream():
    default = vars(adapter.hyperparameters({}))
    assert vars(adapter.hyperparameters({key: default[key] for key in KEYS})) == default
    assert adapter.hyperparameters({"lr0": 0.125}).lr0 == 0.125


@pytest.mark.parametrize("values", [{"lr0": "fast"}, {"box": None}, {"mosaic": 2.0}, {"close_mosaic": 1.5}, {"lrO": 1}])
def test_a_bad_hyperparameter(values):
    with pytest.raises(BadInput, match=f"^--hyp: .*{next(iter(values))}.*; see ultralytics' default.yaml$"):
        adapter.hyperparameters(values)


@pytest.fixture(scope="module")
def batch(shapes) -> dict[str, Any]:
    return to_device(next(iter(batches_of(shapes))), CPU)


def losses(model: adapter.Model, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return adapter.criterion_of(model, hyp())(model(batch["img"]), batch)


def test_the_parts_of_the_loss(trained, batch):
    model = adapter.load_model(trained, "--weights")
    parts, items = losses(model.train(), batch)
    assert list(items) == ["box_loss", "cls_loss", "dfl_loss"]
    torch.testing.assert_close(parts, len(batch["img"]) * torch.stack(list(items.values())))
    assert (parts > 0).all()
    assert torch.equal(losses(model.eval(), batch)[0], losses(model, batch)[0])  # the outputs of eval mode do as well


def test_the_loss_is_a_sum_over_images(trained, batch):
    """Twice the images, twice the loss: the gradients of ranks are averaged, so the loop multiplies by their number."""
    model = adapter.load_model(trained, "--weights")
    twice = {name: torch.cat([batch[name]] * 2) for name in ("img", "cls", "bboxes")}
    twice["batch_idx"] = torch.cat([batch["batch_idx"], batch["batch_idx"] + len(batch["img"])])
    once_parts, once_items = losses(model, batch)
    parts, items = losses(model, twice)
    torch.testing.assert_close(parts, 2 * once_parts)
    torch.testing.assert_close(items, once_items)


def test_the_loss_of_a_batch_without_objects(tiny, batch):
    empty = {"img": batch["img"], "cls": torch.zeros(0, 1), "bboxes": torch.zeros(0, 4), "batch_idx": torch.zeros(0)}
    parts, _ = losses(tiny.train(), empty)
    assert parts[1] > 0
    assert parts[[0, 2]].tolist() == [0, 0]
    parts.sum().backward()
    assert all(torch.isfinite(value.grad).all() for value in tiny.parameters() if value.requires_grad)


def test_gradients_reach_all_that_trains(tiny, shapes):
    for each in batches_of(shapes):
        losses(tiny.train(), to_device(each, CPU))[0].sum().backward()
    for name, parameter in tiny.named_parameters():
        assert not parameter.requires_grad or parameter.grad.abs().sum() > 0, name


def test_the_moving_average(tiny):
    ema = adapter.Ema(tiny)
    start = {name: value.clone() for name, value in ema.ema.state_dict().items()}
    assert not any(value.requires_grad for value in ema.ema.parameters())
    with torch.no_grad():
        for value in tiny.parameters():
            value += torch.rand_like(value)
    assert all(value.equal(start[name]) for name, value in ema.ema.state_dict().items())  # a copy
    for updates in (1, 2):
        before = {name: value.clone() for name, value in ema.ema.named_parameters()}
        ema.update(tiny)
        assert ema.updates == updates
        for (name, value), target in zip(ema.ema.named_parameters(), tiny.parameters(), strict=True):
            far = (target - before[name]).abs()
            assert ((target - value).abs() <= far).all(), name
            assert ((target - value).abs().sum() < far.sum()) or not far.any(), name
    ema.ema.load_state_dict(start)  # as a resumed run does
    ema.update(tiny)
    assert not ema.ema.model[0].conv.weight.equal(start["model.0.conv.weight"])


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def test_upstream_reads_what_is_saved(tiny, shapes, tmp_path):
    from ultralytics import YOLO

    with torch.no_grad():
        tiny.model[1].conv.weight[:, ::2] = 0
    zeros = tiny.model[1].conv.weight == 0
    path = save(tiny, tmp_path / "model.pt")
    content = adapter.content_of(path)
    assert (content["epoch"], content["train_metrics"]) == (7, {"metrics/mAP50": 0.5})
    assert content["train_args"] == vars(hyp())
    assert content["version"] == version("ultralytics")
    assert {value.dtype for value in content["model"].parameters()} == {torch.float16}
    picture = next(shapes.parent.glob("images/val/*.png"))
    upstream = YOLO(path)
    (result,) = upstream.predict(picture, imgsz=64, device="cpu", verbose=False, project=tmp_path, conf=1e-4)
    assert result.names == NAMES
    assert len(result.boxes)
    loaded = adapter.load_model(path, "--weights")
    assert {value.dtype for value in loaded.parameters()} == {torch.float32}
    assert not loaded.training
    assert adapter.class_names(loaded) == NAMES
    assert (loaded.model[1].conv.weight == 0).equal(zeros)
    for name, value in loaded.state_dict().items():
        torch.testing.assert_close(value, tiny.state_dict()[name].half().to(value.dtype), rtol=0, atol=0)


def test_saving_leaves_the_model_alone(tiny, tmp_path):
    tiny.train().criterion = adapter.criterion_of(tiny, hyp())
    criterion, settings, before = tiny.criterion, tiny.args, deepcopy(tiny.state_dict())
    save(tiny, tmp_path / "model.pt")
    assert tiny.training
    assert tiny.criterion is criterion
    assert tiny.args is settings
    assert all(
        value.equal(before[name]) and value.dtype == before[name].dtype for name, value in tiny.state_dict().items()
    )


def test_what_fp16_cannot_hold_is_finite(tiny, tmp_path):
    with torch.no_grad():
        tiny.model[0].conv.weight[0, 0, 0, 0] = 1e6
    loaded = adapter.load_model(save(tiny, tmp_path / "model.pt"), "--weights")
    assert loaded.model[0].conv.weight[0, 0, 0, 0] == torch.finfo(torch.float16).max


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


@pytest.mark.parametrize("name", ["yolov5s.pt", "it's.pt", "yolov5n6.pt"])  # upstream looks for yolov5su.pt and its.pt
def test_a_file_is_loaded_under_the_name_it_has(tiny, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    save(tiny, Path(name))
    adapter.load_model(name, "--weights")
    assert adapter.content_of(Path(name))["epoch"] == 7


class Foreign:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "code was run")


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    torch.save({"model": Foreign(tmp_path / "proof")}, tmp_path / "foreign.pt")
    with pytest.raises(
        BadInput, match=r"^--weights: not an ultralytics model \(.*\), got '.*/foreign.pt'; use a .pt of"
    ):
        adapter.load_model(tmp_path / "foreign.pt", "--weights")
    assert not (tmp_path / "proof").exists()
    torch.load(tmp_path / "foreign.pt", weights_only=False)
    assert (tmp_path / "proof").exists()  # so it was loadable


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "flipped", "state dict", "another model", "nothing"])
def test_no_checkpoint(tiny, tmp_path, damage):
    path = save(tiny, tmp_path / "model.pt")
    content = path.read_bytes()
    pickled = {"state dict": tiny.state_dict(), "another model": nn.Linear(2, 2), "nothing": None}
    if damage in pickled:
        torch.save({"model": pickled[damage]}, path)
    else:
        flipped = bytes(255 - byte for byte in content[-2000:])
        damaged = {"empty": b"", "text": b"hello\n", "cut": content[:-3000], "flipped": content[:-2000] + flipped}
        path.write_bytes(damaged[damage])
    with pytest.raises(BadInput, match=r"^--teacher_weights: .*, .*; use a .*"):
        adapter.load_model(path, "--teacher_weights")


# ---- images ---------------------------------------------------------------------------------------------------------


def item(dataset: adapter.Images, index: int, seed: int = 3) -> dict[str, Any]:
    random.seed(seed)
    np.random.seed(seed)
    return dataset[index]


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[name].equal(other[name]) for name in ("img", "cls", "bboxes"))


def test_mosaic_draws_from_the_whole_set(shapes, monkeypatch):
    fresh, used = images(shapes, "train", mosaic=1.0), images(shapes, "train", mosaic=1.0)
    loaded = []
    load = used.load_image
    monkeypatch.setattr(
        used, "load_image", lambda index, *rest, **kind: loaded.append(index) or load(index, *rest, **kind)
    )
    for seed in range(12):
        item(used, 0, seed)
    assert set(loaded) == set(range(12))  # not only what was loaded before
    assert not used.buffer
    assert same(item(fresh, 1), item(used, 1))
    assert not same(item(fresh, 1), item(fresh, 1, seed=4))


def test_the_cache_changes_no_pixel_and_writes_no_file(shapes):
    before = {path: path.stat().st_mtime_ns for path in shapes.parent.rglob("*")}
    for split in ("train", "val"):
        cached, plain = images(shapes, split, cache=True), images(shapes, split)
        assert all(same(item(cached, index), item(plain, index)) for index in range(len(plain)))
        assert all(image is not None for image in cached.ims)
        assert all(image is None for image in plain.ims)
    assert {path: path.stat().st_mtime_ns for path in shapes.parent.rglob("*")} == before


def test_closing_the_mosaic(shapes):
    settings = {"mosaic": 1.0, "degrees": 0.0, "scale": 0.0, "translate": 0.0, "fliplr": 0.0}
    settings |= {"hsv_h": 0.0, "hsv_s": 0.0, "hsv_v": 0.0}
    dataset, kept = images(shapes, "train", **settings), hyp(**settings)
    mixed = item(dataset, 0)
    adapter.close_mosaic(dataset, kept)
    closed = item(dataset, 0)
    assert kept.mosaic == 1.0  # not the caller's
    assert not same(mixed, closed)
    assert len(closed["cls"]) == len(dataset.labels[0]["cls"])
    assert same(closed, item(images(shapes, "train", **{**settings, "mosaic": 0.0}), 0))


# ---- metrics --------------------------------------------------------------------------------------------------------


def evaluate(model: nn.Module, folder: Path, batches: Any, criterion: Any = None, ranks: Any = ONE) -> dict[str, float]:
    evaluator = adapter.Evaluator(hyp(), NAMES, CPU, folder)
    return evaluator.evaluate(model, batches, criterion or adapter.criterion_of(model, hyp()), ranks)


def test_the_metrics_are_those_of_upstream(trained, tmp_path, monkeypatch):
    from ultralytics import YOLO

    monkeypatch.setattr("ultralytics.data.utils.check_font", lambda *_: None)  # upstream asks the network for a font
    file = make(tmp_path / "set", train=1, val=6, size=64)  # upstream leaves a cache there
    kind = {"imgsz": 64, "batch": 4, "device": "cpu", "plots": False, "verbose": False, "project": tmp_path}
    theirs = YOLO(trained).val(data=str(file), **kind)
    ours = evaluate(adapter.load_model(trained, "--weights"), tmp_path, batches_of(file))
    assert ours[MAP50] > 0.15
    assert ours[MAP50] == pytest.approx(theirs.box.map50, abs=1e-3)
    assert ours[BOTH] == ours["fitness"] == pytest.approx(theirs.box.map, abs=1e-3)
    for name in ("precision", "recall"):
        assert ours[f"metrics/{name}"] == pytest.approx(theirs.results_dict[f"metrics/{name}(B)"], abs=1e-3)


class Oracle(nn.Module):
    """Gives the boxes of the labels, in the order of the batches."""

    names = NAMES

    def __init__(self, batches: ValBatches) -> None:
        super().__init__()
        self.answers = [self.answer(to_device(batch, CPU)) for batch in batches]

    def answer(self, batch: dict[str, Any]) -> torch.Tensor:
        height, width = batch["img"].shape[2:]
        found = torch.zeros(len(batch["img"]), 4 + len(NAMES), len(batch["cls"]))
        for point, (image, kind) in enumerate(zip(batch["batch_idx"].long(), batch["cls"].long(), strict=True)):
            found[image, :4, point] = batch["bboxes"][point] * torch.tensor([width, height, width, height])
            found[image, 4 + kind, point] = 0.9
        return found

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.answers.pop(0), None


def brightness(outputs: Any, batch: dict[str, Any]) -> tuple[None, dict[str, torch.Tensor]]:
    return None, {"brightness": batch["img"].mean()}


def test_perfect_boxes_have_a_perfect_score(shapes, tmp_path):
    found = evaluate(Oracle(batches_of(shapes)), tmp_path, batches_of(shapes), brightness)
    assert found[MAP50] == found[BOTH] == pytest.approx(0.995)
    assert found["metrics/recall"] == 1
    assert set(found) == {MAP50, BOTH, "metrics/precision", "metrics/recall", "fitness", "val/brightness"}


def test_losses_are_means_over_images(shapes, tmp_path):
    """Not over batches: of the two, one has 4 images and one has 2."""
    each = torch.cat([batch["img"] for batch in batches_of(shapes)]) / 255
    found = evaluate(Oracle(batches_of(shapes)), tmp_path, batches_of(shapes), brightness)
    assert found["val/brightness"] == pytest.approx(each.mean().item(), rel=1e-5)


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_together_find_what_one_finds(trained, shapes, tmp_path, size):
    """Of 3 ranks one has no image."""
    model = adapter.load_model(trained, "--weights")
    one = evaluate(model, tmp_path, batches_of(shapes))
    sent: dict[int, Any] = {}

    def gather(rank: int, value: Any) -> list[Any]:
        sent[rank] = deepcopy(value)
        return [] if rank else [sent[each] for each in range(size)]

    for rank in reversed(range(size)):
        ranks = SimpleNamespace(
            rank=rank, size=size, first=not rank, device=CPU, gather=lambda x, rank=rank: gather(rank, x)
        )
        found = evaluate(model, tmp_path, batches_of(shapes, ranks), ranks=ranks)
        assert bool(found) == ranks.first
    assert found == pytest.approx(one, abs=1e-6)


def test_an_evaluator_can_be_used_again(trained, shapes, tmp_path):
    model = adapter.load_model(trained, "--weights")
    evaluator = adapter.Evaluator(hyp(), NAMES, CPU, tmp_path)
    criterion = adapter.criterion_of(model, hyp())
    first, second = (evaluator.evaluate(model, batches_of(shapes), criterion, ONE) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(("kind", "kept"), [(adapter.PatientValidator, 4), (adapter.PatientValidator.__base__, 1)])
def test_no_image_is_dropped_for_lack_of_time(shapes, monkeypatch, tmp_path, kind, kept):
    """Upstream's own validator drops those that are left when its time is up."""
    clock = iter(range(0, 10**6, 100))
    monkeypatch.setattr("ultralytics.utils.nms.time", SimpleNamespace(time=lambda: next(clock)))
    validator = kind(save_dir=tmp_path, args={"mode": "val", "task": "detect"})
    validator.end2end = False
    boxes = torch.tensor([20.0, 20, 10, 10, 0.9, 0, 0])[:, None].repeat(4, 1, 1)
    assert sum(len(found["conf"]) for found in validator.postprocess(boxes)) == kept


# ---- no network -----------------------------------------------------------------------------------------------------


def test_the_guard_of_these_tests_can_fail(attempts):
    for ask in (
        lambda: socket.create_connection(("localhost", 9)),
        lambda: urllib.request.urlopen("http://localhost:9"),
    ):
        with pytest.raises(OSError, match="no network in this test"):
            ask()
        assert attempts
        attempts.clear()


WATCHED = """
import sys
seen = []
sys.addaudithook(lambda event, _: event in {"socket.connect", "socket.getaddrinfo", "socket.sendto"} and seen.append(event))
"""
WHOLE_RUN = """
from pathlib import Path
from apps.common.ranks import Ranks
from apps.yolov5 import ultralytics_adapter as adapter
import torch
from apps.yolov5.data_set import ValBatches, read_data
from ultralytics.utils import ONLINE
assert not ONLINE
file, folder = Path(sys.argv[1]), Path(sys.argv[2])
data, hyp, ranks = read_data(str(file)), adapter.hyperparameters({"imgsz": 64}), Ranks(0, 1, 0, torch.device("cpu"))
model = adapter.new_model("yolov5n", data.names)
kind = {"names": data.names, "hyp": hyp, "size": 64, "stride": 32, "cache": False, "batch": 4}
adapter.images(data.train, split="train", **kind)[0]
batches = ValBatches(adapter.images(data.val, split="val", **kind), 0, ranks)
evaluator = adapter.Evaluator(hyp, data.names, ranks.device, folder)
evaluator.evaluate(model, batches, adapter.criterion_of(model, hyp), ranks)
adapter.save_model(model, folder / "yolov5n.pt", arguments={}, metrics={}, epoch=0)
adapter.load_model(folder / "yolov5n.pt", "--weights")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("script", "asks"), [(WHOLE_RUN, False), ("import ultralytics.utils", True)])
def test_a_fresh_process_asks_for_no_network(shapes, tmp_path, script, asks):
    """As upstream alone does when it is imported."""
    ours = ("YOLO_", "ULTRALYTICS_", "PYTEST_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    command = [sys.executable, "-c", f"{WATCHED}{script}\nprint('seen', seen)", str(shapes), str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert ("seen []" not in done.stdout) == asks, done.stdout


# ---- upstream's own loop --------------------------------------------------------------------------------------------


@pytest.fixture
def upstream_run(tmp_path, monkeypatch) -> dict[str, Any]:
    monkeypatch.setattr("ultralytics.data.utils.check_font", lambda *_: None)  # upstream asks the network for a font
    file = make(tmp_path / "set", train=12, val=6, size=64)  # upstream leaves a cache there
    run = {"data": str(file), "epochs": 3, "imgsz": 64, "batch": 8, "nbs": 8, "device": "cpu", "plots": False}
    return run | {"workers": 0, "warmup_epochs": 1, "project": str(tmp_path), "name": "x"}


@pytest.mark.slow
def test_upstreams_loop_reaches_the_target(upstream_run):
    from ultralytics import YOLO

    config = {"target_sparsity": 0.6, "pattern": "1x1", "pruning_type": "magnitude"}
    saved = []
    upstream = YOLO(TINY)
    upstream.add_callback("on_model_save", lambda t: saved.append((target_reached(t.pruner), t.best.exists())))
    upstream.train(trainer=pruning_trainer(config, cooldown_epochs=1), **upstream_run)
    trainer = upstream.trainer
    assert saved == [(False, False), (True, True), (True, True)]
    best, last, dense = (adapter.load_model(trainer.wdir / f"{n}.pt", "") for n in ("best", "last", "best_dense"))
    names = trainer.pruner.masks()
    assert not any(".dfl." in name for name in names)
    total = sum(best.get_parameter(name).numel() for name in names)
    for model in (best, last):
        zeros = sum(int((model.get_parameter(name) == 0).sum()) for name in names)
        assert zeros == round(0.6 * total)
        assert reached(trainer.pruner, model) == pytest.approx(0.6, abs=1 / total)
    assert all((dense.get_parameter(name) != 0).float().mean() > 0.999 for name in names)


@pytest.mark.parametrize(
    ("changes", "cooldown", "message"),
    [
        ({}, 3, "--cooldown_epochs: must be below --epochs 3, got 3"),
        ({}, -1, "--cooldown_epochs: must not be negative, got -1"),
        ({"resume": "trained"}, 1, "resume: this trainer does not save its masks"),
        ({"ranks": 2}, 1, "device: this trainer runs one process, got 2"),
    ],
)
def test_what_upstreams_loop_cannot_do(upstream_run, trained, changes, cooldown, message):
    resume = {"resume": str(trained)} if "resume" in changes else {}
    trainer = pruning_trainer({}, cooldown_epochs=cooldown)(overrides={"model": TINY, **upstream_run, **resume})
    trainer.world_size = changes.get("ranks", trainer.world_size)
    with pytest.raises(BadInput, match=f"^{message}"):
        trainer.train()
