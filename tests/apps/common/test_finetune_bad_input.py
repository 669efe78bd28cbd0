"""What a user of the Transformers apps can do wrong: one line that says what to do, exit code 2, nothing is written."""

from __future__ import annotations

import json
import logging
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
import torch

from apps.common.finetune import hub
from tests.support import finetune_apps

TEXT, QA = "text_classification", "qa"
Refused = Callable[..., str]


class Foreign:
    """Like a class of somebody's training script. Reading it as a pickle leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class Stderr:
    """Loggers hold the stderr of the time when they were made: it is another one in every test."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


# ---- the world ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sets, models and runs that the tests below name. No test changes them, and no run may."""
    world = tmp_path_factory.mktemp("world")
    (world / "folder").mkdir()
    _sets(world)
    _questions(world)
    _models(world)
    _runs(world)
    return world


def _sets(world: Path) -> None:
    finetune_apps.write(world / "train.csv", finetune_apps.reviews(16))
    finetune_apps.write(world / "validation.csv", finetune_apps.reviews(8, 1))
    finetune_apps.write(world / "pairs.csv", finetune_apps.pairs(8))
    finetune_apps.write(world / "reals.csv", [{"sentence": "x", "label": label} for label in (0.5, 1.25, 3.0)])
    texts = {
        "empty.csv": "",
        "blank.csv": "\n\n",
        "header.csv": "sentence,label\n",
        "no-label.csv": "sentence,lable\nx,1\n",
        "no-text.csv": "label,weight\n1,0.5\n0,2.5\n",
        "numbers.csv": "sentence,label\n1,0\n2,1\n",
        "other.csv": "text,label\nx,0\ny,1\n",
        "three.csv": "a,b,c,label\nx,y,z,0\nx,y,z,1\n",
        "one-label.csv": "sentence,label\nx,0\ny,0\n",
        "unlabelled.csv": "sentence,label\nx,0\ny,\nz,1\n",
        "no-words.csv": "sentence,label\nx,0\n,1\n",
        "too-high.csv": "sentence,label\nx,0\ny,2\n",
        "negative.csv": "sentence,label\nx,0\ny,-1\n",
        "named.csv": "sentence,label\nx,acceptable\ny,fine\n",
        "infinite.csv": "sentence1,sentence2,label\nx,y,1.5\nx,y,inf\n",
        "named-real.jsonl": '{"sentence1": "x", "sentence2": "y", "label": "high"}\n',
        "listed-real.jsonl": '{"sentence1": "x", "sentence2": "y", "label": [1.0]}\n',
        "lists.jsonl": '{"sentence": "x", "label": [1, 0]}\n{"sentence": "y", "label": [0, 1]}\n',
        "dicts.jsonl": '{"sentence": "x", "label": {"a": 1}}\n{"sentence": "y", "label": {"a": 0}}\n',
        "words.jsonl": '{"sentence": ["x", "y"], "label": 1}\n',
        "ragged.csv": "sentence,label\nx,0\ny,1,3,4,5\n",
        "broken.json": '{"sentence": [}',
        "broken.jsonl": '{"sentence": "x", "label": 0}\n{"sentence":\n',
        "rows.txt": "sentence,label\nx,0\n",
    }
    for name, text in texts.items():
        (world / name).write_text(text)
    for name in ("broken.csv", "broken.parquet"):
        (world / name).write_bytes(b"\x80\x81\xff\xfe" * 50)


def _questions(world: Path) -> None:
    rows = finetune_apps.questions(8)
    finetune_apps.write(world / "train.json", rows)
    finetune_apps.write_squad(world / "validation.json", finetune_apps.questions(6, 1))
    finetune_apps.write_squad(world / "v2.json", finetune_apps.questions(6, unanswerable=True), version="v2.0")
    context = rows[1]["context"]
    right = rows[1]["answers"]
    changes: dict[str, dict[str, Any]] = {
        "absent": {"answers": {"text": ["Rome"], "answer_start": [0]}},
        "misplaced": {"answers": {"text": right["text"], "answer_start": [0]}},
        "from-behind": {"answers": {"text": right["text"], "answer_start": [right["answer_start"][0] - len(context)]}},
        "no-start": {"answers": {"text": right["text"], "answer_start": []}},
        "null-start": {"answers": {"text": right["text"], "answer_start": [None]}},
        "null-text": {"answers": {"text": [None], "answer_start": [0]}},
        "empty-text": {"answers": {"text": [""], "answer_start": [0]}},
        "no-answer": {"answers": {"text": [], "answer_start": []}},
        "null-answers": {"answers": None},
        "twice": {"id": rows[0]["id"]},
        "no-id": {"id": None},
        "no-question": {"question": "  "},
        "null-context": {"context": None},
    }
    for name, change in changes.items():
        finetune_apps.write(world / f"{name}.json", [rows[0], {**rows[1], **change}, *rows[2:]])
    everywhere: dict[str, Any] = {
        "text-starts": {"text": ["x"], "answer_start": ["0"]},
        "real-starts": {"text": ["x"], "answer_start": [0.5]},
        "single": {"text": "x", "answer_start": 0},
        "listed": [{"text": "x", "answer_start": 0}],
        "plain": "x",
    }
    for name, answers in everywhere.items():
        finetune_apps.write(world / f"{name}.json", [{**row, "answers": answers} for row in rows])
    finetune_apps.write(world / "no-context.json", [{"id": 1, "question": "x", "answers": right}])
    finetune_apps.write(world / "mixed-ids.json", [{**rows[0], "id": 1}, rows[1]])
    asked = {"id": "1", "question": "x", "answers": [{"text": "x"}]}
    contents: dict[str, Any] = {
        "no-questions.json": {"data": [{"paragraphs": []}]},
        "no-qas.json": {"data": [{"paragraphs": [{"context": "x"}]}]},
        "no-answer-start.json": {"data": [{"paragraphs": [{"context": "x", "qas": [asked]}]}]},
        "list.json": [],
        "object.json": {},
        "number.json": 3,
        "numbers.json": [1, 2],
        "data-number.json": {"data": 3},
    }
    for name, content in contents.items():
        (world / name).write_text(json.dumps(content))
    (world / "questions.csv").write_text("id,question,context,answers\n1,a,b,c\n")
    (world / "empty.json").write_text(" \n")


