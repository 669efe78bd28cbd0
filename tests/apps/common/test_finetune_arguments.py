"""The command lines of the Transformers apps: every option, its defaults, and help that comes at once."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from apps.common.arguments import Parser
from apps.common.finetune import arguments as shared
from apps.qa import arguments as qa
from apps.text_classification import arguments as text_classification
from apps.text_classification.tasks import TASKS
from tests.support import finetune_apps

PARSERS = {"text_classification": text_classification.parser, "qa": qa.parser}
SLOW = ("torch", "transformers", "datasets", "accelerate", "huggingface_hub", "numpy")


@pytest.fixture(params=PARSERS)
def app(request) -> str:
    return request.param


@pytest.fixture
def parser(app) -> Parser:
    return PARSERS[app]()


def options_of(parser: Parser) -> list[str]:
    return [word for action in parser._actions for word in action.option_strings if word.startswith("--")]


# ---- help -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), (["--task_nam=mrpc"], 2)], ids=["help", "mistake"])
def test_help_and_mistakes_are_answered_before_the_slow_imports(app, words, code):
    """The script is run as ``python apps/.../train_prune.py`` runs it."""
    program = f"""
import runpy, sys
sys.argv = [{str(finetune_apps.ROOT / f"apps/{app}/train_prune.py")!r}, *{words!r}]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as left:
    print("left with", left.code, "after", sorted({SLOW!r} & sys.modules.keys()))
