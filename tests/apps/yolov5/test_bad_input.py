"""What a user can do wrong: one line that says what to do, exit code 2, and nothing is written."""

from __future__ import annotations

import pickle
import random
import re
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from apps.common.errors import BadInput
from apps.common.ranks import Ranks
from apps.yolov5 import build as build_module
from apps.yolov5 import train_prune
from apps.yolov5 import ultralytics_adapter as adapter
from apps.yolov5.arguments import parser
from data.shapes_detection import make
from pruning_core import checkpoint
from tests.support import yolov5_app

NAMES = {0: "circle", 1: "square", 2: "triangle"}


class Foreign:
    """Like a class of somebody's training script. Reading it as a pickle leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, and the files that the tests below name. No test changes them, and no run may."""
    world = tmp_path_factory.mktemp("world")
    make(world / "set", train=10, val=5, size=64)
    for split in ("train", "val"):
        (world / f"no-{split}/images").mkdir(parents=True)
    (world / "folder").mkdir()
    (world / "empty.yaml").touch()
    (world / "broken.yaml").write_text("train: [\n")
    (world / "list.yaml").write_text("- train\n")
    _checkpoints(world)
    _architectures(world)
    _runs(world)
    return world


def _checkpoints(world: Path) -> None:
    def save(name: str, architecture: str, classes: int = 3) -> None:
        model = adapter.new_model(architecture, {i: NAMES[i] for i in range(classes)})
        adapter.save_model(model, world / name, arguments={}, metrics={}, epoch=0)

    save("good.pt", yolov5_app.TINY)
    save("two.pt", yolov5_app.TINY, classes=2)
    save("p6.pt", "yolov5n6")
    (world / "cut.pt").write_bytes((world / "good.pt").read_bytes()[:100_000])
    (world / "good.onnx").write_bytes((world / "good.pt").read_bytes())
    (world / "text.pt").write_text("hello")
    (world / "empty.pt").touch()
    torch.save(adapter.load_model(world / "good.pt", "").state_dict(), world / "state.pt")
    torch.save({"model": torch.nn.Linear(2, 2)}, world / "linear.pt")
    torch.save([1, 2, 3], world / "numbers.pt")
    torch.save({"model": Foreign(world / "touched"), "ema": None}, world / "foreign.pt")
    (world / "pickle.pt").write_bytes(pickle.dumps({"model": Foreign(world / "touched")}))


def _architectures(world: Path) -> None:
    layers = {
        "unknown-layer": "backbone: [[-1, 1, Foo, [3]]]\nhead: [[-1, 1, Detect, [nc]]]\n",
        "no-head": "backbone: [[-1, 1, Conv, [64, 3, 2]]]\nhead: []\n",
        "no-layers": "backbone: []\nhead: []\n",
        "no-stride": "backbone: [[-1, 1, Conv, [64, 3, 0]]]\nhead: [[[0], 1, Detect, [nc]]]\n",
        "code": f"backbone: [[-1, 1, \"open('{world}/touched', 'w')\", [3]]]\nhead: [[-1, 1, Detect, [nc]]]\n",
    }
    for name, text in layers.items():
        (world / f"{name}.yaml").write_text(f"nc: 3\n{text}")


def _runs(world: Path) -> None:
    """A finished run, one that was killed after its last epoch, and folders that are none of both."""
    words = yolov5_app.arguments(world / "set/data.yaml", world / "runs", epochs=1)
    assert yolov5_app.main([*words, "--name=finished", "--noplots"]) == 0

    def killed(*args):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_prune, "finish", killed)
        yolov5_app.main([*words, "--name=killed", "--noplots"])
    states = {"other-app": {"app": "bert", "options": {}, "model": {}, "progress": {}}, "no-state": {"epoch": 3}}
    for name, state in states.items():
        checkpoint.save(state, world / f"runs/{name}/weights/resume.pt")
    for name, content in {"garbage": b"\0garbage", "nothing": b""}.items():
        (world / f"runs/{name}/weights").mkdir(parents=True)
        (world / f"runs/{name}/weights/resume.pt").write_bytes(content)
    (world / "runs/foreign/weights").mkdir(parents=True)
    torch.save({"app": Foreign(world / "touched")}, world / "runs/foreign/weights/resume.pt")


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*"))}