def _models(world: Path) -> None:
    def save(name: str, app: str = TEXT, **changed: Any) -> None:
        finetune_apps.save_model(world / name, app, **changed)

    save("model")
    save("qa-model", QA)
    save("three-labels", num_labels=3)
    save("headless", head=False)
    save("wide", hidden_size=32)
    save("deep", num_hidden_layers=3)
    save("short", max_position_embeddings=16)
    save("swapped", id2label={0: "acceptable", 1: "unacceptable"}, label2id={"acceptable": 0, "unacceptable": 1})
    save("fewer-words", texts=finetune_apps.TEXTS[:20])
    save("more-words", texts=[*finetune_apps.TEXTS, "many more words than the others have"])
    save("other-words", texts=[text.replace("plot", "tolp") for text in finetune_apps.TEXTS])
    config = json.loads((world / "model/config.json").read_text())
    changes: dict[str, tuple[str, str | bytes | None]] = {
        "no-weights": ("model.safetensors", None),
        "cut-weights": ("model.safetensors", (world / "model/model.safetensors").read_bytes()[:5000]),
        "empty-weights": ("model.safetensors", b""),
        "broken-config": ("config.json", "{"),
        "list-config": ("config.json", "[]"),
        "no-type": ("config.json", "{}"),
        "unknown-type": ("config.json", '{"model_type": "foo"}'),
        "image-model": ("config.json", '{"model_type": "vit"}'),
        "remote-code": ("config.json", '{"model_type": "foo", "auto_map": {"AutoConfig": "own.Config"}}'),
        "bad-size": ("config.json", json.dumps({**config, "hidden_size": 17})),
        "text-size": ("config.json", json.dumps({**config, "hidden_size": "x"})),
        "broken-words": ("tokenizer.json", "{"),
        "no-words": ("tokenizer.json", None),
        "foreign": ("model.safetensors", None),
    }
    for name, (file, content) in changes.items():
        path = Path(shutil.copytree(world / "model", world / name)) / file
        path.unlink()
        if content is not None:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
    (world / "no-words/tokenizer_config.json").unlink()
    (world / "remote-code/own.py").write_text(f"open({str(world / 'touched')!r}, 'w')\n")
    torch.save({"x": Foreign(world / "touched")}, world / "foreign/pytorch_model.bin")
    recipes = {
        "empty": "",
        "list": "- 0.8\n",
        "broken": "pattern: [",
        "unknown": "target_sparsty: 0.5",
        "too-high": "target_sparsity: 2",
        "nothing": "op_names: [nothing]",
        "no-layer": 'excluded_op_names: [".*"]',
    }
    for name, text in recipes.items():
        (world / f"{name}.yaml").write_text(text)


def _runs(world: Path) -> None:
    """Finished runs with a checkpoint an epoch, and damaged copies of a checkpoint."""
    short = {"num_train_epochs": 2, "checkpointing_steps": "epoch"}
    for name, more in (("dense", []), ("sparse", ["--do_prune"])):
        files = world / "train.csv", world / "validation.csv", world / "runs" / name
        words = finetune_apps.arguments(*files, *more, model_name_or_path=world / "model", **short)
        assert finetune_apps.main(TEXT, words) == 0
    files = world / "train.json", world / "validation.json", world / "runs/qa"
    words = finetune_apps.arguments(*files, model_name_or_path=world / "qa-model", **short, **LENGTHS)
    assert finetune_apps.main(QA, words) == 0

    source = world / "runs/dense/epoch_1"
    state = torch.load(source / "state.pt", weights_only=True)
    own = torch.load(source / "rank_0.pt", weights_only=True)
    options = state["options"]
    states: dict[str, Any] = {
        **{f"no-{name}": {key: value for key, value in state.items() if key != name} for name in state},
        "other-rows": {**state, "options": {**options, "train_file": str(world / "validation.csv")}},
        "other-held-out": {**state, "options": {**options, "validation_file": str(world / "train.csv")}},
        "no-file": {**state, "options": {**options, "train_file": str(world / "gone.csv")}},
        "wide": {**state, "options": {**options, "model_name_or_path": str(world / "wide")}},
        "deep": {**state, "options": {**options, "model_name_or_path": str(world / "deep")}},
        "gone": {**state, "options": {**options, "model_name_or_path": str(world / "gone")}},
        "other-words": {**state, "options": {**options, "model_name_or_path": str(world / "other-words")}},
        "bf16": {**state, "precision": "bf16"},
        "sharded": {**state, "sharded": True},
        "list": [1, 2],
        "foreign": {"app": Foreign(world / "touched")},
    }
    for name, content in states.items():
        torch.save(content, Path(shutil.copytree(source, world / "saved" / name)) / "state.pt")
    for name, bytes_ in {
        "garbage": b"\0garbage",
        "nothing": b"",
        "cut": (source / "state.pt").read_bytes()[:3000],
    }.items():
        (Path(shutil.copytree(source, world / "saved" / name)) / "state.pt").write_bytes(bytes_)
    ranks = {"rank-foreign": {"rng": Foreign(world / "touched")}, "rank-no-rng": {"sums": {}}, "rank-no-sums": own}
    ranks["rank-no-sums"] = {"rng": own["rng"]}
    for name, content in ranks.items():
        torch.save(content, Path(shutil.copytree(source, world / "saved" / name)) / "rank_0.pt")
    (Path(shutil.copytree(source, world / "saved/rank-gone")) / "rank_0.pt").unlink()


# ---- how a run is refused -------------------------------------------------------------------------------------------

LENGTHS = {"max_seq_length": 40, "doc_stride": 8}


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*"))}


