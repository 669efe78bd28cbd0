"""``apps/yolov5/export.py``: ``best.pt`` packed, unpacked into ``ultralytics.YOLO`` with the same mAP, and as ONNX."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from apps.yolov5 import ultralytics_adapter as adapter
from apps.yolov5.export import main, parser
from pruning_core.sparse_format import load_sparse, save_sparse
from tests.support.yolov5_app import ENVIRONMENT, ROOT, arguments
from tests.support.yolov5_app import main as train


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shapes) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "recipe.yaml").write_text("{pruning_type: magnitude, pattern: 1x1, target_sparsity: 0.8}")
    prune = {"pruning_config": folder / "recipe.yaml", "cooldown_epochs": 1}
    assert train(arguments(shapes, folder, "--do_prune", epochs=3, name="exp", **prune)) == 0
    return folder / "exp/weights/best.pt"


@pytest.fixture
def best(trained, tmp_path) -> Path:
    (tmp_path / "best.pt").write_bytes(trained.read_bytes())
    return tmp_path / "best.pt"


def ran(capsys, *words: object) -> str:
    assert main(parser().parse_args([str(word) for word in words])) == 0
    return capsys.readouterr().out


def refused(capsys, *words: object) -> str:
    with pytest.raises(SystemExit) as left:
        main(parser().parse_args([str(word) for word in words]))
    err = capsys.readouterr().err
    assert left.value.code == 2 and err.count("\n") == 1
    return err.rstrip("\n")


def test_there_and_back(best, shapes, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ultralytics.data.utils.check_font", lambda *_: None)
    out = ran(capsys, best)
    packed = tmp_path / "best.sparse.safetensors"
    assert out.startswith(f"{packed}: ") and "packed and" in out
    assert packed.stat().st_size < 0.5 * best.stat().st_size
    assert (
        ran(capsys, packed, "--output", tmp_path / "again.pt")
        == f"{tmp_path / 'again.pt'}: ultralytics.YOLO loads it\n"
    )
    one, other = adapter.content_of(best), adapter.content_of(tmp_path / "again.pt")
    states = [content["model"].state_dict() for content in (one, other)]
    assert states[0].keys() == states[1].keys()
    assert all(
        torch.equal(value, states[1][name]) and value.dtype is states[1][name].dtype
        for name, value in states[0].items()
    )
    for key in ("epoch", "train_args", "train_metrics"):
        assert one[key] == other[key]
    assert one["model"].names == other["model"].names

    from ultralytics import YOLO

    kind = {"data": str(shapes), "imgsz": 64, "device": "cpu", "verbose": False, "plots": False, "workers": 0}
    metrics = [
        YOLO(path).val(**kind, project=str(tmp_path), name=path.stem).results_dict
        for path in (best, tmp_path / "again.pt")
    ]
    assert metrics[0] == metrics[1] and set(metrics[0]) >= {"metrics/mAP50(B)", "metrics/mAP50-95(B)"}


@pytest.mark.parametrize("sparse", [[], ["--sparse"]])
def test_onnx(best, tmp_path, capsys, sparse):
    out = ran(capsys, best, "--format=onnx", "--img=64", *sparse)
    path = tmp_path / "best.onnx"
    assert out.startswith(f"{path}: {path.stat().st_size:,} bytes; ONNX Runtime and torch agree to ")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert len(session.get_outputs()) == 1
    model = adapter.load_model(best, "path")
    images = torch.rand(5, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)[0].numpy()
    got = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-2)


def test_what_is_refused(best, tmp_path, capsys):
    assert refused(capsys, tmp_path / "no.pt").startswith(f"path: no such file, got '{tmp_path / 'no.pt'}'; ")
    (tmp_path / "a.pt").write_bytes(b"garbage")
    assert refused(capsys, tmp_path / "a.pt").startswith("path: not an ultralytics model (")
    assert refused(capsys, best, "--format=onnx", "--img=72") == "--img: must be a multiple of 32, got 72"
    save_sparse({"w": torch.ones(3)}, tmp_path / "b.sparse.safetensors")
    expected = (
        f"path: was not packed here, got '{tmp_path / 'b.sparse.safetensors'}'; python -m pruning_core unpack reads it"
    )
    assert refused(capsys, tmp_path / "b.sparse.safetensors") == expected
    for about in ("{}", "[]", '{"names": 3, "model": {}}'):
        save_sparse(
            {"w": torch.ones(3)}, tmp_path / "d.sparse.safetensors", metadata={"kind": "apps/yolov5", "about": about}
        )
        assert refused(capsys, tmp_path / "d.sparse.safetensors").startswith(
            "path: its weights and its description do not fit ("
        )
    ran(capsys, best)
    packed = tmp_path / "best.sparse.safetensors"
    before = packed.read_bytes()
    expected = f"--output: is there already, got '{packed}'; give another name, or --overwrite"
    assert refused(capsys, best) == expected
    assert refused(capsys, packed).startswith(f"--output: is there already, got '{best}'")
    ran(capsys, best, "--overwrite")
    assert packed.read_bytes() == before
    expected = "--format: onnx is made of a .pt, got a packed file; unpack it first, without --format"
    assert refused(capsys, packed, "--format=onnx") == expected
    packed.write_bytes(before[:-1])
    assert refused(capsys, packed, "--output", tmp_path / "c.pt").startswith(f"{packed}: must be ")
    assert not (tmp_path / "c.pt").exists()


def test_as_a_script(best):
    command = [sys.executable, str(ROOT / "apps/yolov5/export.py")]
    done = subprocess.run([*command, str(best)], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == ""
    assert load_sparse(best.with_name("best.sparse.safetensors"))
    helped = subprocess.run([*command, "--help"], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert helped.returncode == 0 and "--format" in helped.stdout
