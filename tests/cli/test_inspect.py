"""The report, and ``python -m pruning_core inspect``: what is counted, printed, drawn and refused."""

import json
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pruning_core import CheckpointError, Pruning, checkpoint
from pruning_core.cli.inspection import inspect
from pruning_core.cli.main import main
from pruning_core.masks.report import LayerSparsity, PrunerSparsity, SparsityReport
from tests.support import ROOT

PNG = b"\x89PNG\r\n\x1a\n"


def tiny() -> nn.Module:
    """Weights whose order of size is known: every run cuts the same ones."""
    layers = {
        "conv": nn.Conv2d(4, 2, 2),
        "norm": nn.BatchNorm2d(2),
        "fc": nn.Linear(4, 5),
        "odd": nn.Linear(3, 5),
        "head": nn.Linear(4, 2),
    }
    model = nn.Sequential(OrderedDict(layers))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.arange(1, parameter.numel() + 1).view(parameter.shape))
        model.odd.weight[0] = 0
    return model


CONFIG = [
    {"pruning_type": "magnitude", "pattern": "1x1", "op_names": ["conv", "fc$"], "target_sparsity": 0.5},
    {
        "pruning_type": "magnitude",
        "pattern": "2:4",
        "excluded_op_names": ["head"],
        "op_names": ["fc2", "od", "head", "more"],
        "sparsity_decay_type": "linear",
        "end_step": 4,
        "pruning_frequency": 2,
    },
]


def pruned(config=None) -> tuple[nn.Module, Pruning]:
    model = tiny()
    model.more = nn.Linear(8, 4)
    model.fc2 = nn.Linear(4, 4)
    with torch.no_grad():
        for layer in (model.more, model.fc2):
            for parameter in layer.parameters():
                parameter.copy_(torch.arange(1, parameter.numel() + 1).view(parameter.shape))
    pruner = Pruning(config or CONFIG)
    pruner.model = model
    pruner.on_train_begin()
    pruner.on_step_begin(2)
    return model, pruner


@pytest.fixture
def saved(tmp_path) -> Path:
    model, pruner = pruned()
    checkpoint.save({"epoch": 3, "model": model.state_dict(), "pruner": pruner.state_dict()}, tmp_path / "a.pt")
    return tmp_path / "a.pt"


LIVE = """\
step 2
pruning_configs[0]: magnitude, 1x1, global, step 0
  asked 50.00%, reached 50.00%: 26 of 52 weights are zero
    layer        type    shape    pattern   asked  reached  zeros
    conv.weight  Conv2d  2x4x2x2  1x1      50.00%   40.62%     13
    fc.weight    Linear  5x4      1x1      50.00%   65.00%     13
pruning_configs[1]: magnitude, 2:4, global, linear, steps 0 to 4 every 2
  asked 25.00% now, 50.00% at the end, reached 25.00%: 12 of 48 weights are zero
    layer        type    shape  pattern   asked  reached  zeros
    more.weight  Linear  4x8    2:4      25.00%   18.75%      6
    fc2.weight   Linear  4x4    2:4      25.00%   37.50%      6
left dense
    layer        type    shape  reached  zeros  why
    odd.weight   Linear  5x3     20.00%      3  its 3 input channels are not a multiple of 4 (pattern 2:4)
    head.weight  Linear  2x4      0.00%      0  excluded by 'head'
no part in pruning: 26 parameters (biases 22, BatchNorm2d 4)
model: 41 of 149 parameters are zero, 27.52%"""


def naive_zeros(state: dict) -> tuple[int, int]:
    """Zeros and weights, element by element; running statistics and counters are no parameters."""
    values = [
        number
        for name, tensor in state.items()
        if "running" not in name and "num_batches" not in name
        for number in tensor.flatten().tolist()
    ]
    return sum(number == 0 for number in values), len(values)


# ---- the report ---------------------------------------------------------------------------------------------------


def test_the_text_of_a_live_report():
    _, pruner = pruned()
    assert str(pruner.report()) == LIVE


def test_the_numbers_of_a_live_report_are_counted_from_the_weights():
    model, pruner = pruned([{"pruning_type": "magnitude", "target_sparsity": 0.6}])
    model.more.weight.data[0] = 0  # behind the pruner's back
    report = pruner.report()
    state = dict(model.named_parameters())
    assert (report.zeros, report.parameters) == naive_zeros(state)
    assert report.sparsity == report.zeros / report.parameters
    for row in report.groups[0].layers:
        assert (row.zeros, row.weights) == naive_zeros({row.name: state[row.name]})
        assert row.shape == tuple(state[row.name].shape)
        assert row.reached == row.zeros / row.weights


