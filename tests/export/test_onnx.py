"""``export_onnx``: the file that is written was run, gives what torch gives, and is smaller when asked to be."""

from __future__ import annotations

import builtins
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from pruning_core import CheckpointError
from pruning_core.export import export_onnx, onnx_model
from tests.support.loops import small_net


def halved(model: nn.Module, share: float = 0.9) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter[torch.rand(parameter.shape) < share] = 0
    return model.eval()


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def run(path: Path, *inputs: Tensor) -> list[np.ndarray]:
    loaded = session(path)
    names = [each.name for each in loaded.get_inputs()]
    return loaded.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_convolutional_net(tmp_path, rows, sparse):
    model = halved(small_net())
    difference = export_onnx(model, torch.randn(rows, 3, 8, 8), tmp_path / "a.onnx", sparse=sparse)
    assert 0 <= difference <= 1e-4
    images = torch.randn(7, 3, 8, 8)
    np.testing.assert_allclose(run(tmp_path / "a.onnx", images)[0], model(images).detach(), atol=1e-5)


def test_bert(tmp_path):
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
    model = halved(BertForSequenceClassification(BertConfig(vocab_size=200, **shape)))
    example = {"input_ids": torch.randint(0, 200, (1, 12)), "attention_mask": torch.ones(1, 12, dtype=torch.int64)}
    export_onnx(model, example, tmp_path / "dense.onnx")
    export_onnx(model, example, tmp_path / "sparse.onnx", sparse=True)
    assert [each.name for each in session(tmp_path / "sparse.onnx").get_inputs()] == list(example)
    assert [each.name for each in session(tmp_path / "sparse.onnx").get_outputs()] == ["logits"]
    ids, mask = torch.randint(0, 200, (4, 12)), torch.ones(4, 12, dtype=torch.int64)
    mask[2, 5:] = 0
    one, other = run(tmp_path / "dense.onnx", ids, mask)[0], run(tmp_path / "sparse.onnx", ids, mask)[0]
    np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(one, model(ids, mask).logits.detach(), atol=1e-5)
    assert (tmp_path / "sparse.onnx").stat().st_size < 0.7 * (tmp_path / "dense.onnx").stat().st_size


def test_sparse_initializers_are_those_of_the_standard(tmp_path):
    """The values that are kept and their places, int64; weights that would grow stay dense."""
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)).eval()
    with torch.no_grad():
        model[0].weight[:, 8:] = 0
        model[1].weight[:, 32:] = 0
    export_onnx(model, torch.randn(2, 64), tmp_path / "a.onnx", sparse=True)
    made = onnx.load(tmp_path / "a.onnx")
    onnx.checker.check_model(made)
    (thin,), dense = made.graph.sparse_initializer, made.graph.initializer
    assert thin.indices.data_type == onnx.TensorProto.INT64
    values, places = onnx.numpy_helper.to_array(thin.values), onnx.numpy_helper.to_array(thin.indices)
    whole = np.zeros(64 * 64, dtype=np.float32)
    whole[places] = values
    weight = model[0].weight.detach().numpy()
    assert any(np.array_equal(whole.reshape(64, 64), each) for each in (weight, weight.T))
    assert sum(np.prod(each.dims) == 64 * 64 for each in dense) == 1


class Outputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor | list[Tensor]]:
        return {"sum": self.layer(x) + y, "parts": [x * 2, y.sum(1)]}


@pytest.mark.parametrize("form", [tuple, lambda pair: {"y": pair[1], "x": pair[0]}])
def test_several_inputs_and_outputs(tmp_path, form):
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    export_onnx(Outputs(), form((x, y)), tmp_path / "a.onnx")
    assert [each.name for each in session(tmp_path / "a.onnx").get_outputs()] == ["sum", "parts_0", "parts_1"]


def test_one_size_only(tmp_path):
    model = nn.Linear(4, 4)
    export_onnx(model, torch.randn(5, 4), tmp_path / "a.onnx", dynamic_batch=False)
    assert session(tmp_path / "a.onnx").get_inputs()[0].shape == [5, 4]