@pytest.fixture
def refused(world, tmp_path, capsys, monkeypatch) -> Refused:
    """The line on stderr of a run that must not begin. ``{world}`` is that folder; None leaves an option out."""
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    for name in ("datasets", "transformers", "huggingface_hub", "accelerate"):
        for handler in logging.getLogger(name).handlers:
            if type(handler) is logging.StreamHandler:  # not those of pytest
                monkeypatch.setattr(handler, "stream", Stderr())

    def attempt(app: str, *more: str, **options: object) -> str:
        kind = {TEXT: ("csv", "model", {}), QA: ("json", "qa-model", LENGTHS)}[app]
        usual = {"train_file": f"{{world}}/train.{kind[0]}", "validation_file": f"{{world}}/validation.{kind[0]}"}
        usual |= {"output_dir": tmp_path / "out", "model_name_or_path": f"{{world}}/{kind[1]}", **kind[2]}
        chosen = {"num_train_epochs": 1, **usual, **options}
        words = [*(f"--{name}={value}" for name, value in chosen.items() if value is not None), *more]
        before = state_of(world)
        code = finetune_apps.main(app, [word.replace("{world}", str(world)) for word in words])
        err = capsys.readouterr().err
        assert code == 2
        assert err.endswith("\n")
        assert err.count("\n") == 1
        assert sorted(tmp_path.iterdir()) == [place]
        assert list(place.iterdir()) == []
        assert state_of(world) == before
        return err.removesuffix("\n")

    return attempt


def said(pattern: str, line: str) -> bool:
    """``{any}`` stands for whatever another package has to say."""
    found = re.fullmatch(pattern.replace("{any}", ".+"), line) is not None
    if not found:
        print(f"said: {line}", file=sys.__stdout__)
    return found


def short(value: Any) -> str:
    """The name of a row in a table: without its message."""
    text = " ".join(value) if isinstance(value, list) else str(value)
    return "" if ": " in text else text


# ---- words ----------------------------------------------------------------------------------------------------------

NEEDS_PRUNE = r"--{}: does nothing without --do_prune, got {}; add --do_prune"
NEEDS_DIST = r"--{}: does nothing without --dist_loss, got {}; add --dist_loss kl"
WORDS = [
    (["--epochs=3"], r"--epochs: unknown option; .+"),
    (["--target_sparsty=0.8"], r"--target_sparsty: unknown option; did you mean '--target_sparsity'\?"),
    (["--per-device-train-batch-size=3"], r"{any}; did you mean '--per_device_train_batch_size'\?"),
    (["--resume"], r"--resume: is no option here; write --resume_from_checkpoint"),
    (["--use_slow_tokenizer"], r"--use_slow_tokenizer: is no option here; tokenizers are fast ones; leave it out"),
    (["--trust_remote_code"], r"--trust_remote_code: is no option here; code from the hub is not run; leave it out"),
    (["--sparsity_warm_epochs=1"], r"--sparsity_warm_epochs: is no option here; write --warm_epochs"),
    (["--do_train"], r"--do_train: is no option here; it always trains; leave it out"),
    (["train.csv"], r"arguments: unexpected 'train.csv'; every value follows an --option"),
    (["--num_train_epochs=0"], r"--num_train_epochs: must be at least 1, got 0"),
    (["--num_train_epochs=1.5"], r"--num_train_epochs: must be a whole number, got '1.5'"),
    (["--max_train_steps=0"], r"--max_train_steps: must be at least 1, got 0"),
    (["--learning_rate=0"], r"--learning_rate: must be above 0, got 0"),
    (["--learning_rate=nan"], r"--learning_rate: must be finite, got nan"),
    (["--learning_rate=high"], r"--learning_rate: must be a number, got 'high'"),
    (["--weight_decay=-1"], r"--weight_decay: must not be negative, got -1"),
    (["--max_grad_norm=inf"], r"--max_grad_norm: must be finite, got inf"),
    (["--seed=-1"], r"--seed: must be at least 0, got -1"),
    (["--seed=4294967296"], r"--seed: must be at most 4294967295, got 4294967296"),
    (["--max_train_samples=0"], r"--max_train_samples: must be at least 1, got 0"),
    (["--lr_scheduler_type=cosin"], r"--lr_scheduler_type: must be one of {any}, got 'cosin'; did you mean 'cosine'\?"),
    (["--mixed_precision=fp8"], r"--mixed_precision: must be one of no, bf16, fp16, got 'fp8'.*"),
    (["--mixed_precision=fp16"], r"--mixed_precision: fp16 needs a GPU, got fp16 on the CPU; use bf16 or no"),
    (["--dist_loss=mse"], r"--dist_loss: must be one of l2, kl, got 'mse'.*"),
    (["--checkpointing_steps=0"], r"--checkpointing_steps: must be 'epoch' or a number of optimizer steps, got '0'"),
    (["--checkpointing_steps=all"], r"--checkpointing_steps: must be 'epoch' or a number of .*, got 'all'"),
    # what does nothing
    *(
        ([f"--{name}={value}"], NEEDS_PRUNE.format(name, re.escape(value)))
        for name, value in (
            ("target_sparsity", "0.5"),
            ("pruning_pattern", "4x1"),
            ("pruning_type", "magnitude"),
            ("pruning_scope", "local"),
            ("pruning_frequency", "3"),
            ("pruning_config", "x.yaml"),
            ("warm_epochs", "0.5"),
            ("cooldown_epochs", "1.0"),
        )
    ),
    *(
        ([f"--{name}={value}"], NEEDS_DIST.format(name, value))
        for name, value in (
            ("teacher_model_name_or_path", "x"),
            ("temperature", "3.0"),
            ("feature_weight", "1.0"),
            ("distill_loss_weight", "0.25"),
        )
    ),
    (["--hub_model_id=x"], r"--hub_model_id: does nothing without --push_to_hub, got x; add it"),
    (["--hub_token=x"], r"--hub_token: does nothing without --push_to_hub.*"),
    (["--report_to=wandb"], r"--report_to: does nothing without --with_tracking, got wandb; add it"),
    # trackers
    (["--with_tracking", "--report_to=foo"], r"--report_to: {any}foo{any}"),
    (["--with_tracking", "--report_to=wandb"], r"--report_to: no such tracker is installed, got wandb; install one.*"),
    # pruning
    (["--do_prune", "--target_sparsity=1.5"], r"--target_sparsity: out of range, got 1.5; it must be less than 1"),
    (["--do_prune", "--target_sparsity=-1"], r"--target_sparsity: out of range, got -1.0; it must be greater than .*"),
    (["--do_prune", "--target_sparsity=nan"], r"--target_sparsity: must be finite, got nan"),
    (
        ["--do_prune", "--target_sparsity=high"],
        r"--target_sparsity: must be a number, got 'high'",
    ),
    (["--do_prune", "--pruning_pattern=4y1"], r"--pruning_pattern: unknown pattern, got '4y1'; use NxM blocks such .*"),
    (
        ["--do_prune", "--pruning_pattern=2:4", "--target_sparsity=0.8"],
        r"--target_sparsity: pattern 2:4 allows at most 0.5, got 0.8; lower it or change the pattern",
    ),
    (["--do_prune", "--pruning_type=foo"], r"--pruning_type: unknown pruning type, got 'foo'; known: .*"),
    (["--do_prune", "--pruning_scope=all"], r"--pruning_scope: must be one of global, local, got 'all'.*"),
    (["--do_prune", "--pruning_frequency=0"], r"--pruning_frequency: must be at least 1, got 0"),
    (
        ["--do_prune", "--cooldown_epochs=1"],
        r"--cooldown_epochs: with --warm_epochs must be below the 1 epochs, got 0 \+ 1; the others prune",
    ),
    (
        ["--do_prune", "--warm_epochs=0.5", "--cooldown_epochs=0.5"],
        r"--cooldown_epochs: with --warm_epochs must be below the 1 epochs, got 0.5 \+ 0.5; the others prune",
    ),
    (["--do_prune", "--warm_epochs=0.5"], r"--warm_epochs: half of the 1 epochs is cooldown, got 0.5; lower it"),
    (["--do_prune", "--warm_epochs=-1"], r"--warm_epochs: must not be negative, got -1"),
    # the hub
    (["--push_to_hub"], r"--push_to_hub: the hub does not answer, got True; leave it out and upload the folder later"),
    # folders
    (["--output_dir={world}/train.csv"], r"--output_dir: is no folder to write to, got '.*/train.csv'; choose another"),
    (
        ["--output_dir={world}/runs/dense"],
        r"--output_dir: holds a run already, got '.*/runs/dense'; choose another, add --overwrite_output_dir, or .*",
    ),
    (["--output_dir={world}/model"], r"--output_dir: holds a run already, got '.*/model'; {any}"),
    (["--output_dir={world}/train.csv/run"], r"--output_dir: {any}"),
    (["--output_dir=/proc/no/run"], r"--output_dir: {any}, got {any}"),
    (["--output_dir="], r"--output_dir: {any}"),
    # going on
    (
        ["--resume_from_checkpoint="],
        r"--resume_from_checkpoint: must be a folder, got ''; leave the value or the option out",
    ),
    (["--resume_from_checkpoint"], r"--resume_from_checkpoint: no checkpoint, got .*/out; give the folder of .*"),
    (
        ["--resume_from_checkpoint", "--output_dir={world}/folder"],
        r"--resume_from_checkpoint: no checkpoint, got .*/folder; give the folder of the checkpoint",
    ),
]


