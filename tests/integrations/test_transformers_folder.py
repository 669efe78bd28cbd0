"""``save_pretrained_sparse`` and plain ``from_pretrained``: bit for bit with the import, refused without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.quantizers.base import HfQuantizer

from pruning_core import CheckpointError
from pruning_core.integrations.transformers import folder as huggingface
from pruning_core.integrations.transformers import save_pretrained_sparse
from pruning_core.sparse_format import load_sparse, save_sparse
from pruning_core.sparse_format.sparse_file import Packing
from tests.support import ROOT

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def pruned(model: PreTrainedModel, share: float = 0.8) -> PreTrainedModel:
    """Weights of more than one axis lose this share of single weights."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter[torch.rand(parameter.shape) < share] = 0
    return model.eval()


def bert() -> BertForSequenceClassification:
    return pruned(BertForSequenceClassification(BertConfig(vocab_size=200, **SHAPE)))


def bits(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value.contiguous().view(-1).view(torch.uint8) for name, value in model.state_dict().items()}


def assert_same(one: PreTrainedModel, other: PreTrainedModel) -> None:
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, value in bits(one).items():
        assert torch.equal(value, bits(other)[name]), name


@pytest.mark.parametrize("codec", ["raw", "entropy"])
def test_from_pretrained(tmp_path, codec):
    model = bert()
    save_pretrained_sparse(model, tmp_path / "sparse", codec=codec)
    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "sparse", output_loading_info=True)
    assert not any(info.values())
    assert_same(loaded, model)
    ids = torch.randint(0, 200, (2, 9))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    model.save_pretrained(tmp_path / "dense")
    sizes = [(tmp_path / kind / "model.safetensors").stat().st_size for kind in ("sparse", "dense")]
    assert sizes[0] < 0.4 * sizes[1]


def test_what_is_loaded_is_an_ordinary_model(tmp_path):
    """It trains, and what it saves is dense and needs no import."""
    model = bert()
    save_pretrained_sparse(model, tmp_path / "sparse")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "sparse")
    assert not hasattr(loaded.config, "quantization_config") and not hasattr(loaded, "hf_quantizer")
    loaded.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again/config.json").read_text())
    assert_same(AutoModelForSequenceClassification.from_pretrained(tmp_path / "again"), model)
    loaded.train()(torch.tensor([[3, 4]]), labels=torch.tensor([1])).loss.backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


@pytest.mark.parametrize(
    "make",
    [
        lambda: BertForMaskedLM(BertConfig(vocab_size=200, **SHAPE)),
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=200, n_embd=32, n_layer=2, n_head=2, n_positions=64)),
        lambda: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                vocab_size=200,
                **SHAPE,
                num_key_value_heads=2,
                head_dim=16,
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=32,
            )
        ),
    ],
    ids=["tied embeddings", "Conv1D", "experts that are merged at load"],
)
def test_other_models(tmp_path, make):
    model = pruned(make())
    if isinstance(model, Qwen3MoeForCausalLM) and not hasattr(HfQuantizer, "update_weight_conversions"):
        pytest.skip("this transformers merges rows of bytes, and says that it cannot")
    model.tie_weights()
    save_pretrained_sparse(model, tmp_path / "sparse")
    loaded, info = type(model).from_pretrained(tmp_path / "sparse", output_loading_info=True)
    assert not any(info.values())
    assert_same(loaded, model)


def test_another_head_and_the_base_model(tmp_path):
    model = bert()
    save_pretrained_sparse(model, tmp_path / "sparse")
    base = AutoModel.from_pretrained(tmp_path / "sparse")
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in model.bert.state_dict().items())
    other = AutoModelForTokenClassification.from_pretrained(tmp_path / "sparse")
    assert torch.equal(other.bert.encoder.layer[0].output.dense.weight, model.bert.encoder.layer[0].output.dense.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_into_another_dtype(tmp_path, dtype):
    model = bert()
    save_pretrained_sparse(model, tmp_path / "sparse")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "sparse", dtype=dtype)
    assert_same(loaded, model.to(dtype))


