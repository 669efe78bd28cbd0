"""``uniform=True``: one width per stack, said by the configuration, so that plain ``from_pretrained`` loads it."""

import copy
import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torchvision
import transformers
from torch import nn
from transformers import BertForSequenceClassification

from pruning_core import load_slim, save_slim, slim, structure
from pruning_core.channels import ChannelReport, plan_channels
from pruning_core.channels.stacks import Stacks
from pruning_core.graph import ChannelGraph, GraphError, Plan, slim_
from pruning_core.graph.cut.configuration import Built, Widths, changed
from tests.support.nets.families import FAMILIES, family

IMAGE = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
REACHED = {"Whisper": 0.85}
"""The share of the multiply-adds that is left; of all others 0.75."""
SAYS = {
    "BERT": ("hidden_size", "intermediate_size", "num_attention_heads"),
    "RoBERTa": ("hidden_size", "intermediate_size", "num_attention_heads"),
    "DistilBERT": ("dim", "hidden_dim", "n_heads"),
    "ELECTRA": ("embedding_size", "hidden_size", "intermediate_size", "num_attention_heads"),
    "DeBERTa-v2": ("embedding_size", "hidden_size", "intermediate_size", "num_attention_heads", "pooler_hidden_size"),
    "ModernBERT": ("hidden_size", "intermediate_size", "num_attention_heads"),
    "GPT-2": ("n_embd", "n_head", "n_inner"),
    "GPT-NeoX": ("hidden_size", "intermediate_size", "num_attention_heads"),
    "Llama": ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    "Qwen2": ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    "Qwen3": ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    "Mistral": ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"),
    "Gemma3": ("intermediate_size", "num_attention_heads", "num_key_value_heads"),
    "T5": ("d_ff", "num_heads"),
    "BART": ("decoder_ffn_dim", "encoder_ffn_dim"),
    "ViT": ("hidden_size", "intermediate_size", "num_attention_heads"),
    "DeiT": ("hidden_size", "intermediate_size", "num_attention_heads"),
    "Swin": ("embed_dim", "mlp_ratio", "num_heads.0", "num_heads.1"),
    "CLIP": ("text_config.intermediate_size", "vision_config.intermediate_size"),
    "Whisper": ("decoder_ffn_dim", "encoder_ffn_dim"),
}
"""What can be changed in each family; found, not listed, by the code."""


@pytest.fixture(autouse=True)
def _quiet():
    transformers.utils.logging.disable_progress_bar()


def graph_of(name):
    model, inputs = family(name)
    return ChannelGraph.trace(model, inputs), model, inputs


def outputs(model, inputs):
    with torch.inference_mode():
        return [each for each in model.eval()(**inputs).values() if isinstance(each, torch.Tensor)]


