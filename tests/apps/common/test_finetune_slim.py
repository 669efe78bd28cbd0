"""``--slim_config``: what is left trains, learns, is pruned, goes on and loads; what is wrong with the file is said."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForSequenceClassification,
)

from apps.common.finetune import results, slim
from pruning_core.graph import Plan, structure
from pruning_core.masks.report import SparsityReport
from tests.support import finetune_apps as apps

KINDS = {"text_classification": AutoModelForSequenceClassification, "qa": AutoModelForQuestionAnswering}
RECIPE = apps.ROOT / slim.EXAMPLE
BOTH = pytest.mark.parametrize("app", apps.APPS)
TEXT = "text_classification"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("slim")
    for app in apps.APPS:
        rows = apps.reviews if app == TEXT else apps.questions
        apps.write(folder / app / "train.jsonl", rows(23))
        apps.write(folder / app / "validation.jsonl", rows(11, seed=1))
        apps.save_model(
            folder / app / "bert", app, initializer_range=0.3, hidden_dropout_prob=0.1, intermediate_size=96
        )
    return folder


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(results, "plot_curves", lambda *_, **__: None)
    monkeypatch.setattr(SparsityReport, "plot", lambda *_: None)


def words(place: Path, app: str, output: Path, *more: str, **options: object) -> list[str]:
    start: dict[str, object] = {"model_name_or_path": place / app / "bert", "per_device_train_batch_size": 4}
    start |= {"max_seq_length": 64, "doc_stride": 16} if app == "qa" else {"max_length": 64}
    start |= {"slim_config": RECIPE}
    files = place / app / "train.jsonl", place / app / "validation.jsonl"
    return apps.arguments(*files, output, *more, **{**start, **options})


def go_on(app: str, checkpoint: Path, output: Path) -> int:
    return apps.main(app, [f"--resume_from_checkpoint={checkpoint}", f"--output_dir={output}"])


def written(tmp_path: Path, text: str) -> Path:
    (tmp_path / "slim.yaml").write_text(text)
    return tmp_path / "slim.yaml"


def weights(model) -> int:
    return sum(each.numel() for each in model.parameters())


def test_the_example_says_every_key_and_is_the_default_but_for_its_layers():
    config = slim.SlimConfig.load(str(RECIPE))
    assert config.model_dump(exclude={"limits", "round_to"}) == slim.SlimConfig().model_dump(
        exclude={"limits", "round_to"}
    )
    assert all(
        f"{key}:" in RECIPE.read_text()
        for key in slim.SlimConfig.model_fields
        if key not in ("op_names", "excluded_op_names", "pruning_op_types", "seed")
    )


@BOTH
def test_what_is_left_trains_is_pruned_learns_and_loads(place, tmp_path, capsys, app):
    out = tmp_path / "out"
    assert apps.main(app, words(place, app, out, "--do_prune", dist_loss="kl", cooldown_epochs=0)) == 0
    said = capsys.readouterr().out
    assert "channels removed: " in said and "% of the multiply-adds are left" in said
    assert "l2 of the hidden states (x2)" in said  # the width stays, so the teacher's can be compared
    assert "import pruning_core" not in said + (out / "README.md").read_text()
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    dense, small = (KINDS[app].from_pretrained(folder) for folder in (place / app / "bert", out))
    assert weights(small) < weights(dense)
    assert small.get_input_embeddings().weight.shape == dense.get_input_embeddings().weight.shape
    plan, report = Plan.load(out / "channel_plan.json"), json.loads((out / "channel_report.json").read_text())
    assert {str(axis) for axis in plan.removed} == {
        f"{name}:{dim}"
        for name, each in dense.named_parameters()
        for dim in range(each.dim())
        if each.shape[dim] != small.get_parameter(name).shape[dim]
    }
    assert plan.configuration == {"intermediate_size": small.config.intermediate_size} and structure(small) is None
    assert report["macs"][1] <= 0.5 * report["macs"][0] and report["params"] == [weights(dense), weights(small)]
    assert (out / "channels.png").stat().st_size > 0
    assert json.loads((out / "all_results.json").read_text())["sparsity"] > 0.7


@BOTH
def test_it_goes_on_to_the_bit_without_the_file(place, tmp_path, capsys, app):
    config = written(tmp_path, "{budget: {params: 0.7}, criterion: fisher, batches: 2, round_to: 1}")
    run = words(place, app, tmp_path / "whole", slim_config=config, checkpointing_steps=2)
    assert apps.main(app, run) == 0
    config.unlink()
    assert go_on(app, tmp_path / "whole/step_4", tmp_path / "on") == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "on" / name).read_bytes(), name
    assert capsys.readouterr().out.count("channels removed: ") == 2


@pytest.mark.parametrize("uniform", [True, False])
def test_a_slim_model_is_cut_again_and_goes_on(place, tmp_path, capsys, uniform):
    config = written(
        tmp_path, f"{{budget: {{params: 0.8}}, criterion: l2, round_to: 1, uniform: {str(uniform).lower()}}}"
    )
    assert apps.main(TEXT, words(place, TEXT, tmp_path / "one", slim_config=config)) == 0
    assert ("after `import pruning_core`" in capsys.readouterr().out) != uniform
    assert ("`import pruning_core`" in (tmp_path / "one/README.md").read_text()) != uniform
    again = {"model_name_or_path": tmp_path / "one", "checkpointing_steps": 2, "slim_config": config}
    assert apps.main(TEXT, words(place, TEXT, tmp_path / "two", **again)) == 0
    assert go_on(TEXT, tmp_path / "two/step_2", tmp_path / "on") == 0
    one, two, on = (KINDS[TEXT].from_pretrained(tmp_path / name) for name in ("one", "two", "on"))
    assert weights(two) <= 0.8 * weights(one)
    assert all(torch.equal(value, on.state_dict()[name]) for name, value in two.state_dict().items())


def test_a_cut_model_has_a_cut_models_defaults(place, tmp_path):
    from apps.common.finetune.build import TO_PRUNE, add_defaults

    parsed = apps.parsed(TEXT, [f"--slim_config={RECIPE}", "--model_name_or_path=x"])
    add_defaults(parsed, 6)
    assert {name: getattr(parsed, name) for name in TO_PRUNE} == TO_PRUNE


# ---- what is wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "--slim_config: no such file, got '{}'; see apps/common/recipes/slim.yaml"),
        ("[", "--slim_config: not a yaml file"),
        ("- macs", "--slim_config: must hold a mapping, got '{}'; see apps/common/recipes/slim.yaml"),
        ("{budgets: {macs: 0.5}}", "--slim_config: budgets: unknown option, got {{'macs': 0.5}}; did you mean"),
        ("{budget: half}", "--slim_config: budget: wrong value, got 'half'; it must be a valid dictionary; see"),
        ("{batches: 0}", "--slim_config: batches: out of range, got 0; it must be greater than or equal to 1; see"),
        ("{budget: {flops: 0.5}}", "--slim_config: budget: is one of channels, params, macs, latency, got {{'f"),
        ("{budget: {macs: 1.5}}", "--slim_config: budget: is the share that is left, above 0 and at most 1, got 1.5"),
        ("{budget: {macs: 0.001}, limits: {embeddings: 0}}", "budget: cannot be met, got macs 0.001; from 0."),
        ("{criterion: tailor}", "--slim_config: criterion: unknown criterion, got 'tailor'; did you mean 'taylor'?"),
        ("{scope: all}", "--slim_config: scope: wrong value, got 'all'; it must be 'global' or 'local'; see"),
        ("{limits: {stem: 0}}", "--slim_config: limits: matches no layer that takes part, got 'stem'; "),
    ],
)  # fmt: skip
def test_one_line_and_nothing_is_written(place, tmp_path, capsys, text, said):
    path = tmp_path / "slim.yaml"
    if text is not None:
        path.write_text(text)
    assert apps.main(TEXT, words(place, TEXT, tmp_path / "out", slim_config=path)) == 2
    error = capsys.readouterr().err
    assert said.format(path) in error and len(error.strip().splitlines()) == 1, error
    assert not (tmp_path / "out").exists()


def test_hidden_states_of_another_width_are_not_compared(place, tmp_path, capsys):
    config = written(tmp_path, "{budget: {params: 0.5}, criterion: l2, round_to: 1, scope: local}")
    more = {"slim_config": config, "dist_loss": "kl"}
    assert apps.main(TEXT, words(place, TEXT, tmp_path / "out", **more)) == 0
    assert "kl of the logits, 50%" in capsys.readouterr().out
    assert apps.main(TEXT, words(place, TEXT, tmp_path / "no", feature_weight=1, **more)) == 2
    error = capsys.readouterr().err
    assert (
        "--feature_weight: hidden states of 2 layers of " in error and " and 2 layers of 16 cannot be compared" in error
    )
    assert 'or keep the width with layers: {"*embeddings*": 0} in --slim_config' in error


def test_models_without_hidden_states_learn_from_logits(place, tmp_path, capsys):
    words_of = apps.tokenizer()
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64}
    marks = {"eos_token_id": words_of.sep_token_id, "pad_token_id": words_of.pad_token_id}
    config = BartConfig(vocab_size=len(words_of), **sizes, **heads, **marks, id2label={0: "0", 1: "1"})
    BartForSequenceClassification(config).save_pretrained(tmp_path / "bart")
    words_of.save_pretrained(tmp_path / "bart")
    more = {"model_name_or_path": tmp_path / "bart", "slim_config": None, "dist_loss": "kl"}
    assert apps.main(TEXT, words(place, TEXT, tmp_path / "out", **more)) == 0
    assert "kl of the logits, 50%" in capsys.readouterr().out
    assert apps.main(TEXT, words(place, TEXT, tmp_path / "no", feature_weight=1, **more)) == 2
    assert "hidden states of no layer and no layer cannot be compared" in capsys.readouterr().err


def test_a_teacher_that_reads_less_is_refused_before_it_is_run(place, tmp_path, capsys):
    apps.save_model(tmp_path / "short", TEXT, initializer_range=0.3, max_position_embeddings=6)
    more = {"dist_loss": "kl", "slim_config": None, "teacher_model_name_or_path": tmp_path / "short"}
    assert apps.main(TEXT, words(place, TEXT, tmp_path / "out", **more)) == 2
    assert "--max_length: the teacher reads at most 6 tokens, got 64; lower it" in capsys.readouterr().err
    more = {"model_name_or_path": tmp_path / "short"}
    assert apps.main(TEXT, words(place, TEXT, tmp_path / "out", **more)) == 2
    assert "--max_length: the model reads at most 6 tokens, got 64; lower it" in capsys.readouterr().err


def test_files_of_a_cut_go_with_the_run(place, tmp_path):
    out = tmp_path / "out"
    assert apps.main(TEXT, words(place, TEXT, out, checkpointing_steps=2)) == 0
    assert go_on(TEXT, out / "step_2", tmp_path / "on") == 0
    plans = [(folder / "channel_plan.json").read_text() for folder in (out, tmp_path / "on")]
    assert plans[0] == plans[1]
    assert apps.main(TEXT, words(place, TEXT, out, "--overwrite_output_dir", slim_config=None)) == 0
    assert not [path.name for path in out.glob("channel*")]


def test_a_run_goes_on_with_the_cut_that_it_was_begun_with(place, tmp_path, capsys):
    assert apps.main(TEXT, words(place, TEXT, tmp_path / "run", checkpointing_steps=2)) == 0
    other = written(tmp_path, "{}")
    assert apps.main(TEXT, [f"--resume_from_checkpoint={tmp_path / 'run/step_2'}", f"--slim_config={other}"]) == 2
    assert "--slim_config: this run was begun with" in capsys.readouterr().err