@pytest.mark.parametrize(("words", "message"), WORDS, ids=short)
@pytest.mark.parametrize("app", [TEXT, QA])
def test_words(refused, app, words, message):
    assert said(message, refused(app, *words))


@pytest.mark.parametrize(
    ("app", "words", "message"),
    [
        (TEXT, ["--task_name=mrp"], r"--task_name: must be one of cola, .*, wnli, got 'mrp'; did you mean 'mrpc'\?"),
        (TEXT, ["--task_name=foo"], r"--task_name: must be one of cola, .*, wnli, got 'foo'.*"),
        (TEXT, ["--max_len=3"], r"--max_len: unknown option; did you mean '--max_length'\?"),
        (TEXT, ["--max_length=1"], r"--max_length: must be at least 2, got 1"),
        (TEXT, ["--max_length=129"], r"--max_length: the model reads at most 128 tokens, got 129; lower it"),
        (QA, ["--max_seq_length=129"], r"--max_seq_length: the model reads at most 128 tokens, got 129; lower it"),
        (QA, ["--max_length=3"], r"--max_length: unknown option; did you mean '--max_seq_length'\?"),
        (QA, ["--max_seq_length=7"], r"--max_seq_length: must be at least 8, got 7"),
        (QA, ["--do_predict"], r"--do_predict: is no option here; predictions.json holds the answers to .*"),
        (QA, ["--n_best_size=0"], r"--n_best_size: must be at least 1, got 0"),
        (QA, ["--max_answer_length=0"], r"--max_answer_length: must be at least 1, got 0"),
        (QA, ["--null_score_diff_threshold=nan"], r"--null_score_diff_threshold: must be finite, got nan"),
        (
            QA,
            ["--null_score_diff_threshold=3"],
            r"--null_score_diff_threshold: does nothing without --version_2_with_negative, got 3.*; add it",
        ),
        (QA, ["--dataset_config_name=x"], r"--dataset_config_name: does nothing without .*"),
        (
            QA,
            ["--doc_stride=32"],
            r"--doc_stride: question 'q0-\d' in the training questions takes 5 tokens: it must be below 32, "
            r"or --max_seq_length at least 41, got 32",
        ),
        (QA, ["--doc_stride=-1"], r"--doc_stride: must be at least 0, got -1"),
        (
            QA,
            ["--dataset_name=squad"],
            r"--dataset_name: the questions come from --train_file, got both; leave one out",
        ),
    ],
    ids=short,
)
def test_words_of_one_app(refused, app, words, message):
    assert said(message, refused(app, *words))


