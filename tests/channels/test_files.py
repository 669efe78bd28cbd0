"""A cut model, saved and loaded."""

import argparse
import os

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from pruning_core import CheckpointError, checkpoint
from pruning_core.channels import plan_channels
from pruning_core.channels.files import load_slim, save_slim
from pruning_core.compat.sensetime import ckpt_helper
from pruning_core.graph import ChannelGraph, GraphError, expanded, slim_, structure

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, groups=width)
        self.point = nn.Conv2d(width, 2 * width, 1)
        self.head = nn.Linear(2 * width, 3)
        self.again = nn.Linear(2 * width, 3)
        self.again.weight = self.head.weight

    def forward(self, x):
        x = self.point(self.depthwise(self.norm(self.stem(x)).relu())).relu().mean((2, 3))
        return self.head(x) + self.again(x)


def slim(times=1):
    torch.manual_seed(0)
    model = Net().eval()
    nn.init.uniform_(model.norm.running_var, 0.5, 2)
    for _ in range(times):
        plan = plan_channels(ChannelGraph.trace(model, IMAGE), {"channels": 0.7})
        slim_(model, plan, example_inputs=IMAGE)
    return model


@pytest.mark.parametrize("times", [0, 1, 2])
@pytest.mark.parametrize("name", ["slim.pt", "slim.safetensors"])
def test_round_trip(tmp_path, name, times):
    model = slim(times)
    save_slim(model, tmp_path / name)
    loaded = load_slim(Net(), tmp_path / name).eval()
    assert torch.equal(loaded(IMAGE), model(IMAGE))
    assert structure(loaded) == structure(model)
    assert loaded.stem.out_channels == loaded.depthwise.groups == model.stem.out_channels
    assert not times or loaded.stem.out_channels < 16
    assert loaded.again.weight is loaded.head.weight
    if times:
        plan = plan_channels(ChannelGraph.trace(loaded, IMAGE), {"channels": 0.7})
        slim_(loaded, plan, example_inputs=IMAGE)


def test_ordinary_readers(tmp_path):
    model = slim()
    save_slim(model, tmp_path / "slim.pt")
    save_slim(model, tmp_path / "slim.safetensors")
    for tensors in (
        torch.load(tmp_path / "slim.pt", weights_only=True)["state_dict"],
        safetensors.torch.load_file(tmp_path / "slim.safetensors"),
    ):
        assert {name: value.shape for name, value in tensors.items()} == {
            name: value.shape for name, value in model.state_dict().items()
        }


def test_beside_other_things_in_a_checkpoint(tmp_path):
    model = slim()
    path = tmp_path / "checkpoint.pt"
    saved = {"step": 7, "model_def": ckpt_helper.save_model_def(model), "state_dict": model.state_dict()}
    checkpoint.save(saved, path)
    loaded = ckpt_helper.load_model_def(Net(), path).eval()
    loaded.load_state_dict(checkpoint.load(path)["state_dict"])
    assert torch.equal(loaded(IMAGE), model(IMAGE))


OTHERS = {
    "best": np.float64(0.75),
    "epoch": np.int64(3),
    "seen": np.bool_(True),
    "half": np.float16(0.5),
    "history": [np.float32(0.5), 0.25],
    "opt": argparse.Namespace(weights="a.pt", lr=np.float64(0.1), nested=argparse.Namespace(a=[1])),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("old", [False, True], ids=["zip", "old format"])
def test_beside_numbers_of_numpy_and_parsed_arguments(tmp_path, name, old):
    """What training scripts put beside the weights with a bare ``torch.save``."""
    model, path = slim(), tmp_path / "checkpoint.pt"
    saved = {name: OTHERS[name], "model_def": ckpt_helper.save_model_def(model), "state_dict": model.state_dict()}
    torch.save(saved, path, _use_new_zipfile_serialization=not old)
    loaded = ckpt_helper.load_model_def(Net(), path).eval()
    state = checkpoint.load(path)
    loaded.load_state_dict(state["state_dict"])
    assert torch.equal(loaded(IMAGE), model(IMAGE))
    assert state[name] == OTHERS[name] and type(state[name]) is type(OTHERS[name])


def test_numbers_under_the_names_of_numpy_1(tmp_path):
    """numpy 1 pickles its scalars as ``numpy.core.multiarray.scalar``."""
    model, path = slim(), tmp_path / "checkpoint.pt"
    saved = {"best": np.float64(0.75), "model_def": ckpt_helper.save_model_def(model)}
    torch.save(saved, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    assert data.count(b"numpy._core.multiarray") == 1
    path.write_bytes(data.replace(b"cnumpy._core.multiarray", b"cnumpy.core.multiarray"))
    ckpt_helper.load_model_def(Net(), path)
    assert checkpoint.load(path)["best"] == 0.75


def test_objects_beside_it_are_still_refused(tmp_path):
    class_of_arrays, function = np.array([nn.Linear(2, 2)], dtype=object)[0], os.getcwd
    for evil in (class_of_arrays, argparse.Namespace(model=nn.Linear(2, 2)), {"f": function}):
        torch.save({"model_def": None, "evil": evil}, tmp_path / "evil.pt")
        with pytest.raises(CheckpointError, match=r"holds an object, \S+, and was not loaded; save state dicts"):
            ckpt_helper.load_model_def(Net(), tmp_path / "evil.pt")


def test_padded_back_to_dense():
    model = slim(2)
    dense = Net().eval()
    dense.load_state_dict(expanded(model.state_dict(), structure(model)))
    torch.testing.assert_close(dense(IMAGE), model(IMAGE))
    assert int((dense.stem.weight.flatten(1) != 0).any(1).sum()) == model.stem.out_channels


def test_what_is_refused(tmp_path):
    save_slim(slim(), tmp_path / "slim.pt")
    with pytest.raises(GraphError, match=r"^plan: is for another model: \S+ has shape .* make it for this model"):
        load_slim(Net(24), tmp_path / "slim.pt")
    with pytest.raises(GraphError, match=r"^plan: names a layer that the model lacks, got"):
        load_slim(nn.Linear(3, 3), tmp_path / "slim.pt")
    checkpoint.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="holds no model_def; save one with save_model_def"):
        load_slim(Net(), tmp_path / "other.pt")
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="does not say how the model was cut"):
        load_slim(Net(), tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"123")
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        load_slim(Net(), tmp_path / "cut.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        load_slim(Net(), tmp_path / "missing.safetensors")