def same(one, other, inputs):
    """Equal bits, or the last one where memory is aligned in another way."""
    for mine, theirs in zip(outputs(one, inputs), outputs(other, inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    return True


def shapes(model):
    return {name: tuple(each.shape) for name, each in model.state_dict().items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_of_each_family(tmp_path, name):
    """Shapes are those that the configuration builds, the folder loads, and says nothing of this project."""
    graph, model, inputs = graph_of(name)
    stacks = Stacks(graph)
    assert tuple(sorted({each for stack in stacks.every for each in stack.settings})) == SAYS[name]
    left = REACHED.get(name, 0.75)
    plan = plan_channels(graph, {"macs": left}, uniform=True, criterion="random")
    assert left - 0.15 < graph.macs(plan.channels) / graph.macs() <= left
    config = model.config
    slim_(model, plan)
    assert plan.configuration and set(plan.configuration) <= {*SAYS[name], "head_dim"}
    assert model.config is not config and config.to_dict() != model.config.to_dict()
    assert shapes(type(model)(copy.deepcopy(model.config))) == shapes(model)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert same(type(model).from_pretrained(tmp_path), model, inputs)


def test_a_process_that_never_heard_of_this(tmp_path):
    kinds = {}
    for name in ("BERT", "Llama", "Swin"):
        graph, model, inputs = graph_of(name)
        slim_(model, plan_channels(graph, {"macs": 0.6}, uniform=True, criterion="random"))
        model.save_pretrained(tmp_path / name)
        torch.save({"inputs": inputs, "logits": outputs(model, inputs)[0].clone()}, tmp_path / name / "given.pt")
        kinds[name] = type(model).__name__
    code = f"""
import sys, torch, transformers
for name, kind in {kinds!r}.items():
    model = getattr(transformers, kind).from_pretrained(name).eval()
    given = torch.load(f"{{name}}/given.pt", weights_only=True)
    with torch.inference_mode():
        torch.testing.assert_close(model(**given["inputs"]).logits, given["logits"], rtol=1e-5, atol=1e-6)
assert "pruning_core" not in sys.modules
print("all")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "all\n", done.stderr


# ---- which widths ---------------------------------------------------------------------------------------------------


def test_every_block_keeps_one_width_and_the_lowest_channels_go():
    graph, _, _ = graph_of("BERT")
    plan = plan_channels(graph, {"macs": 0.75}, uniform=True, limits={"embeddings": 0}, round_to=8)
    inner = {name: at for name, at in plan.channels.items() if "intermediate" in name}
    assert len(inner) == 2 and len({len(at) for at in inner.values()}) == 1 and plan.channels.keys() == inner.keys()
    assert plan.configuration == {"intermediate_size": 128 - len(next(iter(inner.values())))}
    assert plan.configuration["intermediate_size"] % 8 == 0
    assert len({tuple(at) for at in inner.values()}) == 2  # each block loses its own
    weight = graph.model.bert.encoder.layer[0].intermediate.dense.weight
    reads = graph.model.bert.encoder.layer[0].output.dense.weight
    score = (weight.norm(dim=1) * reads.norm(dim=0)).detach()
    gone = list(inner["bert.encoder.layer.0.intermediate.dense.weight:0"])
    assert set(score.argsort()[: len(gone)].tolist()) == set(gone)


def test_what_a_number_also_sets_is_cut_with_it_or_not_at_all():
    """Twelve heads and the hidden width of a BERT are one stack: their numbers stay in proportion."""
    graph, _, _ = graph_of("BERT")
    stack = next(each for each in Stacks(graph).every if "hidden_size" in each.settings)
    assert set(stack.settings) == {"hidden_size", "num_attention_heads"} and stack.steps == 4
    assert {len(graph.groups[name]) for name in stack.groups} == {64, 4}


def test_what_is_relative_keeps_its_width_by_its_own_number(tmp_path):
    """Swin's inner width is a ratio to the width of each stage."""
    graph, model, inputs = graph_of("Swin")
    stacks = Stacks(graph)
    wide = next(each for each in stacks.every if "embed_dim" in each.settings)
    assert wide.against == ("mlp_ratio",)
    removed = {name: list(range(len(graph.groups[name]) // 3)) for name in wide.groups}
    changes = stacks.configuration(removed)
    assert changes == {"embed_dim": 16, "mlp_ratio": 6.0, "num_heads.0": 2, "num_heads.1": 4}
    slim_(model, replace(graph.plan(removed), configuration=changes))
    assert model.config.num_heads == [2, 4] and model.swin.encoder.layers[0].blocks[0].mlp.fc1.out_features == 96
    model.save_pretrained(tmp_path)
    assert same(type(model).from_pretrained(tmp_path), model, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["BERT", "Llama", "GPT-NeoX"])
def test_half_precision_hides_no_other_model(tmp_path, name, dtype):
    """Four heads of 12 in place of three of 16: in bfloat16 the difference could be rounding."""
    model, inputs = family(name)
    model.to(dtype)
    graph = ChannelGraph.trace(model, inputs)
    assert tuple(sorted({each for stack in Stacks(graph).every for each in stack.settings})) == SAYS[name]
    slim_(model, plan_channels(graph, {"macs": 0.75}, uniform=True, criterion="random"))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype).to(dtype)
    for mine, theirs in zip(outputs(model.double(), inputs), outputs(loaded.double(), inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (
            "Gemma3",
            r"hidden_size: the configuration says another model, model.embed_tokens.scalar_embed_scale is 8 and",
        ),
        ("BART", r"d_model also sets model.decoder.embed_positions.weight:1, which stays: is an output"),
    ],
)
def test_what_no_number_says_keeps_its_width_and_the_report_says_why(name, why):
    graph, _, _ = graph_of(name)
    plan = plan_channels(graph, {"macs": 0.8}, uniform=True)
    note = next(each for each in ChannelReport.of(graph, plan).notes if each.startswith("uniform: "))
    assert re.match(rf"uniform: \d+ groups keep their width, \S+ first: {why}", note)
    held = Stacks(graph).held
    assert held and not held.keys() & plan.channels.keys()


def test_a_budget_that_needs_more_is_refused_before_anything_is_cut():
    graph, model, _ = graph_of("BART")
    before, config = shapes(model), model.config.to_dict()
    with pytest.raises(
        GraphError, match=r"^budget: cannot be met, got macs 0.5; .*; uniform: 6 groups keep their .*d_mod"
    ):
        plan_channels(graph, {"macs": 0.5}, uniform=True)
    assert shapes(model) == before and model.config.to_dict() == config
    with pytest.raises(GraphError, match=r"; give a larger budget or uniform=False$"):
        plan_channels(graph, {"macs": 0.5}, uniform=True)
    held = min(Stacks(graph).held)
    layer = held.rpartition(".")[0].replace(".", r"\.")
    with pytest.raises(GraphError, match=rf"^limits: {layer}\S* must lose channels, which uniform cannot say: d_model"):
        plan_channels(graph, {"macs": 0.9}, uniform=True, limits={layer: [0.5, 0.9]})


def test_what_limits_keep_keeps_what_goes_with_it_and_the_error_says_so():
    graph, _, _ = graph_of("BERT")
    kept = r"uniform: \S+query.weight:0 keeps its width with bert\S+word_embeddings.weight:1, which must stay; give"
    with pytest.raises(GraphError, match=rf"^budget: cannot be met, got macs 0.2; .*; {kept}"):
        plan_channels(graph, {"macs": 0.2}, uniform=True, limits={"embeddings": 0})


def test_models_without_a_configuration_keep_one_width_per_name():
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).eval()
    done = slim(model, {"macs": 0.5}, IMAGE, uniform=True)
    assert done.plan.configuration == {}
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        assert stage[0].conv1.out_channels == stage[1].conv1.out_channels
    assert model.layer4[0].conv1.out_channels < 512


def test_a_number_that_the_configuration_refuses_is_not_chosen():
    """A hidden width must be a multiple of the number of heads."""
    graph, model, _ = graph_of("Llama")
    for criterion in ("random", "l2"):
        limits = {"embed": [0.1, 0.5]}  # at least 6 of 64, and 58 is no multiple of 4
        config = plan_channels(graph, {"macs": 1.0}, uniform=True, limits=limits, criterion=criterion).configuration
        assert config["hidden_size"] <= 58 and config["hidden_size"] % config.get("num_attention_heads", 4) == 0
    widths = Widths(model)
    assert "not a multiple of the number of attention heads (4)" in widths.build({"hidden_size": 51})


# ---- what a plan carries, and what is put back ----------------------------------------------------------------------


def test_a_plan_from_a_file_says_it_too(tmp_path):
    graph, model, inputs = graph_of("ViT")
    plan = plan_channels(graph, {"macs": 0.7}, uniform=True)
    plan.save(tmp_path / "plan.json")
    read = Plan.load(tmp_path / "plan.json")
    assert (read.configuration, read.notes) == (plan.configuration, plan.notes)
    slim_(model, read, example_inputs=inputs)
    assert model.config.intermediate_size == plan.configuration["intermediate_size"]


def test_a_configuration_that_says_another_model_puts_everything_back():
    graph, model, inputs = graph_of("BERT")
    plan = plan_channels(graph, {"macs": 0.7}, uniform=True, limits={"embeddings": 0})
    wrong = Plan.from_dict({**plan.to_dict(), "configuration": {"intermediate_size": 17}})
    before, config = {name: each.clone() for name, each in model.state_dict().items()}, model.config
    with pytest.raises(GraphError, match=r"^uniform: BertForSequenceClassification cannot be loaded, got"):
        slim_(model, wrong, example_inputs=inputs)
    quiet = Plan.from_dict({**plan.to_dict(), "configuration": {**plan.configuration, "layer_norm_eps": 1e-3}})
    with pytest.raises(
        GraphError, match=r"^uniform: the configuration says another model, \S+eps is 1e-12 and would be"
    ):
        slim_(model, quiet, example_inputs=inputs)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert model.config is config and config.intermediate_size == 128 and structure(model) is None
    slim_(model, plan)


def test_another_model_with_the_same_configuration_keeps_it():
    _, model, inputs = graph_of("BERT")
    teacher = type(model)(model.config).eval()
    assert teacher.config is model.config
    averaged = copy.deepcopy(model)
    plan = plan_channels(ChannelGraph.trace(model, inputs), {"macs": 0.7}, uniform=True, limits={"embeddings": 0})
    slim_(model, plan, ema=averaged)
    assert teacher.config.intermediate_size == 128
    assert model.config.intermediate_size == averaged.config.intermediate_size < 128
    inside = {id(each.config) for each in model.modules() if hasattr(each, "config")}
    assert inside == {id(model.config)}


def test_cuts_of_both_kinds_load_again(tmp_path):
    """What the configuration builds counts as dense for the cut that follows."""
    graph, model, inputs = graph_of("BERT")
    slim_(model, plan_channels(graph, {"macs": 0.8}, uniform=True, limits={"embeddings": 0}))
    save_slim(model, tmp_path / "one.safetensors")
    fresh = load_slim(family("BERT")[0], tmp_path / "one.safetensors")
    assert same(fresh, model, inputs) and fresh.config.intermediate_size == model.config.intermediate_size
    slim_(model, plan_channels(ChannelGraph.trace(model, inputs), {"macs": 0.8}))
    model.save_pretrained(tmp_path / "two")
    assert "slim" in json.loads((tmp_path / "two" / "config.json").read_text())["quantization_config"]
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "two")
    assert same(loaded, model, inputs)
    save_slim(model, tmp_path / "two.safetensors")
    assert same(load_slim(family("BERT")[0], tmp_path / "two.safetensors"), model, inputs)
    other = r"^uniform: \S+ is not as its configuration builds it, got \d+ where BertConfig gives \d+; plan without"
    with pytest.raises(GraphError, match=other):
        plan_channels(ChannelGraph.trace(model, inputs), {"macs": 0.8}, uniform=True)


def test_training_goes_on(tmp_path):
    graph, model, inputs = graph_of("GPT-2")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    labels = inputs["input_ids"]

    def step():
        optimizer.zero_grad()
        loss = model.train()(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    first = step()
    plan = plan_channels(graph, {"macs": 0.7}, uniform=True)
    slim_(model, plan, optimizer=optimizer)
    losses = [step() for _ in range(10)]
    assert losses[-1] < first
    model.save_pretrained(tmp_path)
    assert same(type(model).from_pretrained(tmp_path), model, inputs)


# ---- how the numbers are found --------------------------------------------------------------------------------------


def test_effects_are_found_not_listed():
    """Names that no library uses."""

    class Config(transformers.PretrainedConfig):
        model_type = "novel"

        def __init__(self, breadth=8, girth=24, slope=0.5, **kwargs):
            self.breadth, self.girth, self.slope = breadth, girth, slope
            super().__init__(**kwargs)

    class Novel(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config):
            super().__init__(config)
            waist = getattr(config, "waist", None) or config.breadth // 2
            self.first = nn.Linear(5, config.breadth)
            self.blocks = nn.ModuleList(self.block(config.breadth, config.girth) for _ in range(2))
            self.narrow = nn.Linear(config.breadth, waist)
            self.last = nn.Linear(waist, 3)
            self.slope = config.slope
            self.post_init()

        def block(self, breadth, girth):
            return nn.Sequential(nn.Linear(breadth, girth), nn.ReLU(), nn.Linear(girth, breadth))

        def forward(self, x):
            x = self.first(x)
            for block in self.blocks:
                x = x + self.slope * block(x)
            return self.last(torch.tanh(self.narrow(x)))

    torch.manual_seed(0)
    model, x = Novel(Config()).eval(), torch.randn(4, 5)
    graph = ChannelGraph.trace(model, x)
    found = {each.settings: each.steps for each in Stacks(graph).every}
    assert found == {("girth",): 24, ("waist",): 4, ("breadth",): 8}
    plan = plan_channels(graph, {"macs": 0.5}, uniform=True)
    slim_(model, plan)
    assert {name: getattr(model.config, name) for name in plan.configuration} == plan.configuration
    assert shapes(Novel(copy.deepcopy(model.config))) == shapes(model)


def test_building_leaves_the_model_and_the_random_state_alone():
    model, _ = family("Llama")
    config, state = model.config.to_dict(), torch.get_rng_state()
    before = Built.of(model)
    widths = Widths(model)
    assert widths.alone and model.config.to_dict() == config and torch.equal(torch.get_rng_state(), state)
    assert Built.of(model) == before
    assert changed(model.config, {"hidden_size": 3}).hidden_size == 3 and model.config.hidden_size == 64


def test_a_model_that_its_configuration_does_not_build():
    model, inputs = family("BERT")
    model.classifier = nn.Linear(64, 7)
    with pytest.raises(
        GraphError, match=r"^uniform: classifier\.\S+ is not as its configuration builds it, got 7 where"
    ):
        plan_channels(ChannelGraph.trace(model, inputs), {"macs": 0.8}, uniform=True)


def test_limits_of_one_stack_must_have_a_width_in_common():
    graph, _, _ = graph_of("BERT")
    limits = {"layer.0.intermediate": [0.6, 0.9], "layer.1.intermediate": [0.1, 0.2]}
    with pytest.raises(
        GraphError, match=r"^limits: the groups of one width have none in common, got bert.encoder.layer.0"
    ):
        plan_channels(graph, {"macs": 0.8}, uniform=True, limits=limits)