@pytest.mark.parametrize(("app", "name"), [(TEXT, "rte"), (QA, "squad")])
def test_without_the_hub_files_are_asked_for(refused, app, name):
    option = {TEXT: "task_name", QA: "dataset_name"}[app]
    line = refused(app, train_file=None, validation_file=None, **{option: name})
    cause = r"is not in the hub's cache, and the hub does not answer \({any}\)"
    assert said(rf"--{option}: {cause}, got {name}; give --train_file and --validation_file", line)


def test_a_name_that_the_hub_has_not(refused, monkeypatch):
    def nowhere(*args: Any, **others: Any) -> None:
        raise FileNotFoundError("no such data set\nand a second line")

    monkeypatch.setattr(hub, "answers", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", nowhere)
    line = refused(QA, train_file=None, validation_file=None, dataset_name="sqad")
    assert line == (
        "--dataset_name: is not on the hub (no such data set), got sqad; give --train_file and --validation_file"
    )


@pytest.mark.parametrize(("online", "place"), [(True, "on the hub"), (False, "in the hub's cache, and {any}")])
@pytest.mark.parametrize("option", ["model_name_or_path", "tokenizer_name", "teacher_model_name_or_path"])
def test_a_model_that_the_hub_has_not(refused, monkeypatch, option, online, place):
    monkeypatch.setattr(hub, "answers", lambda: online)
    more = ["--dist_loss=kl"] if option.startswith("teacher") else []
    line = refused(TEXT, *more, **{option: "nobody/nothing"})
    assert said(
        rf"--{option}: no such folder, and not {place}, got 'nobody/nothing'; give a folder or a hub name", line
    )


@pytest.mark.parametrize("app", [TEXT, QA])
def test_not_logged_in(refused, monkeypatch, app):
    monkeypatch.setattr(hub, "answers", lambda: True)
    line = refused(app, "--push_to_hub")
    assert said(r"--push_to_hub: not logged in \(\w+\); run hf auth login or give --hub_token", line)


def test_the_hub_is_asked_once_and_then_left_alone(monkeypatch):
    asked = []

    class Session:
        def head(self, url: str, timeout: float) -> None:
            asked.append((url, timeout))
            raise ConnectionError

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.utils, "get_session", Session)
    hub.answers.cache_clear()
    try:
        assert [hub.answers(), hub.answers()] == [False, False]
    finally:
        hub.answers.cache_clear()
    assert asked == [(huggingface_hub.constants.ENDPOINT, 10)]
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    assert datasets.config.HF_HUB_OFFLINE


# ---- rows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("app", [TEXT, QA])
@pytest.mark.parametrize("option", ["train_file", "validation_file"])
def test_one_file_is_missing(refused, app, option):
    other = {"train_file": "validation_file", "validation_file": "train_file"}[option]
    assert refused(app, **{option: None}) == f"--{option}: is missing beside --{other}; give both"


LOGGED = "datasets logs the same line before it raises (hub.quiet: set its verbosity to CRITICAL)"
FILES = [
    ("no.csv", r"{option}: no such file, got '.*/no.csv'; give a csv, json or parquet file"),
    ("folder", r"{option}: no such file, got '.*/folder'; {any}"),
    ("rows.txt", r"{option}: must end with one of csv, tsv, json, jsonl, parquet, got '.*/rows.txt'; convert it"),
    ("empty.csv", r"{option}: is an empty file, got '.*/empty.csv'"),
    ("header.csv", r"{option}: holds no rows, got '.*/header.csv'"),
    ("blank.csv", r"{option}: cannot be read as csv \({any}\), got '.*/blank.csv'"),
    ("broken.csv", r"{option}: cannot be read as csv \({any}\), got '.*/broken.csv'"),
    *(
        (file, rf"{{option}}: cannot be read as {file.rpartition('.')[2]} \({{any}}\), got '.*/{file}'")
        for file in ("broken.json", "broken.jsonl", "broken.parquet")
    ),
]


@pytest.mark.parametrize("option", ["--train_file", "--validation_file"])
@pytest.mark.parametrize(("file", "message"), FILES, ids=short)
@pytest.mark.parametrize("app", [TEXT, QA])
def test_files(refused, app, file, message, option):
    line = refused(app, f"{option}={{world}}/{file}")
    assert said(message.replace("{option}", option), line)


ROWS = [
    # file, more words, message
    ("no-label.csv", [], r"--train_file: has no column 'label', got \['sentence', 'lable'\]; rename the right one"),
    ("no-text.csv", [], r"--train_file: must have one or two text columns beside the label, got \[\]; .*"),
    ("numbers.csv", [], r"--train_file: must have one or two text columns beside the label, got \[\]; .*"),
    ("numbers.csv", ["--task_name=sst2"], r"--train_file: 'sentence' of row 1 is no text, got 1; mend the row"),
    ("words.jsonl", ["--task_name=sst2"], r"--train_file: 'sentence' of row 1 is no text, got \['x', 'y'\]; mend .*"),
    ("three.csv", [], r"--train_file: must have one or two text columns .*, got \['a', 'b', 'c'\]; leave .*"),
    ("one-label.csv", [], r"--train_file: must have at least two labels, got \['LABEL_0'\]; there is nothing .*"),
    ("unlabelled.csv", [], r"--train_file: row 2 has no label, got None; fill or remove it"),
    ("unlabelled.csv", ["--task_name=sst2"], r"--train_file: row 2 has no label, got None; fill or remove it"),
    ("no-words.csv", [], r"--train_file: 'sentence' of row 2 is no text, got None; mend the row"),
    (
        "too-high.csv",
        ["--task_name=cola"],
        r"--train_file: the label of row 2 is not in the list \(0 unacceptable, 1 acceptable\), got 2; mend the row",
    ),
    ("negative.csv", ["--task_name=cola"], r"--train_file: the label of row 2 is not in the list {any}, got -1; .*"),
    ("named.csv", ["--task_name=cola"], r"--train_file: the label of row 2 is not in the list {any}, got 'fine'; .*"),
    ("train.csv", ["--task_name=mrpc"], r"--train_file: has no column 'sentence1', got {any}; mrpc reads .*"),
    ("lists.jsonl", [], r"--train_file: the label of row 1 {any}"),
    ("dicts.jsonl", [], r"--train_file: the label of row 1 {any}"),
    ("ragged.csv", [], r"--train_file: cannot be read as csv \(.* line 3, saw 5\), got '.*/ragged.csv'"),
    ("reals.csv", ["--dist_loss=kl"], r"--dist_loss: kl needs classes, got a regression in local files; use l2"),
]