@pytest.fixture
def refused(world, tmp_path, capsys):
    """The line on stderr of a run that must not begin. ``{world}`` stands for that folder."""

    def attempt(*more: str, data: Path | None = None) -> str:
        words = yolov5_app.arguments(data or world / "set/data.yaml", tmp_path / "project")
        before = state_of(world)
        code = yolov5_app.main([*words, *(word.replace("{world}", str(world)) for word in more)])
        err = capsys.readouterr().err
        assert code == 2
        assert err.endswith("\n")
        assert err.count("\n") == 1
        assert not (tmp_path / "project").exists()
        assert state_of(world) == before
        return err.removesuffix("\n")

    return attempt


def said(pattern: str, line: str) -> bool:
    """``{any}`` stands for whatever another package has to say."""
    return re.fullmatch(pattern.replace("{any}", ".+"), line) is not None


# ---- words ----------------------------------------------------------------------------------------------------------

WORDS = [
    (["--epoch=3"], r"--epoch: unknown option; did you mean '--epochs'\?"),
    (["--batch_size", "3"], r"--batch_size: unknown option; did you mean '--batch-size'\?"),
    (["--evolve"], r"--evolve: is no option here; leave it out"),
    (["--adam"], r"--adam: is no option here; write --optimizer Adam"),
    (["--local_rank=0"], r"--local_rank: is no option here; start with torchrun, which sets LOCAL_RANK"),
    (["data.yaml"], r"arguments: unexpected 'data.yaml'; every value follows an --option"),
    (["--epochs=0"], r"--epochs: must be at least 1, got 0"),
    (["--epochs=many"], r"--epochs: must be a whole number, got 'many'"),
    (["--epochs=1.5"], r"--epochs: must be a whole number, got '1.5'"),
    (["--batch-size=0"], r"--batch-size: must be at least 1, got 0"),
    (["--img=31"], r"--img/--imgsz/--img-size: must be at least 32, got 31"),
    (["--img=65"], r"--img: must be a multiple of 32, got 65; use 96"),
    (["--weights={world}/p6.pt", "--cfg=", "--img=96"], r"--img: must be a multiple of 64, got 96; use 128"),
    (["--workers=-1"], r"--workers: must be at least 0, got -1"),
    (["--seed=-1"], r"--seed: must be at least 0, got -1"),
    (["--seed=99999999999999999999"], r"--seed: must be at most \d+, got 99999999999999999999"),
    (["--save-period=x"], r"--save-period: must be a whole number, got 'x'"),
    (["--temperature=0"], r"--temperature: must be above 0, got 0"),
    (["--temperature=nan"], r"--temperature: must be finite, got nan"),
    (["--temperature=hot"], r"--temperature: must be a number, got 'hot'"),
    (["--dist_weight=-1"], r"--dist_weight: must be above 0, got -1"),
    (["--feature_weight=-1"], r"--feature_weight: must not be negative, got -1.0"),
    (["--feature_weight=0.1"], r"--feature_weight: does nothing without --dist_loss, got 0.1; add it"),
    (["--feature_weight=nan"], r"--feature_weight: must not be negative, got nan"),
    (["--optimizer=sgd"], r"--optimizer: must be one of SGD, Adam, AdamW, got 'sgd'(; did you mean .*)?"),
    (["--dist_loss=mse"], r"--dist_loss: must be one of l2, kl, got 'mse'"),
    (["--amp=fp8"], r"--amp: must be one of auto, fp16, bf16, off, got 'fp8'(; did you mean .*)?"),
    (["--name=a/b"], r"--name: must be a plain folder name, got 'a/b'; put the path into --project"),
    (["--name=.."], r"--name: must be a plain folder name, got '..'; put the path into --project"),
    (["--name="], r"--name: must be a plain folder name, got ''; put the path into --project"),
    (["--project={world}/good.pt"], r"--project: .+, got .*good.pt.*"),
    (["--device=gpu"], r"--device: unknown device, got gpu; use cpu, mps, cuda:0 or indices such as 0,1"),
    (["--freeze", "99"], r"--freeze: the model has 25 layers, numbered from 0, got 99; freeze fewer of them"),
    (["--freeze", "3", "25"], r"--freeze: the model has 25 layers, numbered from 0, got 3 25; freeze fewer of them"),
    (["--freeze", "25"], r"--freeze: .+"),  # every layer: nothing is left to train
    (["--freeze", "-1"], r"--freeze: must be at least 0, got -1"),
    (["--hyp={world}/no.yaml"], r"--hyp: no such file, got '.*no.yaml'; leave it out for the defaults"),
    (["--hyp={world}/list.yaml"], r"--hyp: must hold 'name: number' lines, got .*"),
    (["--hyp={world}/set/data.yaml"], r"--hyp: unknown key, got 'train'; .*"),
]


