"""``apps/yolov5/slim.py``: channels go, and the app trains, resumes, packs and loads what is left."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from apps.yolov5 import export, slim
from apps.yolov5 import ultralytics_adapter as adapter
from pruning_core.graph import structure
from tests.apps.yolov5.test_resume import StopAt
from tests.support.yolov5_app import arguments
from tests.support.yolov5_app import main as train

pytestmark = pytest.mark.slow
IMAGE = torch.rand(1, 3, 64, 64)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shapes) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    assert train(arguments(shapes, folder, epochs=1, name="exp")) == 0
    return folder / "exp/weights/best.pt"


def ran(capsys, *words: object) -> str:
    assert slim.main(slim.parser().parse_args([str(word) for word in words])) == 0
    return capsys.readouterr().out


def test_cut_trained_on_resumed_and_packed(trained, shapes, tmp_path, capsys):
    small = tmp_path / "small.pt"
    said = ran(capsys, trained, "--budget=macs=0.6", "--img=64", "--round-to=2", "--output", small)
    assert "parameters" in said and f"train it on with train_prune.py --weights {small}" in said
    cut = adapter.load_model(small, "path")
    dense = adapter.load_model(trained, "path")
    sizes = [sum(each.numel() for each in model.parameters()) for model in (cut, dense)]
    assert sizes[0] < 0.8 * sizes[1]
    assert all(each.out_channels % 2 == 0 for each in cut.modules() if isinstance(each, torch.nn.Conv2d)
               and each.out_channels not in (1, 3))  # fmt: skip

    assert train(arguments(shapes, tmp_path, epochs=2, cfg=None, weights=small, name="on")) == 0
    after = adapter.load_model(tmp_path / "on/weights/last.pt", "path")
    assert structure(after) == structure(cut)
    assert sum(each.numel() for each in after.parameters()) == sizes[0]
    assert "\nslim (best.pt) " in capsys.readouterr().out

    best = tmp_path / "on/weights/best.pt"
    assert export.main(export.parser().parse_args([str(best)])) == 0
    packed = best.with_name("best.sparse.safetensors")
    again = tmp_path / "again.pt"
    assert export.main(export.parser().parse_args([str(packed), "--output", str(again)])) == 0
    with torch.no_grad():
        one, two = (adapter.load_model(path, "path").eval()(IMAGE)[0] for path in (best, again))
    assert torch.equal(one, two)


def test_an_interrupted_run_goes_on(trained, shapes, tmp_path, capsys, monkeypatch):
    small = tmp_path / "small.pt"
    ran(capsys, trained, "--budget=params=0.6", "--img=64", "--round-to=1", "--output", small)
    words = {
        name: arguments(shapes, tmp_path, epochs=2, cfg=None, weights=small, name=name) for name in ("whole", "cut")
    }
    assert train(words["whole"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr("apps.yolov5.train_prune.Interrupt", lambda: StopAt(2))
        assert train(words["cut"]) == StopAt.exit_code
    assert train([f"--resume={tmp_path / 'cut'}", "--device=cpu"]) == 0
    whole, cut = (adapter.load_model(tmp_path / name / "weights/last.pt", "path").state_dict() for name in words)
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.pt"], "path: no such file, got 'none.pt'"),
        (["{trained}", "--img=65"], "--img: must be a multiple of 32, got 65"),
        (["{trained}", "--img=64", "--budget=params=0.001"], "budget: cannot be met, got params 0.001; from"),
    ],
)
def test_what_is_refused(trained, tmp_path, capsys, words, message):
    words = [word.format(trained=trained) for word in words]
    with pytest.raises(SystemExit) as left:
        slim.main(slim.parser().parse_args([*words, "--output", str(tmp_path / "out.pt")]))
    said = capsys.readouterr().err
    assert left.value.code == 2 and said.count("\n") == 1
    assert message in said
    assert not (tmp_path / "out.pt").exists()


def test_nothing_is_replaced(trained, tmp_path, capsys):
    out = tmp_path / "out.pt"
    out.write_text("mine")
    with pytest.raises(SystemExit):
        slim.main(slim.parser().parse_args([str(trained), "--output", str(out)]))
    assert "--output: is there already" in capsys.readouterr().err
    assert out.read_text() == "mine"


@pytest.mark.parametrize("text", ["macs", "macs=x", "flops=0.5", "macs=0", "macs=2"])
def test_a_budget_that_is_none(text, capsys):
    with pytest.raises(SystemExit):
        slim.parser().parse_args(["x.pt", "--budget", text])
    assert "must be one of params, macs, channels, latency" in capsys.readouterr().err