@pytest.mark.parametrize(("file", "words", "message"), ROWS, ids=short)
def test_rows(refused, file, words, message):
    assert said(message, refused(TEXT, *words, train_file=f"{{world}}/{file}"))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("named-real.jsonl", r"--train_file: the label of row 1 must be a number, got 'high'; mend the row"),
        ("listed-real.jsonl", r"--train_file: the label of row 1 must be a name or a number{any}"),
        ("infinite.csv", r"--train_file: the label of row 2 {any}"),
    ],
    ids=short,
)
def test_labels_of_a_regression(refused, file, message):
    files = dict.fromkeys(("train_file", "validation_file"), f"{{world}}/{file}")
    line = refused(TEXT, "--task_name=stsb", "--ignore_mismatched_sizes", **files)
    assert said(message, line)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (
            "too-high.csv",
            r"--validation_file: the label of row 2 is not in the list \(0 LABEL_0, 1 LABEL_1\), got 2; .*",
        ),
        ("other.csv", r"--validation_file: has no column 'sentence', got \['text', 'label'\]; custom reads sentence"),
        ("no-label.csv", r"--validation_file: has no column 'label', got \['sentence', 'lable'\]; .*"),
        ("no-words.csv", r"--validation_file: 'sentence' of row 2 is no text, got None; mend the row"),
        ("unlabelled.csv", r"--validation_file: row 2 has no label, got None; fill or remove it"),
    ],
    ids=short,
)
def test_validation_rows(refused, file, message):
    assert said(message, refused(TEXT, validation_file=f"{{world}}/{file}"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"--validation_mismatched_file: only mnli has one, got None; leave it out"),
        ({"task_name": "qnli"}, r"--validation_mismatched_file: only mnli has one, got qnli; leave it out"),
        (
            {"task_name": "mnli", "train_file": None, "validation_file": None},
            r"--train_file: is missing beside --validation_mismatched_file; give both",
        ),
    ],
    ids=short,
)
def test_the_second_validation_file(refused, options, message):
    assert said(message, refused(TEXT, "--validation_mismatched_file={world}/validation.csv", **options))


# ---- questions ------------------------------------------------------------------------------------------------------

LAYOUT = (
    r"--train_file: must be a SQuAD file, or rows of id, question, context and answers {{any}}{cause}, got '.*{file}'"
)
WHOLE = r"--train_file: question '?{}'? has answers of another kind, got {}; write {{text: \[...\], answer_start: .*"


def layout(file: str, cause: str = "") -> tuple[str, str]:
    return file, LAYOUT.format(file=file, cause=rf" \({cause}\)" if cause else "")


QUESTIONS = [
    (
        "absent.json",
        r"--train_file: question 'q0-1': its answer is not at answer_start 0, got 'Rome'; it is nowhere .*",
    ),
    (
        "misplaced.json",
        r"--train_file: question 'q0-1': its answer is not at answer_start 0, got '.*'; it is at \d+, .*",
    ),
    (
        "from-behind.json",
        r"--train_file: question 'q0-1' has an empty answer or one before the context, got {any} at -{any}",
    ),
    ("no-start.json", r"--train_file: question 'q0-1'{any}"),
    ("null-start.json", r"--train_file: question 'q0-1'{any}"),
    ("null-text.json", r"--train_file: question 'q0-1'{any}"),
    ("empty-text.json", r"--train_file: question 'q0-1'{any}"),
    ("text-starts.json", r"--train_file: question 'q0-0'{any}"),
    ("real-starts.json", r"--train_file: question 'q0-0'{any}"),
    ("single.json", r"--train_file: question 'q0-0'{any}"),
    ("no-answer.json", r"--train_file: question 'q0-1' has no answer; add --version_2_with_negative, or remove it"),
    ("v2.json", r"--train_file: question 'q0-2' has no answer; add --version_2_with_negative, or remove it"),
    ("null-answers.json", WHOLE.format("q0-1", "'None'")),
    ("listed.json", WHOLE.format("q0-0", "{any}")),
    ("plain.json", WHOLE.format("q0-0", "'x'")),
    ("questions.csv", WHOLE.format("1", "'c'")),
    ("twice.json", r"--train_file: question 'q0-0' is there twice; give each its own id"),
    ("no-id.json", r"--train_file: {any} id{any}"),
    ("no-question.json", r"--train_file: question 'q0-1' has no question, got '  '; fill or remove it"),
    ("null-context.json", r"--train_file: question 'q0-1' has no context, got None; fill or remove it"),
    (
        "no-context.json",
        r"--train_file: has no column 'context', got \['id', 'question', 'answers'\]; it must be {any}",
    ),
    ("train.csv", r"--train_file: has no column 'id', got \['sentence', 'label'\]; it must be a SQuAD file, {any}"),
    ("empty.json", r"--train_file: is an empty file, got '.*/empty.json'"),
    ("list.json", r"--train_file: holds no questions, got '.*/list.json'"),
    ("no-questions.json", r"--train_file: holds no questions, got '.*/no-questions.json'"),
    layout("object.json"),
    layout("number.json"),
    layout("data-number.json"),
    layout("numbers.json", "{{any}}"),
    layout("no-qas.json", "KeyError 'qas'"),
    layout("no-answer-start.json", "KeyError 'answer_start'"),
    layout("mixed-ids.json", "{{any}}"),
]