@pytest.mark.parametrize(("words", "message"), WORDS, ids=[" ".join(words) for words, _ in WORDS])
def test_words(refused, words, message):
    assert said(message, refused(*words))


@pytest.mark.parametrize("device", ["0", "cuda:0", "0,1"])
def test_no_cuda_device(refused, monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refused(f"--device={device}") == f"--device: no CUDA device here, got {device}; use --device cpu"


def test_the_batch_counts_all_ranks(world, tmp_path):
    words = yolov5_app.arguments(world / "set/data.yaml", tmp_path)
    three = Ranks(rank=0, size=3, local=0, device=torch.device("cpu"))
    with pytest.raises(BadInput) as caught:
        build_module._check(parser().parse_args(words), three)
    assert str(caught.value) == "--batch-size: counts all ranks and must divide by their number 3, got 4"


# ---- data -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("no.yaml", r"--data: no such file, got '.*no.yaml'; nothing is downloaded: .*"),
        ("folder", r"--data: not a yaml file \({any}\), got '.*folder'"),
        ("broken.yaml", r"--data: not a yaml file \({any}\), got '.*broken.yaml'"),
        ("empty.yaml", r"--data: must hold 'train:', .* got '.*empty.yaml'; data/shapes_detection.py makes one"),
        ("list.yaml", r"--data: must hold 'train:', .* got '.*list.yaml'; data/shapes_detection.py makes one"),
        ("good.pt", r"--data: not a yaml file \({any}\), got '.*good.pt'"),
    ],
)
def test_data_files(refused, world, data, message):
    assert said(message, refused(data=world / data))


def test_no_data(refused):
    assert said(r"--data: is missing; make a small set with python data/shapes_detection.py .*", refused("--data="))


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_empty_split(refused, world, tmp_path, split):
    places = {"train": "set/images/train", "val": "set/images/val", split: f"no-{split}/images"}
    data = tmp_path / "data.yaml"
    data.write_text(f"path: {world}\ntrain: {places['train']}\nval: {places['val']}\nnc: 3\n")
    assert said(rf"--data: {split}: {{any}}{world}/no-{split}/images{{any}}", refused(data=data))


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # upstream's check leaves it open
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("labels/{}/shapes-00002.txt", b"1 1.5 .5 .1 .1\n", r"non-normalized or out of bounds coordinates \[1\.5\]"),
        ("labels/{}/shapes-00002.txt", b"3 .5 .5 .1 .1\n", r"Label class 3 exceeds dataset class count 3.*"),
        ("labels/{}/shapes-00002.txt", b"1 .5 .5 .1\n", r"labels require 5 columns, 4 columns detected"),
        ("images/{}/shapes-00002.png", b"\x89PNG\r\n\x1a\n", r"{any}"),
    ],
)
def test_a_bad_image_or_label(refused, world, tmp_path, split, file, content, reason):
    folder = Path(shutil.copytree(world / "set", tmp_path / "set"))
    (folder / file.format(split)).write_bytes(content)
    image, do = folder / f"images/{split}/shapes-00002.png", "mend or remove the image and its label"
    assert said(rf"--data: {split}: {reason}, got {image}; {do}", refused(data=folder / "data.yaml"))