""".replace(repr(SLOW), repr(set(SLOW)))
    out = subprocess.run(
        [sys.executable, "-c", program], env=finetune_apps.ENVIRONMENT, capture_output=True, text=True, check=True
    ).stdout
    assert out.splitlines()[-1] == f"left with {code} after []"


def test_help_has_every_option_once_in_a_group(parser):
    text = parser.format_help()
    body = text[text.index("options:") : text.index("examples:")]
    starts = re.findall(r"^  (?:-\w, )?(--\w+)", body, re.MULTILINE)
    assert sorted(starts) == sorted(options_of(parser))
    named = [action.dest for group in parser._action_groups[2:] for action in group._group_actions]
    assert sorted(named) == sorted(action.dest for action in parser._actions if action.dest != "help")


def test_the_groups_of_help(app, parser):
    groups = re.findall(r"^(\w[\w ]*):$", parser.format_help(), re.MULTILINE)
    answers = ["answers"] if app == "qa" else []
    expected = ["options", "model", "data", *answers, "pruning", "distillation", "training", "output", "examples"]
    assert groups == expected


def test_every_option_says_what_it_is(parser):
    assert [action.dest for action in parser._actions if not action.help or len(action.help) < 3] == []


def test_the_defaults_that_help_names_are_the_defaults(parser):
    """A number in parentheses at the end of a help text is the default."""
    named = {action.dest: re.search(r"\(([\d.]+)\)$", action.help or "") for action in parser._actions}
    defaults = {
        dest: (float(found[1]), getattr(parser.parse_args([]), dest))
        for dest, found in named.items()
        if found and dest != "preprocessing_num_workers"
    }
    assert len(defaults) >= 9
    assert {dest: said for dest, (said, _) in defaults.items()} == {dest: real for dest, (_, real) in defaults.items()}


def test_the_examples_of_help_can_be_parsed(parser):
    """Those of this script; launchers have options of their own."""
    lines = re.sub(r"\\\n\s*", "", parser.epilog or "").splitlines()
    found = [re.split(r"train_prune\.py|\.\.\.", line.partition("(")[0])[1].split() for line in lines if " --" in line]
    examples = [words for words in found if words and words[0].startswith("--")]
    assert [words[0] for words in examples][-2:] == ["--train_file", "--resume_from_checkpoint"]
    assert len(examples) == 4
    for words in examples:
        shared.check(parser.parse_args(words))


# ---- options --------------------------------------------------------------------------------------------------------


def test_both_apps_share_all_but_their_data():
    one, other = (set(options_of(made())) for made in PARSERS.values())
    assert one - other == {"--task_name", "--validation_mismatched_file", "--max_length"}
    assert other - one == {
        *("--dataset_name", "--dataset_config_name", "--version_2_with_negative", "--max_seq_length", "--doc_stride"),
        *("--n_best_size", "--max_answer_length", "--null_score_diff_threshold"),
    }


OF_THE_SCRIPTS = (
    *("max_train_samples", "model_name_or_path", "tokenizer_name", "per_device_train_batch_size", "seed"),
    *("per_device_eval_batch_size", "learning_rate", "weight_decay", "num_train_epochs", "max_train_steps"),
    *("gradient_accumulation_steps", "lr_scheduler_type", "num_warmup_steps", "output_dir", "push_to_hub"),
    *("hub_model_id", "hub_token", "checkpointing_steps", "resume_from_checkpoint", "with_tracking", "report_to"),
    *("train_file", "validation_file", "pad_to_max_length", "do_prune", "cooldown_epochs", "pruning_pattern"),
    *("target_sparsity", "distill_loss_weight", "teacher_model_name_or_path"),
)


@pytest.mark.parametrize("name", OF_THE_SCRIPTS)
def test_names_of_the_no_trainer_scripts_are_kept(parser, name):
    assert f"--{name}" in options_of(parser)


def test_names_that_are_gone_are_answered_and_are_no_options(app, parser, capsys):
    assert parser.gone.keys() >= shared.GONE.keys()
    assert not parser.gone.keys() & set(options_of(parser))
    for name, instead in parser.gone.items():
        assert finetune_apps.main(app, [f"{name}=1"]) == 2
        assert capsys.readouterr().err == f"{name}: is no option here; {instead}\n"
        named = re.match(r"write (--\w+)", instead)
        assert named is None or named[1] in options_of(parser)


def test_lists_of_options_name_options(parser):
    known = set(vars(parser.parse_args([])))
    assert set(shared.PRUNING) <= known
    assert set(shared.LEARNING) <= known
    assert set(shared.MAY_CHANGE) <= known
    assert {flag[2:] for flag in shared.RECIPE_FLAGS.values()} <= known


def test_defaults_ask_for_nothing(parser):
    options = parser.parse_args([])
    shared.check(options)
    assert not options.do_prune
    assert options.dist_loss is None
    assert options.output_dir is None


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model_name_or_path=bert"], (5e-5, 3, 8)),
        (["--model_name_or_path=bert", "--do_prune"], (2e-4, 6, 8)),  # what the README's figures were made with
        ([], (2e-3, 9, 32)),
        (["--do_prune"], (2e-3, 9, 32)),
        (["--model_name_or_path=bert", "--do_prune", "--learning_rate=1", "--num_train_epochs=2"], (1.0, 2, 8)),
    ],
)
def test_defaults_that_depend_on_the_run(parser, words, expected):
    from apps.common.finetune.build import add_defaults

    options = parser.parse_args(words)
    add_defaults(options, epochs_of_tiny=9)
    assert (options.learning_rate, options.num_train_epochs, options.per_device_train_batch_size) == expected


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {}),
        (["--seed=0"], {"seed": 0}),  # as the default, and given all the same
        (["--do_prune", "--warm_epochs", "0.5"], {"do_prune": True, "warm_epochs": 0.5}),
        (["--resume_from_checkpoint"], {"resume_from_checkpoint": True}),
        (["--resume_from_checkpoint", "runs/exp/step_3"], {"resume_from_checkpoint": "runs/exp/step_3"}),
        (["--checkpointing_steps=007"], {"checkpointing_steps": "7"}),
        (["--checkpointing_steps=epoch"], {"checkpointing_steps": "epoch"}),
        (["--learning_rate=1e-4", "--learning_rate=2e-4"], {"learning_rate": 2e-4}),
    ],
)
def test_given(parser, words, expected):
    assert parser.given(words) == expected
    assert vars(parser.parse_args(words)).items() >= expected.items()  # given leaves the defaults as they were
    assert parser.parse_args([]).seed == 0


@pytest.mark.parametrize("words", [["--hub_token", "hf_x"], ["--hub_token=hf_x"]])
def test_the_token_is_not_in_the_command_that_is_written_down(monkeypatch, words):
    from apps.common.finetune import card

    monkeypatch.setattr(sys, "argv", ["train_prune.py", "--seed=1", *words, "--push_to_hub"])
    assert card.command() == "train_prune.py --seed=1 --push_to_hub"


def test_no_abbreviations(app, capsys):
    assert finetune_apps.main(app, ["--num_train=3"]) == 2
    assert capsys.readouterr().err.startswith("--num_train: unknown option; ")


def test_the_tasks_of_both_tables_agree():
    assert tuple(TASKS) == text_classification.TASKS


@pytest.mark.parametrize(("typed", "name"), [("mrpc", "mrpc"), ("MRPC", "mrpc"), ("SST2", "sst2")])
def test_task_names_in_any_case(typed, name):
    assert finetune_apps.parsed("text_classification", [f"--task_name={typed}"]).task_name == name