def test_metrics_are_printed():
    report = SparsityReport(None, (), (), 10, 4, {"before": 0.5, "after": 0.25})
    assert str(report) == "model: 4 of 10 parameters are zero, 40.00%\nmetric: before 0.5, after 0.25"


def test_nothing_is_divided_by_nothing():
    empty = LayerSparsity("a", "Linear", (0, 4), 0, 0)
    report = SparsityReport(
        3, (PrunerSparsity("title", 0.5, 0.5, (empty,)), PrunerSparsity("none", 0.5, 0.0, ())), (empty,), 0, 0
    )
    assert report.sparsity == empty.reached == report.groups[0].reached == 0.0
    assert "reached 0.00%: 0 of 0 weights are zero" in str(report)


def test_to_dict_is_json():
    _, pruner = pruned()
    report = pruner.report()
    plain = report.to_dict()
    text = json.loads(json.dumps(plain))
    assert text["step"] == 2
    assert (text["zeros"], text["parameters"], text["sparsity"]) == (report.zeros, report.parameters, report.sparsity)
    assert [group["reached"] for group in text["groups"]] == [0.5, 0.25]
    first = text["groups"][0]["layers"][0]
    assert first == {
        "name": "conv.weight",
        "kind": "Conv2d",
        "shape": [2, 4, 2, 2],
        "weights": 32,
        "zeros": 13,
        "pattern": "1x1",
        "asked": 0.5,
        "note": "",
        "reached": 13 / 32,
    }
    assert [(row["name"], row["reached"]) for row in text["dense"]] == [("odd.weight", 0.2), ("head.weight", 0.0)]
    assert text["dense"][1]["note"] == "excluded by 'head'"