# ---- models ---------------------------------------------------------------------------------------------------------

NO_MODEL = (
    r"--weights: not an ultralytics model \({any}\), got '.*{file}'; use a .pt of ultralytics 8 or of this app .*"
)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("no.pt", r"--weights: no such file, got '.*no.pt'; nothing is downloaded: .*"),
        ("folder", r"--weights: no such file, got '.*folder'; nothing is downloaded: .*"),
        ("good.onnx", r"--weights: must be a .pt checkpoint, got '.*good.onnx'; use --cfg for a model yaml"),
        ("two.pt", r"--weights: the data have 3 classes, got 2 in .*two.pt; give --cfg as well, to begin with a .*"),
        ("linear.pt", r"--weights: must hold a detection model, got Linear; use a yolov5 checkpoint"),
        *((f"{name}.pt", NO_MODEL) for name in ("text", "empty", "cut", "state", "numbers", "foreign", "pickle")),
    ],
)
def test_weights(refused, world, file, message):
    with warnings.catch_warnings(record=True) as warned:  # these are lines on stderr, too
        warnings.simplefilter("always")
        assert said(message.replace("{file}", file), refused("--cfg=", f"--weights={world / file}"))
    assert [str(warning.message) for warning in warned] == []
    assert not (world / "touched").exists()


def test_damaged_bytes_are_bad_input_or_harmless(world, tmp_path):
    content, chance = (world / "good.pt").read_bytes(), random.Random(0)
    end = content.index(b"PK\x03\x04", 1)  # of the pickle, the first file in the archive
    outcomes = set()
    for _ in range(60):
        damaged = bytearray(content)
        for _ in range(chance.randint(1, 3)):
            damaged[chance.randrange(64, end)] = chance.randrange(256)
        (tmp_path / "damaged.pt").write_bytes(damaged)
        try:
            outcomes.add(type(adapter.load_model(tmp_path / "damaged.pt", "--weights")))
        except BadInput as error:
            outcomes.add(type(error))
            assert "\n" not in str(error)
    assert outcomes == {BadInput, adapter.Model}


@pytest.mark.slow
@pytest.mark.parametrize(("first", "safe"), [("pass", ""), ("import ultralytics.nn.tasks", ""), ("pass", "false")])
def test_no_pickled_code_is_run_whatever_was_imported_before(world, first, safe):
    """Upstream reads its settings from the environment once, when it is imported."""
    code = (
        f"{first}; from apps.yolov5 import ultralytics_adapter as it; it.load_model({str(world / 'foreign.pt')!r}, '')"
    )
    environment = {key: value for key, value in yolov5_app.ENVIRONMENT.items() if key != "ULTRALYTICS_SAFE_LOAD"}
    environment |= {"ULTRALYTICS_SAFE_LOAD": safe} if safe else {}
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=yolov5_app.ROOT, env=environment, capture_output=True, text=True, check=False
    )
    touched = (world / "touched").exists()
    (world / "touched").unlink(missing_ok=True)
    assert "BadInput" in process.stderr
    assert not touched


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ("yolov8n", r"--cfg: no such model, got 'yolov8n'; use yolov5n, .*, or a model yaml"),
        ("yolov5z.yaml", r"--cfg: no such model, got 'yolov5z.yaml'; .*"),
        ("{world}/no.yaml", r"--cfg: no such model, got '.*/no.yaml'; .*"),
        ("{world}/folder", r"--cfg: no such model, got '.*/folder'; .*"),
        ("{world}/good.pt", r"--cfg: no such model, got '.*/good.pt'; .*"),
        *(
            (f"{{world}}/{name}.yaml", rf"--cfg: .+, got '?.*/{name}.yaml'?; .*")
            for name in ("broken", "list", "empty", "unknown-layer", "no-head", "no-layers", "no-stride", "code")
        ),
    ],
)
def test_cfg(refused, world, cfg, message):
    assert said(message, refused(f"--cfg={cfg}"))
    assert not (world / "touched").exists()