def test_the_model_stays_as_it_is(tmp_path):
    model = small_net().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export_onnx(model, torch.randn(1, 3, 8, 8), tmp_path / "a.onnx")
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_same_model_gives_the_same_bytes(tmp_path):
    model = halved(small_net())
    for name in ("a.onnx", "b.onnx"):
        export_onnx(model, torch.randn(1, 3, 8, 8), tmp_path / name, sparse=True)
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("example", "options", "message"),
    [
        ((), {}, r"^example: does not fit Linear\.forward \(missing a required argument: 'input'\); give a dict"),
        ({"images": torch.ones(1, 4)}, {}, r"^example: does not fit Linear\.forward \("),
        (([1, 2],), {}, r"^example: input must be a tensor, got list; give a dict of tensors$"),
        (torch.ones(0, 4), {}, r"^example: input has no rows; give at least one, or dynamic_batch=False$"),
        (torch.tensor(1.0), {}, r"^example: input has no rows; give at least one, or dynamic_batch=False$"),
    ],
)
def test_examples_that_are_refused(tmp_path, example, options, message):
    with pytest.raises(ValueError, match=message):
        export_onnx(nn.Linear(4, 4), example, tmp_path / "a.onnx", **options)
    assert not list(tmp_path.iterdir())


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("dynamic_batch", "do"), [(True, "try dynamic_batch=False, or make it fit for"), (False, "see torch.export")]
)
def test_a_model_that_torch_cannot_export(tmp_path, dynamic_batch, do):
    with pytest.raises(CheckpointError, match=rf"^Branches: torch cannot export it \(.*\); {do}"):
        export_onnx(Branches(), torch.randn(2, 4), tmp_path / "a.onnx", dynamic_batch=dynamic_batch)
    assert not list(tmp_path.iterdir())


def test_a_difference_is_found(tmp_path, monkeypatch):
    """What torch gives is changed by two parts in ten thousand; nothing is written."""
    torch_outputs = onnx_model._torch
    monkeypatch.setattr(onnx_model, "_torch", lambda *args: [each + 2e-4 for each in torch_outputs(*args)])
    with pytest.raises(
        CheckpointError, match=r"ONNX Runtime and torch must agree to 0\.0001, got 2\.0e-04; not written"
    ):
        export_onnx(nn.Linear(4, 4), torch.randn(2, 4) * 0.1, tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("expected", "got", "difference"),
    [
        ([1.0, 1.0], [1.0, 1.5], 0.5),
        ([100.0, 1.0], [100.0, 1.5], 0.005),
        ([1.0, 1.0], [np.nan, 1.0], np.inf),
        ([np.nan, 1.0], [1.0, 1.0], np.inf),
        ([np.inf, 1.0], [5.0, 1.0], np.inf),
        ([np.inf, 1.0], [-np.inf, 1.0], np.inf),
        ([np.inf, 1.0], [np.inf, 1.5], 0.5),
        ([np.nan, np.inf], [np.nan, np.inf], 0.0),
        ([], [], 0.0),
    ],
)
def test_the_difference(expected, got, difference):
    arrays = [np.array(each, dtype=np.float32) for each in (expected, got)]
    assert onnx_model._difference([arrays[0]], [arrays[1]]) == pytest.approx(difference)


def test_sparse_weights_that_are_read_otherwise(tmp_path, monkeypatch):
    thin = onnx_model._thin

    def wrong(*args: object) -> None:
        thin(*args)
        made = args[1]
        values = made.graph.sparse_initializer[0].values
        values.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(values) * 2, values.name))

    monkeypatch.setattr(onnx_model, "_thin", wrong)
    with pytest.raises(
        CheckpointError, match=r"ONNX Runtime reads the sparse weights as other numbers; leave sparse out"
    ):
        export_onnx(halved(nn.Linear(64, 64)), torch.randn(2, 64), tmp_path / "a.onnx", sparse=True)
    assert not list(tmp_path.iterdir())


class Other(nn.Module):
    def forward(self, x: Tensor) -> object:
        return {"sum": x + 1, "cache": {x.shape}}


def test_outputs_that_are_no_tensors(tmp_path):
    expected = r"^model: its output cache must be tensors, got set; wrap the model and return what counts$"
    with pytest.raises(ValueError, match=expected):
        export_onnx(Other(), torch.randn(2, 4), tmp_path / "a.onnx")


def test_bfloat16(tmp_path):
    with pytest.raises(CheckpointError, match=r"ONNX Runtime on a CPU does not run bfloat16; model\.float\(\) first"):
        export_onnx(nn.Linear(4, 4).bfloat16(), torch.randn(2, 4), tmp_path / "a.onnx")


def test_an_example_with_a_gradient(tmp_path):
    assert export_onnx(nn.Linear(4, 4), torch.randn(2, 4, requires_grad=True), tmp_path / "a.onnx") <= 1e-4


def test_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_model, "LARGEST", 79)
    with pytest.raises(
        CheckpointError, match=r"a\.onnx: an ONNX file holds at most 2 GiB, got 80 bytes; export it in parts"
    ):
        export_onnx(nn.Linear(4, 4), torch.randn(2, 4), tmp_path / "a.onnx")


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime", "onnxscript"])
def test_what_is_not_installed(tmp_path, monkeypatch, missing):
    real = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name == missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=rf"^export_onnx: needs {missing}; pip install onnx onnxscript"):
        export_onnx(nn.Linear(4, 4), torch.randn(2, 4), tmp_path / "a.onnx")
