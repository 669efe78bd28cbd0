"""A cut transformers model is saved and loaded as any other, and packed as well."""

import json

import pytest
import torch
import transformers
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import pruning_core  # noqa: F401  (it teaches transformers)
from pruning_core.channels import plan_channels
from pruning_core.export import save_pretrained_sparse
from pruning_core.export.huggingface import unpack_folder
from pruning_core.graph import ChannelGraph, slim_, structure

IDS = {"input_ids": torch.arange(3, 15)[None]}
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
BUILT = {
    "bert": lambda: BertForSequenceClassification(BertConfig(**SMALL, num_attention_heads=4, initializer_range=0.2)),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2, use_cache=False)
    ),
}


@pytest.fixture(autouse=True)
def _quiet():
    transformers.utils.logging.disable_progress_bar()


def cut(kind):
    torch.manual_seed(0)
    model = BUILT[kind]().eval()
    graph = ChannelGraph.trace(model, IDS)
    slim_(model, plan_channels(graph, {"params": 0.7}), example_inputs=IDS)
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(**IDS).logits


def same(loaded, model):
    """Every tensor bit for bit; products may differ in the last bit by how memory is aligned."""
    mine, theirs = loaded.state_dict(), model.state_dict()
    assert all(torch.equal(mine[name], value) for name, value in theirs.items())
    assert len(mine) == len(theirs)
    torch.testing.assert_close(logits(loaded), logits(model))
    return True


@pytest.mark.parametrize("kind", BUILT)
def test_saved_and_loaded_again_and_again(tmp_path, kind):
    model = cut(kind)
    for step in range(2):
        model.save_pretrained(tmp_path / str(step))
        loaded = type(model).from_pretrained(tmp_path / str(step))
        assert same(loaded, model)
        assert structure(loaded) == structure(model)
        model = loaded
    graph = ChannelGraph.trace(model, IDS)
    slim_(model, plan_channels(graph, {"params": 0.8}), example_inputs=IDS)
    model.save_pretrained(tmp_path / "more")
    assert same(type(model).from_pretrained(tmp_path / "more"), model)


def test_cut_and_packed(tmp_path):
    model = cut("bert")
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            weight = layer.intermediate.dense.weight
            weight[torch.rand(weight.shape) < 0.9] = 0
    save_pretrained_sparse(model, tmp_path / "packed")
    loaded = type(model).from_pretrained(tmp_path / "packed")
    assert same(loaded, model)
    assert structure(loaded) == structure(model)
    about = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert (about["quant_method"], about["packed"]) == ("pruning_core", True)

    unpack_folder(tmp_path / "packed", tmp_path / "dense")
    assert same(type(model).from_pretrained(tmp_path / "dense"), model)
    with pytest.raises(ValueError, match="is packed or quantized already"):
        save_again(tmp_path / "packed", tmp_path / "twice")


def save_again(source, folder):
    from pruning_core.export.huggingface import pack_folder
    from pruning_core.export.sparse_file import AUTO, Choice

    pack_folder(source, folder, Choice.of("entropy", "fp32", AUTO))


def test_without_what_is_said_it_is_refused(tmp_path):
    """As a transformers that was never taught sees it: shapes that do not fit."""
    model = cut("bert")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((RuntimeError, ValueError), match=r"mismatch|size"):
        type(model).from_pretrained(tmp_path)
