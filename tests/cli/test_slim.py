"""A cut transformers model is saved and loaded as any other, and packed as well."""

import json

import pytest
import torch
import transformers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import pruning_core  # noqa: F401  (it teaches transformers)
from pruning_core.channels import plan_channels
from pruning_core.cli.main import main
from pruning_core.graph import ChannelGraph, slim_, structure
from pruning_core.integrations.transformers import save_pretrained_sparse
from pruning_core.integrations.transformers.folder import unpack_folder

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
    from pruning_core.integrations.transformers.folder import pack_folder
    from pruning_core.sparse_format.sparse_file import AUTO, Packing

    pack_folder(source, folder, Packing.of("entropy", "fp32", AUTO))


def test_without_what_is_said_it_is_refused(tmp_path):
    """As a transformers that was never taught sees it: shapes that do not fit."""
    model = cut("bert")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((RuntimeError, ValueError), match=r"mismatch|size"):
        type(model).from_pretrained(tmp_path)


# ---- python -m pruning_core slim -------------------------------------------------------------------------------------


def run(capsys, *words):
    code = main([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out if code == 0 else said.err


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    BUILT["bert"]().save_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "tokenizer.json").write_text("{}")
    return tmp_path / "bert"


def test_on_the_command_line(folder, capsys):
    code, said = run(capsys, "slim", folder, "--budget", "params=0.7", "--plot", folder.parent / "plot.png")
    assert code == 0, said
    out = folder.with_name("bert-slim")
    assert said.endswith(
        f"{out}: BertForSequenceClassification.from_pretrained loads it after `import pruning_core`; --uniform "
        "makes one that needs no import\n"
    )
    assert (folder.parent / "plot.png").stat().st_size > 1000
    model, dense = (BertForSequenceClassification.from_pretrained(each) for each in (out, folder))
    assert model.num_parameters() <= 0.7 * dense.num_parameters()
    assert (out / "tokenizer.json").exists()
    code, said = run(capsys, "slim", folder, "--budget", "params=0.7")
    assert (code, said) == (2, f"{out}: is there already; give another name, or --overwrite\n")
    assert run(capsys, "slim", out, folder.with_name("more"), "--budget", "params=0.9", "--round-to", 2)[0] == 0


def test_images_and_two_streams_of_words(tmp_path, capsys):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(tmp_path / "vit")
    small = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 1, "vocab_size": 64}
    T5ForConditionalGeneration(T5Config(**small, decoder_start_token_id=0)).save_pretrained(tmp_path / "t5")
    for name in ("vit", "t5"):
        code, said = run(capsys, "slim", tmp_path / name, "--budget", "macs=0.8")
        assert code == 0, said


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ("flops=0.5", "budget: is one of channels, params, macs, latency, got {'flops': 0.5}"),
        ("params=0.001", "budget: cannot be met, got params 0.001; from"),
    ],
)
def test_what_the_command_refuses(folder, capsys, budget, message):
    code, said = run(capsys, "slim", folder, "--budget", budget)
    assert code == 2 and said.startswith(message) and said.count("\n") == 1
    assert [path.name for path in folder.parent.iterdir()] == ["bert"]


def test_a_folder_that_is_none(tmp_path, folder, capsys):
    code, said = run(capsys, "slim", tmp_path, "--budget", "macs=0.5")
    assert (code, said) == (2, f"{tmp_path}: has no config.json; give a folder that save_pretrained wrote\n")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["Mine"]}))
    code, said = run(capsys, "slim", folder, "--budget", "macs=0.5")
    assert (code, said) == (2, f"{folder}: its config names no class of transformers, got 'Mine'; use slim_ instead\n")


def test_a_checkpoint_of_another_kind(tmp_path, capsys):
    (tmp_path / "best.pt").touch()
    code, said = run(capsys, "slim", tmp_path / "best.pt", "--budget", "macs=0.5")
    do = "give a folder that save_pretrained wrote, or a YOLOv5 to apps/yolov5/slim.py"
    assert (code, said) == (2, f"{tmp_path / 'best.pt'}: is a file; {do}\n")


def test_a_budget_that_is_no_share(folder, capsys):
    with pytest.raises(SystemExit):
        main(["slim", str(folder), "--budget", "macs"])
    assert "must be KIND=SHARE, got 'macs'; for example macs=0.5" in capsys.readouterr().err