# ---- pruning and distillation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--do_prune", "--cooldown_epochs=2"],
            r"--cooldown_epochs: must be below --epochs 2, got 2; the others prune",
        ),
        (
            ["--do_prune", "--cooldown_epochs=9"],
            r"--cooldown_epochs: must be below --epochs 2, got 9; the others prune",
        ),
        (["--do_prune", "--cooldown_epochs=-1"], r"--cooldown_epochs: must be at least 0, got -1"),
        (["--cooldown_epochs=1"], r"--cooldown_epochs: does nothing without --do_prune, got 1; add --do_prune"),
        (["--dist_loss=kl"], r"--dist_loss: needs a dense teacher, got kl; give --weights or --teacher_weights"),
        (
            ["--cfg=", "--do_prune", "--dist_loss=l2", "--temperature=3"],
            r"(.*\n)?--dist_loss: needs a dense teacher, got l2; give --weights or --teacher_weights",
        ),
        (
            ["--teacher_weights={world}/good.pt"],
            r"--teacher_weights: does nothing without --dist_loss, got .*good.pt; add --dist_loss kl",
        ),
        (
            ["--dist_loss=l2", "--teacher_weights={world}/two.pt"],
            r"--teacher_weights: the data have 3 classes, got 2 in .*two.pt; give a teacher that was trained .*",
        ),
        (
            ["--dist_loss=kl", "--weights={world}/two.pt"],
            r"--weights: the data have 3 classes, got 2 in .*two.pt; give a teacher that was trained on these data",
        ),
        (
            ["--dist_loss=kl", "--teacher_weights={world}/p6.pt"],
            r"--teacher_weights: its head differs from the student's, got strides \[8.0, 16.0, 32.0, 64.0\]; use .*",
        ),
        (["--dist_loss=kl", "--teacher_weights={world}/no.pt"], r"--teacher_weights: no such file, got '.*no.pt'; .*"),
        (
            ["--dist_loss=kl", "--teacher_weights={world}/text.pt"],
            r"--teacher_weights: not an ultralytics model \({any}\), got '.*text.pt'; .*",
        ),
    ],
)
def test_pruning_and_distillation(refused, words, message):
    assert said(message, refused(*words))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, r"{file}: cannot be read \(No such file or directory\); check the path of the configuration"),
        ("", r"{file}: is empty; write at least 'target_sparsity: 0.8'"),
        ("- 0.8", r"{file}: must be a mapping of options, got list; see docs/configuration.md"),
        ("pattern: [", r"{file}, line \d+: {any}"),
        ("target_sparsty: 0.5", r"target_sparsty: unknown option, got 0.5; did you mean 'target_sparsity'\?"),
        ("target_sparsity: 2", r"target_sparsity: out of range, got 2; it must be less than 1"),
        (
            "pattern: 2:4\ntarget_sparsity: 0.9",
            r"target_sparsity: pattern 2:4 allows at most 0.5, got 0.9; lower it or change the pattern",
        ),
        ("op_names: [nothing]", r"pruning_configs\[0\].op_names\[0\]: matches no {any}, got 'nothing'; known: .*"),
        ('excluded_op_names: [".*"]', r"pruning_configs\[0\]: no layer is left to prune {any}"),
    ],
)
def test_pruning_config(refused, tmp_path, config, message):
    file = tmp_path / "pruning.yaml"
    if config is not None:
        file.write_text(config)
    line = refused("--do_prune", f"--pruning_config={file}")
    assert said("--pruning_config: " + message.replace("{file}", str(file)), line)