@pytest.mark.parametrize(
    "metric, plain",
    [
        (0.5, 0.5),
        (None, None),
        (True, True),
        ("good", "good"),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (torch.tensor(0.5), 0.5),
        (torch.ones(2), [1.0, 1.0]),
        (np.ones((1, 2)), [[1.0, 1.0]]),
        ({"map": np.float64(0.5), 50: (1, 2)}, {"map": 0.5, "50": [1, 2]}),
        (nn.Identity(), "Identity()"),
        (1j, "1j"),
        (np.complex64(1j), "1j"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_an_evaluation_returns_is_json(metric, plain):
    report = SparsityReport(None, (), (), 1, 0, {"before": metric})
    assert json.loads(json.dumps(report.to_dict()))["metrics"] == {"before": plain}


def test_metrics_of_a_run_reach_the_report(capsys):
    model = tiny()
    pruner = Pruning({"pruning_type": "magnitude", "pattern": "1x1"})
    pruner.model = model
    pruner.eval_func = lambda model: np.float32(model.conv.weight.count_nonzero())
    pruner.train_func = lambda model: pruner.on_step_begin(0)
    pruner()
    after = float(model.conv.weight.count_nonzero())
    assert pruner.report().to_dict()["metrics"] == {"before": 32.0, "after": after}
    assert f"metric: before 32.0, after {after}" in capsys.readouterr().out


def test_save_json(tmp_path):
    _, pruner = pruned()
    pruner.report().save_json(tmp_path / "deep" / "a.json")
    assert json.loads((tmp_path / "deep" / "a.json").read_text()) == json.loads(json.dumps(pruner.report().to_dict()))


# ---- the picture --------------------------------------------------------------------------------------------------


def size_of_png(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head.startswith(PNG)
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def long_report(layers: int) -> SparsityReport:
    rows = tuple(LayerSparsity(f"layer.{i}.weight", "Linear", (4, 4), 16, i % 17, "4x1", 0.5) for i in range(layers))
    return SparsityReport(
        5, (PrunerSparsity("pruner", 0.5, 0.5, rows),) if rows else (), rows[:2], 16 * layers, 8 * layers
    )


def test_the_picture_is_a_png_that_grows_with_the_layers(tmp_path):
    heights = []
    for layers in (0, 1, 30):
        path = tmp_path / f"{layers}.png"
        long_report(layers).plot(path)
        width, height = size_of_png(path)
        assert width == 8 * 120
        heights.append(height)
    assert heights == sorted(set(heights))
    assert heights[-1] < 120 * 10


@pytest.mark.parametrize("name, magic", [("a", PNG), ("a.PNG", PNG), ("a.pdf", b"%PDF"), ("a.svg", b"<?xml")])
def test_the_ending_chooses_the_format(tmp_path, name, magic):
    long_report(3).plot(str(tmp_path / name))
    assert (tmp_path / name).read_bytes().startswith(magic)


def test_an_unknown_format(tmp_path):
    with pytest.raises(ValueError, match="'xyz' is not supported"):
        long_report(3).plot(tmp_path / "a.xyz")
    assert list(tmp_path.iterdir()) == []


def test_a_picture_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"^plot: needs matplotlib; pip install matplotlib$"):
        long_report(3).plot(tmp_path / "a.png")


# ---- inspecting a file --------------------------------------------------------------------------------------------


def untyped(text: str) -> list[list[str]]:
    """The words of a report without the classes of layers, which a state dict does not hold."""
    lines = [line.partition(" (biases")[0] for line in text.splitlines()]
    return [[word for word in line.split() if word not in ("type", "Conv2d", "Linear")] for line in lines]


def test_a_saved_run_reads_like_the_live_one(saved, capsys):
    assert main(["inspect", str(saved)]) == 0
    out, err = capsys.readouterr()
    assert untyped(out) == untyped(LIVE)
    assert err == ""


BARE = """\
weights
    layer        shape    reached  zeros
    conv.weight  2x4x2x2    0.00%      0
    fc.weight    5x4        0.00%      0
    odd.weight   5x3       20.00%      3
    head.weight  2x4        0.00%      0
model: 3 of 93 parameters are zero, 3.23%
"""


@pytest.mark.parametrize("key", [None, "model", "state_dict", "model_state_dict"])
def test_weights_without_a_pruner(tmp_path, capsys, key):
    state = tiny().state_dict()
    checkpoint.save(state if key is None else {"epoch": 1, key: state}, tmp_path / "a.pt")
    assert main(["inspect", str(tmp_path / "a.pt")]) == 0
    assert capsys.readouterr().out == BARE


def test_what_torch_save_wrote(tmp_path, capsys):
    torch.save(tiny().state_dict(), tmp_path / "pytorch_model.bin")
    assert main(["inspect", str(tmp_path / "pytorch_model.bin")]) == 0
    assert capsys.readouterr().out == BARE


def test_safetensors(tmp_path, capsys):
    save_file(tiny().state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    assert main(["inspect", str(tmp_path / "model.safetensors")]) == 0
    out = capsys.readouterr().out
    assert sorted(out.splitlines()) == sorted(BARE.splitlines())


def test_the_numbers_are_those_of_a_naive_count(saved):
    report = inspect(saved)
    state = checkpoint.load(saved)["model"]
    assert (report.zeros, report.parameters) == naive_zeros(state)
    rows = [row for group in report.groups for row in group.layers] + list(report.dense)
    assert {row.name for row in rows} == {f"{name}.weight" for name in ("conv", "fc", "more", "fc2", "odd", "head")}
    for row in rows:
        assert (row.zeros, row.weights) == naive_zeros({row.name: state[row.name]})


def test_live_and_saved_count_alike(saved):
    """Running statistics are no parameters, though a state dict holds them, and many of them are zero."""
    model, pruner = pruned()
    assert model.norm.running_mean.count_nonzero() == 0
    live, file = pruner.report(), inspect(saved)
    assert (live.zeros, live.parameters, live.step) == (file.zeros, file.parameters, file.step)
    for a, b in zip(live.groups, file.groups, strict=True):
        assert (a.title, a.target, a.asked, a.zeros, a.weights) == (b.title, b.target, b.asked, b.zeros, b.weights)


@pytest.mark.parametrize("where", ["pt", "bare"])
def test_tied_weights_are_counted_once(tmp_path, where):
    model = nn.ModuleDict({"embedding": nn.Embedding(4, 4), "decoder": nn.Linear(4, 4, bias=False)})
    model["decoder"].weight = model["embedding"].weight
    pruner = Pruning({"pruning_type": "magnitude", "pattern": "1x1", "target_sparsity": 0.5})
    pruner.model = model
    pruner.on_train_begin()
    pruner.on_step_begin(0)
    state = {"model": model.state_dict(), "pruner": pruner.state_dict()} if where == "pt" else model.state_dict()
    checkpoint.save(state, tmp_path / "a.pt")
    report = inspect(tmp_path / "a.pt")
    assert (report.zeros, report.parameters) == (8, 16)
    if where == "pt":
        assert [row.name for row in report.groups[0].layers] == ["decoder.weight"]


def test_pattern_lock_before_and_after_saving(tmp_path):
    model = tiny()
    pruner = Pruning({"pruning_type": "pattern_lock", "op_names": ["odd"]})
    pruner.model = model
    pruner.on_train_begin()
    checkpoint.save({"model": model.state_dict(), "pruner": pruner.state_dict()}, tmp_path / "a.pt")
    live, file = pruner.report().groups[0], inspect(tmp_path / "a.pt").groups[0]
    assert live.asked == live.reached == file.asked == file.reached == 0.2
    assert file.title == live.title == "pruning_configs[0]: pattern_lock, today's zeros stay"


def test_json_and_picture(saved, tmp_path, capsys):
    assert main(["inspect", str(saved), "--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")]) == 0
    report = inspect(saved)
    assert json.loads((tmp_path / "r.json").read_text()) == json.loads(json.dumps(report.to_dict()))
    size_of_png(tmp_path / "r.png")
    assert capsys.readouterr().out == f"{report}\n"


# ---- what is refused ----------------------------------------------------------------------------------------------


def refused(capsys, *arguments: object) -> str:
    assert main(["inspect", *map(str, arguments)]) == 2
    _, err = capsys.readouterr()
    assert err.endswith("\n") and err.count("\n") == 1
    assert "Traceback" not in err
    return err.rstrip("\n")


def test_missing_file(tmp_path, capsys):
    for name in ("a.pt", "a.safetensors"):
        expected = f"{tmp_path / name}: no such file; check the path of the checkpoint"
        assert refused(capsys, tmp_path / name) == expected


@pytest.mark.parametrize("content", [b"", b"hello world", b"\0" * 5000, b"PK\x03\x04 and no more", b"\xff" * 100])
def test_garbage(tmp_path, capsys, content):
    for name in ("a.pt", "a.safetensors"):
        (tmp_path / name).write_bytes(content)
        assert refused(capsys, tmp_path / name).startswith(f"{tmp_path / name}: not a readable ")


def test_folder(tmp_path, capsys):
    assert refused(capsys, tmp_path) == f"{tmp_path}: is a folder; give the file inside it"
    (tmp_path / "a.safetensors").mkdir()
    assert refused(capsys, tmp_path / "a.safetensors").startswith(f"{tmp_path / 'a.safetensors'}: ")


def test_a_whole_model(tmp_path, capsys):
    torch.save({"model": tiny()}, tmp_path / "a.pt")
    assert "holds an object, torch.nn.modules." in refused(capsys, tmp_path / "a.pt")


@pytest.mark.parametrize("state", [{}, {"epoch": 3}, {"model": {}}, {"model": {"a": 1}}, {"optimizer": {"state": {}}}])
def test_a_checkpoint_without_weights(tmp_path, capsys, state):
    checkpoint.save(state, tmp_path / "a.pt")
    expected = f"{tmp_path / 'a.pt'}: holds no model weights; save a state_dict itself or under one of: "
    assert refused(capsys, tmp_path / "a.pt") == expected + "model, state_dict, model_state_dict"


def without(state: dict, key: str) -> dict:
    return {name: value for name, value in state.items() if name != key}


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: {**state, "clocks": []},
        lambda state: {**state, "clocks": [{}]},
        lambda state: {**state, "clocks": 5},
        lambda state: {**state, "groups": []},
        lambda state: {**state, "groups": 5},
        lambda state: {**state, "groups": [{}, {}]},
        lambda state: {**state, "groups": [without(state["groups"][0], "updated_at"), state["groups"][1]]},
        lambda state: {**state, "groups": [{**state["groups"][0], "skipped": [1]}, state["groups"][1]]},
        lambda state: {**state, "config": None},
        lambda state: {**state, "config": "mine.yaml"},
        lambda state: {**state, "config": {"pruning_configs": "mine.yaml"}},
        lambda state: {**state, "config": {"pruning_configs": [{"option_of_tomorrow": 1}] * 2}},
    ],
)
def test_a_damaged_pruner_state(saved, capsys, damage, monkeypatch):
    """The configuration in it is data: a name of a file on this machine is not followed."""
    monkeypatch.chdir(saved.parent)
    Path("mine.yaml").write_text("pruning_configs: [{}, {}]")
    state = checkpoint.load(saved)
    checkpoint.save({**state, "pruner": damage(state["pruner"])}, saved)
    expected = f"{saved}: the pruner's state in it is damaged or of another version ("
    assert refused(capsys, saved).startswith(expected)
    with pytest.raises(CheckpointError):
        inspect(saved)


@pytest.mark.parametrize("option, name", [("--plot", "a.xyz"), ("--json", "file/a.json"), ("--plot", "file/a.png")])
def test_a_report_that_cannot_be_written(saved, tmp_path, capsys, option, name):
    (tmp_path / "file").write_bytes(b"")
    assert main(["inspect", str(saved), option, str(tmp_path / name)]) == 2
    out, err = capsys.readouterr()
    assert out == f"{inspect(saved)}\n"
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["inspect"], ["inspekt", "a.pt"], ["inspect", "a.pt", "--colour"]])
def test_usage(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: pruning-core" in capsys.readouterr().err


def test_the_command(saved):
    command = [sys.executable, "-m", "pruning_core", "inspect"]
    ran = subprocess.run([*command, str(saved)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"{inspect(saved)}\n", "")