@pytest.mark.parametrize(("file", "message"), QUESTIONS, ids=short)
def test_questions(refused, file, message):
    assert said(message.replace("{{any}}", "{any}"), refused(QA, train_file=f"{{world}}/{file}"))


def test_questions_of_the_validation_file(refused):
    line = refused(QA, validation_file="{world}/absent.json")
    assert said(r"--validation_file: question 'q0-1': its answer is not at answer_start 0, {any}", line)


# ---- models ---------------------------------------------------------------------------------------------------------

NO_MODEL = r"--model_name_or_path: '.*/{file}' does not hold a (model|tokenizer) \({any}\); give its folder"
MODELS = [
    (
        "no",
        r"--model_name_or_path: no such folder, and not in the hub's cache, {any}, got '.*/no'; give a folder or .*",
    ),
    *((file, NO_MODEL) for file in ("folder", "train.csv", "no-weights", "broken-config", "no-type", "unknown-type")),
    *((file, NO_MODEL) for file in ("image-model", "remote-code", "bad-size", "broken-words")),
    ("cut-weights", NO_MODEL),
    ("empty-weights", NO_MODEL),
    ("foreign", NO_MODEL),
    ("list-config", NO_MODEL),
    ("text-size", NO_MODEL),
    ("no-words", r"--model_name_or_path: no tokenizer is in '.*/no-words'; give one with --tokenizer_name"),
    (
        "three-labels",
        r"--model_name_or_path: classifier.bias has another size than these data need, got '.*/three-labels'; "
        r"add --ignore_mismatched_sizes to begin with a new head",
    ),
    ("short", r"--max_length: the model reads at most 16 tokens, got 128; lower it"),
]


@pytest.mark.parametrize(("model", "message"), MODELS, ids=short)
def test_models(refused, world, model, message):
    line = refused(TEXT, model_name_or_path=f"{{world}}/{model}")
    assert said(message.replace("{file}", model), line)
    assert not (world / "touched").exists()


def test_a_tokenizer_with_more_words_than_the_model(refused):
    line = refused(TEXT, tokenizer_name="{world}/more-words")
    do = "use the tokenizer that the model was trained with"
    assert said(rf"--tokenizer_name: has \d+ entries, the model '.*/model' only \d+; {do}", line)


TEACHERS = [
    ("three-labels", r"{option}: the teacher has 3 labels, the student 2, got '.*/three-labels'; use another teacher"),
    (
        "fewer-words",
        r"{option}: the teacher has \d+ entries in its vocabulary, the student \d+, got {any}; use another .*",
    ),
    ("other-words", r"{option}: its tokenizer has other words, got '.*/other-words'; use a teacher with the same .*"),
    ("headless", r"{option}: is no trained teacher: classifier.bias is not in '.*/headless'; train it on this task .*"),
    ("qa-model", r"{option}: is no trained teacher: .* is not in '.*/qa-model'; train it on this task first, {any}"),
    ("folder", r"{option}: '.*/folder' does not hold a model \({any}\); give its folder"),
    ("no", r"{option}: no such folder, and not in the hub's cache, {any}, got '.*/no'; give a folder or a hub name"),
    ("short", r"--max_length: the teacher reads at most 16 tokens, got 128; lower it"),
]


@pytest.mark.parametrize(("teacher", "message"), TEACHERS, ids=short)
def test_teachers(refused, teacher, message):
    line = refused(TEXT, "--dist_loss=kl", teacher_model_name_or_path=f"{{world}}/{teacher}")
    assert said(message.replace("{option}", "--teacher_model_name_or_path"), line)


def test_a_teacher_with_its_labels_in_another_order(refused):
    line = refused(TEXT, "--task_name=cola", "--dist_loss=kl", teacher_model_name_or_path="{world}/swapped")
    assert said(r"--teacher_model_name_or_path: {any}acceptable{any}", line)


@pytest.mark.parametrize(
    ("app", "words", "message"),
    [
        (
            TEXT,
            ["--model_name_or_path="],
            r"--dist_loss: needs a trained teacher, got kl; give --teacher_model_name_.*",
        ),
        (
            TEXT,
            ["--model_name_or_path={world}/headless"],
            r"--model_name_or_path: is no trained teacher: classifier.bias is not in '.*/headless'; train it .*",
        ),
        (
            QA,
            ["--teacher_model_name_or_path={world}/model"],
            r"--teacher_model_name_or_path: is no trained teacher: qa_outputs.bias is not in '.*/model'; train it .*",
        ),
        *(
            (
                TEXT,
                ["--feature_weight=1", f"--teacher_model_name_or_path={{world}}/{name}"],
                rf"--feature_weight: hidden states of 2 layers of 16 and {size} cannot be compared, got .*/{name}'.*",
            )
            for name, size in (("wide", "2 layers of 32"), ("deep", "3 layers of 16"))
        ),
        (
            TEXT,
            ["--distill_loss_weight=1.5"],
            r"--distill_loss_weight: is the teacher's share in the loss, got 1.5; .*",
        ),
        (TEXT, ["--distill_loss_weight=0"], r"--distill_loss_weight: must be above 0, got 0"),
        (
            TEXT,
            ["--dist_loss=l2", "--temperature=3"],
            r"--temperature: l2 has none, got 3; leave it out or use --dist_loss kl",
        ),
    ],
    ids=short,
)
def test_distillation(refused, app, words, message):
    assert said(message, refused(app, "--dist_loss=kl", *words))