@pytest.mark.parametrize(("pattern", "hinted"), [("model.33.m.*", True), ("^model.24.", False)])
def test_the_head_of_an_old_configuration_is_named(world, tmp_path, capsys, pattern, hinted):
    """The configuration of the old repository means to keep the head dense, and calls it by its old name."""
    config = tmp_path / "pruning.yaml"
    config.write_text(f'pruning_type: magnitude\nexcluded_op_names: ["{pattern}"]\n')
    words = yolov5_app.arguments(world / "set/data.yaml", tmp_path / "project", epochs=1)
    assert yolov5_app.main([*words, "--do_prune", "--noplots", f"--pruning_config={config}"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("--pruning_config: ")]
    expected = (
        "--pruning_config: pruning_configs[0].excluded_op_names: 'model.33.m.*' matches no layer; "
        "the detection head of this model is model.24: to keep it dense write '^model.24.'"
    )
    assert lines == [expected] * hinted
    model = adapter.load_model(tmp_path / "project/exp/weights/last.pt", "")
    head = [value for name, value in model.state_dict().items() if re.match(r"model\.24\.cv.*conv\.weight", name)]
    assert len(head) > 10
    assert any(bool((weight == 0).any()) for weight in head) == hinted


# ---- going on -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--resume"], r"--resume: no interrupted run, got .*/project; give the folder of the run"),
        (["--resume="], r"--resume: must be the folder of a run, got ''; .*"),
        (["--resume={world}/nowhere"], r"--resume: no such run, got '.*/nowhere'; give its folder, as .*"),
        (["--resume={world}/folder"], r"--resume: nothing to go on with, got '.*/folder'; a finished run has no .*"),
        (
            ["--resume={world}/runs/finished"],
            r"--resume: nothing to go on with, got '.*/finished'; a finished run has no weights/resume.pt",
        ),
        (
            ["--resume={world}/runs/finished/weights/last.pt"],
            r"--resume: nothing to go on with, got '.*/finished'; .*",
        ),
        (["--resume={world}/runs/garbage"], r"--resume: .*/weights/resume.pt: not a readable checkpoint {any}"),
        (["--resume={world}/runs/nothing"], r"--resume: .*/weights/resume.pt: not a readable checkpoint {any}"),
        (
            ["--resume={world}/runs/foreign"],
            r"--resume: .*/weights/resume.pt: holds an object, .*, and was not loaded.*",
        ),
        (
            ["--resume={world}/runs/other-app"],
            r"--resume: no state of a yolov5 run, got '.*/other-app/weights/resume.pt'",
        ),
        (
            ["--resume={world}/runs/no-state"],
            r"--resume: no state of a yolov5 run, got '.*/no-state/weights/resume.pt'",
        ),
    ],
)
def test_resume(refused, world, words, message):
    assert said(message, refused(*words))
    assert not (world / "touched").exists()


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "--epochs=7",
            r"--epochs: this run was begun with 1, got 7; leave it out, or begin a new run without --resume",
        ),
        ("--batch-size=2", r"--batch-size: this run was begun with 4, got 2; .*"),
        ("--cos-lr", r"--cos-lr: this run was begun with False, got True; .*"),
        ("--img=96", r"--img: this run was begun with 64, got 96; .*"),
        ("--do_prune", r"--do_prune: this run was begun with False, got True; .*"),
        ("--freeze=3", r"--freeze: this run was begun with \[0\], got \[3\]; .*"),
        ("--hyp={world}/hyp.yaml", r"--hyp: this run was begun with None, got '.*/hyp.yaml'; .*"),
    ],
)
@pytest.mark.parametrize("file", ["", "/weights/last.pt"])
def test_a_resumed_run_keeps_its_options(refused, word, message, file):
    assert said(message, refused(f"--resume={{world}}/runs/killed{file}", "--epochs=1", word))


# ---- two ranks ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_ranks_say_it_once_and_end(world, tmp_path):
    began = time.monotonic()
    code, output = yolov5_app.run(yolov5_app.arguments(world / "no.yaml", tmp_path / "project"), ranks=2)
    assert time.monotonic() - began < 60
    assert code != 0
    assert len([line for line in output.splitlines() if line.startswith("--data: no such file, got")]) == 1
    assert not (tmp_path / "project").exists()
