"""``python -m pruning_core export|unpack|verify|inspect``: what is written, printed and refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from pruning_core import checkpoint
from pruning_core.cli.main import main
from pruning_core.sparse_format import load_sparse, save_sparse


def net() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(8, 32, 3), nn.Linear(64, 64), nn.Linear(64, 10))
    with torch.no_grad():
        model[0].weight *= torch.rand(8, 8, 3, 3).repeat_interleave(4, 0) < 0.2
        groups = model[1].weight.unflatten(1, (16, 4))
        groups[..., :2] = 0
    return model


def ran(capsys, *words: object) -> str:
    code = main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert (code, err) == (0, ""), err
    return out


def refused(capsys, *words: object) -> str:
    assert main([str(word) for word in words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err.rstrip("\n")


@pytest.mark.parametrize("name", ["a.pt", "a.bin", "a.safetensors"])
def test_a_file_there_and_back(tmp_path, capsys, name):
    state = net().state_dict()
    if name == "a.safetensors":
        save_file(state, tmp_path / name)
    else:
        checkpoint.save({"model": state, "epoch": 3}, tmp_path / name)
    out = ran(capsys, "export", tmp_path / name)
    path = tmp_path / "a.sparse.safetensors"
    assert out.splitlines()[0] == f"{path}: 2 packed and 4 other tensors are as they were written"
    weights, zeros = 32 * 8 * 9 + 64 * 64, int((state["0.weight"] == 0).sum()) + 64 * 32
    size, dense = path.stat().st_size, sum(value.nbytes for value in state.values())
    expected = f"{zeros:,} of {weights:,} packed weights are zero; {size:,} bytes, {size / dense:.1%} of {dense:,}"
    assert out.splitlines()[1:] == [expected]
    assert ran(capsys, "verify", path) == out
    assert ran(capsys, "unpack", path) == f"{tmp_path / 'a-dense.safetensors'}: an ordinary safetensors file again\n"
    again = load_file(tmp_path / "a-dense.safetensors")
    assert again.keys() == state.keys() and all(torch.equal(again[each], state[each]) for each in state)


def test_inspect_a_packed_file(tmp_path, capsys):
    checkpoint.save(net().state_dict(), tmp_path / "a.pt")
    ran(capsys, "export", tmp_path / "a.pt")
    path = tmp_path / "a.sparse.safetensors"
    out = ran(capsys, "inspect", path, "--json", tmp_path / "a.json", "--plot", tmp_path / "a.png")
    lines = out.splitlines()
    assert lines[0].split() == ["weight", "shape", "unit", "zeros", "bytes", "of", "dense", "of", "bound"]
    assert re.fullmatch(r"0\.weight +32x8x3x3 +4x1x1x1 +\d\d\.\d\d% +[\d,]+ +\d+\.\d\d% +1\.\d\d\d", lines[1])
    assert re.fullmatch(r"1\.weight +64x64 +\S.* +50\.00% +[\d,]+ +\d\d\.\d\d% +1\.\d\d\d", lines[2])
    assert re.fullmatch(r"2 packed, 4 other tensors: [\d,]+ bytes, \d\d\.\d% of [\d,]+", lines[3])
    assert (tmp_path / "a.json").exists() and (tmp_path / "a.png").exists()


def test_options_of_export(tmp_path, capsys):
    state = net().state_dict()
    checkpoint.save(state, tmp_path / "a.pt")
    sizes = []
    for words in (["--codec", "raw"], [], ["--values", "bf16"], ["--pattern", "4x1", "--values", "fp16"]):
        ran(capsys, "export", tmp_path / "a.pt", tmp_path / "out.safetensors", "--overwrite", *words)
        sizes.append((tmp_path / "out.safetensors").stat().st_size)
    assert sizes[0] > sizes[1] > sizes[2]
    assert torch.equal(load_sparse(tmp_path / "out.safetensors")["0.weight"], state["0.weight"].half().float())


def test_a_folder_there_and_back(tmp_path, capsys):
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(vocab_size=100, **shape))
    model.bert.encoder.layer[0].output.dense.weight.data[::2] = 0
    model.save_pretrained(tmp_path / "mine")
    capsys.readouterr()  # transformers' own bar
    out = ran(capsys, "export", tmp_path / "mine")
    assert out.startswith(f"{tmp_path / 'mine-sparse'}: 1 packed and 24 other tensors are as they were written\n")
    assert ran(capsys, "verify", tmp_path / "mine-sparse") == out
    assert ran(capsys, "unpack", tmp_path / "mine-sparse") == f"{tmp_path / 'mine-dense'}: an ordinary folder again\n"
    one, other = (tmp_path / name / "model.safetensors" for name in ("mine", "mine-dense"))
    assert one.read_bytes() == other.read_bytes()


def test_here(tmp_path, capsys, monkeypatch):
    """``export .`` has to find a name for what it writes."""
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert refused(capsys, "export", ".").endswith("mine: has no config.json; give a folder that save_pretrained wrote")


def test_nothing_is_written_over(tmp_path, capsys):
    checkpoint.save(net().state_dict(), tmp_path / "a.pt")
    ran(capsys, "export", tmp_path / "a.pt")
    path = tmp_path / "a.sparse.safetensors"
    before = path.read_bytes()
    assert (
        refused(capsys, "export", tmp_path / "a.pt") == f"{path}: is there already; give another name, or --overwrite"
    )
    assert path.read_bytes() == before
    (tmp_path / "a-dense.safetensors").write_bytes(b"mine")
    assert refused(capsys, "unpack", path).endswith(
        "a-dense.safetensors: is there already; give another name, or --overwrite"
    )
    ran(capsys, "unpack", path, "--overwrite")


def test_a_file_that_only_speaks_of_it(tmp_path, capsys):
    save_file(net().state_dict(), tmp_path / "a.safetensors", {"made_by": "pruning_core"})
    ran(capsys, "export", tmp_path / "a.safetensors")


def test_a_weight_without_weights(tmp_path, capsys):
    save_sparse({"w": torch.empty(0, 5), "v": torch.zeros(64, 64)}, tmp_path / "a.safetensors")
    assert "1 packed, 1 other tensors" in ran(capsys, "inspect", tmp_path / "a.safetensors")


def damaged(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("command", ["verify", "unpack", "inspect"])
@pytest.mark.parametrize("place", [-1, 60])
def test_damage_is_told(tmp_path, capsys, command, place):
    checkpoint.save(net().state_dict(), tmp_path / "a.pt")
    ran(capsys, "export", tmp_path / "a.pt")
    path = tmp_path / "a.sparse.safetensors"
    damaged(path, place)
    assert refused(capsys, command, path).startswith(f"{path}: ")
    assert not (tmp_path / "a-dense.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["export", "no.pt"], r"no\.pt: no such file; check the path of the checkpoint"),
        (["export", "no.safetensors"], r"no\.safetensors: no such file; check the path of the checkpoint"),
        (["export", "a.sparse.safetensors"], r"a\.sparse\.safetensors: is packed already; unpack it first"),
        (["export", "empty"], r"empty: has no config\.json; give a folder that save_pretrained wrote"),
        (["export", "a.pt", "b.safetensors", "--pattern", "two"], r"unknown pattern, got 'two'; "),
        (["verify", "no.safetensors"], r"no\.safetensors: no such file"),
        (["verify", "empty"], r"empty: has no config\.json; give a folder that save_pretrained wrote"),
        (["verify", "plain.safetensors"], r"plain\.safetensors: has no table of pruning_core; an ordinary"),
        (["unpack", "plain.safetensors"], r"plain\.safetensors: has no table of pruning_core; an ordinary"),
        (["unpack", "empty"], r"empty: has no config\.json; give a folder that save_pretrained wrote"),
    ],
)
def test_what_is_refused(tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    checkpoint.save(net().state_dict(), "a.pt")
    save_file(net().state_dict(), "plain.safetensors")
    Path("empty").mkdir()
    ran(capsys, "export", "a.pt")
    assert re.match(message, refused(capsys, *words))
    assert not Path("b.safetensors").exists()


@pytest.mark.parametrize(
    "words", [["export"], ["export", "a.pt", "--codec", "zip"], ["verify", "a", "b"], ["unpak", "a"]]
)
def test_usage(capsys, words):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2 and "usage: pruning-core" in capsys.readouterr().err