# ---- recipes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("no", r"{file}: cannot be read \(No such file or directory\); check the path of the configuration"),
        ("empty", r"{file}: is empty; write at least 'target_sparsity: 0.8'"),
        ("list", r"{file}: must be a mapping of options, got list; see docs/configuration.md"),
        ("broken", r"{file}, line \d+: {any}"),
        ("unknown", r"target_sparsty: unknown option, got 0.5; did you mean 'target_sparsity'\?"),
        ("too-high", r"target_sparsity: out of range, got 2; it must be less than 1"),
        ("nothing", r"pruning_configs\[0\].op_names\[0\]: matches no {any}, got 'nothing'; known: .*"),
        ("no-layer", r"pruning_configs\[0\]: no layer is left to prune {any}"),
    ],
    ids=short,
)
@pytest.mark.parametrize("app", [TEXT, QA])
def test_recipes(refused, world, app, recipe, message):
    line = refused(app, "--do_prune", f"--pruning_config={{world}}/{recipe}.yaml")
    assert said("--pruning_config: " + message.replace("{file}", str(world / f"{recipe}.yaml")), line)


# ---- going on -------------------------------------------------------------------------------------------------------

RESUME = "--resume_from_checkpoint"
ALONE = dict.fromkeys(
    ("train_file", "validation_file", "output_dir", "model_name_or_path", "num_train_epochs", *LENGTHS), None
)
LACKS = "a key that state.find does not look for: KeyError"
RESUMED = [
    *(
        (file, rf"{RESUME}: no checkpoint, got '.*/{file}'; give a folder such as step_100 that holds state.pt")
        for file in ("no", "folder", "train.csv", "runs/dense", "model")
    ),
    ("runs/qa/epoch_1", rf"{RESUME}: no state of a text_classification run, got '.*/runs/qa/epoch_1/state.pt'"),
    *((f"saved/{name}", rf"{RESUME}: .*: not a readable checkpoint {{any}}") for name in ("garbage", "nothing", "cut")),
    *((f"saved/{name}", rf"{RESUME}: .*: holds an object{{any}}") for name in ("foreign", "rank-foreign")),
    *(
        (f"saved/no-{name}", rf"{RESUME}: is damaged, '{name}' is missing, got {{any}}; use an earlier checkpoint")
        for name in ("options", "progress", "ranks", "recipe")
    ),
    *(
        (f"saved/no-{name}", rf"{RESUME}: is damaged, '{name}' is missing, got {{any}}; use an earlier checkpoint")
        for name in ("data", "precision", "sharded", "scheduler", "model", "optimizer")
    ),
    ("saved/no-app", rf"{RESUME}: no state of a text_classification run, got '.*/no-app/state.pt'"),
    ("saved/list", rf"{RESUME}: .*/state.pt: must hold a dict, got list; {{any}}"),
    ("saved/rank-no-rng", rf"{RESUME}: {{any}}"),
    ("saved/rank-no-sums", rf"{RESUME}: {{any}}"),
    ("saved/rank-gone", rf"{RESUME}: .*rank_0.pt{{any}}"),
    *(
        (
            f"saved/{name}",
            rf"{RESUME}: the data have changed: {what} rows was {{any}}, got {{any}}; put them back, or begin .*",
        )
        for name, what in (("other-rows", "training"), ("other-held-out", "validation"), ("other-words", "training"))
    ),
    ("saved/no-file", r"--train_file: no such file, got '.*/gone.csv'; {any}"),
    *(
        (f"saved/{name}", rf"{RESUME}: is of another model \({{any}}\), got '.*/saved/{name}'")
        for name in ("wide", "deep")
    ),
    ("saved/gone", r"--model_name_or_path: no such folder, {any}"),
    ("saved/bf16", r"--mixed_precision: this run was begun in bf16, got fp32; keep it"),
    ("saved/sharded", rf"{RESUME}: under FSDP2 a run goes on under FSDP2 only, and without it only without"),
]


@pytest.mark.parametrize(("folder", "message"), RESUMED, ids=short)
def test_checkpoints(refused, world, folder, message):
    assert said(message, refused(TEXT, f"{RESUME}={{world}}/{folder}", **ALONE))
    assert not (world / "touched").exists()


def test_a_checkpoint_of_the_other_app(refused):
    line = refused(QA, f"{RESUME}={{world}}/runs/dense/epoch_1", **ALONE)
    assert said(rf"{RESUME}: no state of a qa run, got '.*/runs/dense/epoch_1/state.pt'", line)


@pytest.mark.parametrize(
    ("word", "begun", "now"),
    [
        ("--num_train_epochs=7", "2", "7"),
        ("--learning_rate=0.5", "0.001", "0.5"),
        ("--per_device_train_batch_size=2", "8", "2"),
        ("--gradient_accumulation_steps=2", "1", "2"),
        ("--max_length=16", "128", "16"),
        ("--seed=3", "0", "3"),
        ("--do_prune", "False", "True"),
        ("--dist_loss=kl", "None", "'kl'"),
        ("--max_train_samples=4", "None", "4"),
        ("--mixed_precision=bf16", "None", "'bf16'"),
        ("--task_name=cola", "None", "'cola'"),
        ("--train_file={world}/pairs.csv", "'.*/train.csv'", "'.*/pairs.csv'"),
        ("--model_name_or_path={world}/deep", "'.*/model'", "'.*/deep'"),
    ],
    ids=short,
)
def test_a_resumed_run_keeps_its_options(refused, word, begun, now):
    line = refused(TEXT, f"{RESUME}={{world}}/runs/dense/epoch_1", word, **ALONE)
    do = rf"leave it out, or begin a new run without {RESUME}"
    assert said(rf"{word.partition('=')[0]}: this run was begun with {begun}, got {now}; {do}", line)


@pytest.mark.parametrize(
    "place",
    [
        ("runs/sparse"),
        ("model"),
        ("train.csv"),
    ],
    ids=short,
)
def test_a_resumed_run_writes_over_no_other(refused, world, tmp_path, place):
    other = tmp_path / "here" / "other"
    files = world / place
    if files.is_dir():
        shutil.copytree(files, other)
    else:
        shutil.copy(files, other)
    before = state_of(other)
    try:
        code = finetune_apps.main(TEXT, [f"{RESUME}={world}/runs/dense/epoch_1", f"--output_dir={other}"])
        assert code == 2
        assert state_of(other) == before
    finally:
        shutil.rmtree(tmp_path / "here")