def test_shards(tmp_path):
    model = bert()
    save_pretrained_sparse(model, tmp_path / "sparse", max_shard_size="40KB")
    shards = sorted(path.name for path in (tmp_path / "sparse").glob("model-*.safetensors"))
    index = json.loads((tmp_path / "sparse/model.safetensors.index.json").read_text())
    assert len(shards) > 2 and sorted(set(index["weight_map"].values())) == shards
    assert_same(AutoModelForSequenceClassification.from_pretrained(tmp_path / "sparse"), model)
    # A model in one file that is saved over them does not leave them there, nor the other way round.
    save_pretrained_sparse(model, tmp_path / "sparse")
    names = sorted(path.name for path in (tmp_path / "sparse").iterdir())
    assert names == ["README.md", "config.json", "model.safetensors"]
    # What is not its own stays.
    others = ["model.sparse.safetensors", "model_ema.safetensors", "model-step1000.safetensors", "vocab.txt"]
    for other in others:
        (tmp_path / "sparse" / other).write_text("mine")
    save_pretrained_sparse(model, tmp_path / "sparse", max_shard_size="40KB")
    assert not (tmp_path / "sparse/model.safetensors").exists()
    assert all((tmp_path / "sparse" / other).read_text() == "mine" for other in others)


def python(program: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


def test_without_the_import_transformers_refuses(tmp_path):
    """Its own answer to an unknown ``quant_method`` is a warning, and weights that are random."""
    save_pretrained_sparse(bert(), tmp_path / "sparse")
    load = f"AutoModelForSequenceClassification.from_pretrained({str(tmp_path / 'sparse')!r})"
    ran = python(f"from transformers import AutoModelForSequenceClassification\n{load}\nprint('loaded')")
    assert ran.returncode == 1 and "loaded" not in ran.stdout
    assert "RuntimeError: You set `ignore_mismatched_sizes` to `False`" in ran.stderr


@pytest.mark.parametrize(
    "imports",
    [
        "import pruning_core\nfrom transformers import AutoModelForSequenceClassification",
        "import transformers.modeling_utils, pruning_core\nfrom transformers import AutoModelForSequenceClassification",
    ],
)
def test_imports_in_any_order(tmp_path, imports):
    save_pretrained_sparse(bert(), tmp_path / "sparse")
    load = f"AutoModelForSequenceClassification.from_pretrained({str(tmp_path / 'sparse')!r})"
    ran = python(f"{imports}\n{load}\nprint('loaded')")
    assert ran.stdout == "loaded\n", ran.stderr


def test_the_import_is_quick():
    ran = python("import sys, pruning_core.export\nprint('transformers' in sys.modules, 'onnx' in sys.modules)")
    assert ran.stdout == "False False\n", ran.stderr


# ---- the folder -----------------------------------------------------------------------------------------------------


def test_the_card_says_how_to_load_it(tmp_path):
    save_pretrained_sparse(bert(), tmp_path / "mine")
    card = (tmp_path / "mine/README.md").read_text()
    assert 'model = BertForSequenceClassification.from_pretrained("mine")' in card
    assert "tags: [pruning_core, sparse]" in card
    (tmp_path / "mine/README.md").write_text("my own")
    save_pretrained_sparse(bert(), tmp_path / "mine")
    assert (tmp_path / "mine/README.md").read_text() == "my own"


def test_push_to_hub(tmp_path):
    with mock.patch("huggingface_hub.HfApi") as api:
        save_pretrained_sparse(bert(), tmp_path / "mine", push_to_hub="me/mine")
    api().create_repo.assert_called_once_with("me/mine", exist_ok=True)
    api().upload_folder.assert_called_once()
    given = api().upload_folder.call_args.kwargs
    assert (given["repo_id"], given["folder_path"]) == ("me/mine", tmp_path / "mine")
    assert "model.safetensors" in given["delete_patterns"]  # that of an upload with another number of shards
    assert 'from_pretrained("me/mine")' in (tmp_path / "mine/README.md").read_text()


def test_a_folder_there_and_back(tmp_path):
    """Every other file comes along; the dense weights are the bytes that ``save_pretrained`` wrote."""
    bert().save_pretrained(tmp_path / "dense", max_shard_size="40KB")
    (tmp_path / "dense/vocab.txt").write_text("a\nb\n")
    huggingface.pack_folder(tmp_path / "dense", tmp_path / "sparse", Packing.of("entropy", "fp32", "auto"))
    huggingface.unpack_folder(tmp_path / "sparse", tmp_path / "again")
    names = sorted(path.name for path in (tmp_path / "dense").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        one, other = (tmp_path / "dense" / name).read_bytes(), (tmp_path / "again" / name).read_bytes()
        assert json.loads(one) == json.loads(other) if name == "config.json" else one == other


def indexed(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"dense: has no config\.json; give a folder that save_pre"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json: cannot be read \("),
        (lambda folder: (folder / "config.json").write_text("[" * 10**5), r"config\.json: cannot be read \("),
        (lambda folder: (folder / "config.json").write_text("[]"), r"config\.json: must hold an object, got list"),
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            r"dense: has no model\.safetensors; save the model with",
        ),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no"), r"dense/model\.safetensors: not a readable"),
        (lambda folder: indexed(folder, {}), r"index\.json: names no weights"),
        (lambda folder: indexed(folder, []), r"index\.json: names no weights"),
        (lambda folder: indexed(folder, {"a": 1}), r"index\.json: names a file that cannot be, got 1"),
        (lambda folder: indexed(folder, {"a": ["b"]}), r"index\.json: names a file that cannot be, got \['b'\]"),
        (lambda folder: indexed(folder, {"a": "../x.safetensors"}), r"names a file that cannot be, got '\.\./x\."),
        (lambda folder: indexed(folder, {"a": "/x.safetensors"}), r"names a file that cannot be, got '/x\."),
        (lambda folder: indexed(folder, {"a": "config.json"}), r"names a file that cannot be, got 'config\.json'"),
        (lambda folder: indexed(folder, {"a": "b.safetensors"}), r"dense: has no b\.safetensors; save the model"),
        (
            lambda folder: (folder / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}'),
            r"dense: is packed or quantized already; give the folder it was made from",
        ),
    ],
)
def test_folders_that_are_refused(tmp_path, damage, message):
    bert().save_pretrained(tmp_path / "dense")
    damage(tmp_path / "dense")
    with pytest.raises(CheckpointError, match=message):
        huggingface.pack_folder(tmp_path / "dense", tmp_path / "sparse", Packing.of("entropy", "fp32", "auto"))
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_dense_folder_is_not_unpacked(tmp_path):
    bert().save_pretrained(tmp_path / "dense")
    with pytest.raises(CheckpointError, match=r"dense: is not packed; give a folder that save_pretrained_sparse wrote"):
        huggingface.unpack_folder(tmp_path / "dense", tmp_path / "again")


def test_a_damaged_file_is_refused_by_from_pretrained(tmp_path):
    save_pretrained_sparse(bert(), tmp_path / "sparse")
    path = tmp_path / "sparse/model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: must be [\d,]+ bytes long, got"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "sparse")
    # The last bytes of the file are those of a packed weight.
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(RuntimeError, match="conversion"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "sparse")
    with pytest.raises(CheckpointError, match=r"its bytes were changed since they were written"):
        load_sparse(path)


@pytest.mark.parametrize("name", ["x.(", "x.(a|a)*b", "x."])
def test_names_that_are_no_parameter(tmp_path, name):
    """transformers takes what a converter is for as a regular expression."""
    save_pretrained_sparse(bert(), tmp_path / "sparse")
    path = tmp_path / "sparse/model.safetensors"
    save_sparse({**load_sparse(path), name: torch.eye(64)}, path)
    with pytest.raises(
        CheckpointError, match=r": is no name of a parameter; save the model with save_pretrained_sparse"
    ):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "sparse")


def test_an_interrupted_save_leaves_the_old_model(tmp_path, monkeypatch):
    model = bert()
    save_pretrained_sparse(model, tmp_path / "sparse")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface, "write_state", full)
    with pytest.raises(OSError, match="No space left"):
        save_pretrained_sparse(bert(), tmp_path / "sparse")
    assert_same(AutoModelForSequenceClassification.from_pretrained(tmp_path / "sparse"), model)
    assert [path.name for path in tmp_path.iterdir()] == ["sparse"]
