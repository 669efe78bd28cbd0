"""The Transformers apps end to end: what a run reaches, writes, learns from and counts."""

import csv
import hashlib
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from apps.common.finetune import build, loop, processes, results
from pruning_core.masks.report import SparsityReport
from tests.support import finetune_apps as apps

RECIPES = sorted(path for path in (apps.ROOT / "apps/common/recipes").glob("*.yaml") if path.stem != "slim")
WEIGHTS = 2 * (4 * 16 * 16 + 2 * 16 * 32)  # of the linear layers of both encoder layers: what the recipes prune
KINDS = {"text_classification": AutoModelForSequenceClassification, "qa": AutoModelForQuestionAnswering}
HEADS = {"text_classification": "classifier.weight", "qa": "qa_outputs.weight"}
ROWS, HELD_OUT, BATCH = 23, 11, 4  # 6 batches an epoch, the last one of 3 rows
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
WILD = {"initializer_range": 0.3}  # random weights that tell rows apart
BOTH = pytest.mark.parametrize("app", apps.APPS)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """For each app a model with dropout, one of other weights to learn from, and its rows."""
    folder = tmp_path_factory.mktemp("finetune")
    for app in apps.APPS:
        apps.write(folder / app / "train.jsonl", some_rows(app, ROWS))
        apps.write(folder / app / "validation.jsonl", some_rows(app, HELD_OUT, seed=1))
        apps.save_model(folder / app / "bert", app, **DROPOUT, **WILD)
        apps.save_model(folder / app / "teacher", app, seed=1, **DROPOUT, **WILD)
        apps.save_model(folder / app / "still", app, **WILD)
    return folder


def some_rows(app: str, count: int, seed: int = 0) -> list[apps.Row]:
    """Of several lengths, so that batches are padded."""
    if app == "qa":
        return apps.questions(count, seed)
    rows = apps.reviews(count, seed)
    return [{**row, "sentence": row["sentence"] * (1 + i % 3)} for i, row in enumerate(rows)]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch) -> None:
    """Drawing takes longer than the training."""
    monkeypatch.setattr(results, "plot_curves", lambda *_, **__: None)
    monkeypatch.setattr(SparsityReport, "plot", lambda *_: None)


def words(place: Path, app: str, output: Path, *more: str, **options: object) -> list[str]:
    start: dict[str, object] = {"model_name_or_path": place / app / "bert", "per_device_train_batch_size": BATCH}
    start |= {"num_train_epochs": 2, "max_seq_length" if app == "qa" else "max_length": 64}
    start |= {"doc_stride": 16} if app == "qa" else {}
    files = place / app / "train.jsonl", place / app / "validation.jsonl"
    return apps.arguments(*files, output, *more, **{**start, **options})


def pruned(place: Path, app: str, output: Path, *more: str, **options: object) -> list[str]:
    return words(place, app, output, "--do_prune", *more, **{"pruning_frequency": 1, **options})


class Live:
    """The run that was built last, and what its training did."""

    def __init__(self, monkeypatch) -> None:
        self.patch, self.train, self.losses = monkeypatch, build.train, loop.losses
        self.run: Any = None
        monkeypatch.setattr(build, "train", self._train)
        monkeypatch.setattr(loop, "losses", self._losses)

    def _train(self, run, *rest) -> int:
        self.run = run
        self.called: list[str] = []  # in the order of the calls
        self.masks: list[tuple[int, str, int]] = []  # in every forward pass: optimizer step, digest, zeros
        self.clocks: list[tuple[int, int, int]] = []  # likewise: of the run, the schedule and the pruner
        self.modes: list[tuple[bool, bool]] = []  # in every forward pass: do student and teacher train
        self.rates: list[float] = []
        self.norms: list[float] = []
        self.gradients: list[Tensor] = []
        run.optimizer.optimizer.register_step_post_hook(self._stepped)
        self._after(run.accelerator, "clip_grad_norm_", self._clipped)
        if run.pruner is not None:
            self._after(run.pruner, "on_before_optimizer_step", lambda: self.called.append("before"))
            self._after(run.pruner, "on_after_optimizer_step", lambda: self.called.append("after"))
        return self.train(run, *rest)

    def _after(self, owner, name: str, tell) -> None:
        original = getattr(owner, name)

        def called(*arguments):
            result = original(*arguments)
            tell()
            return result

        setattr(owner, name, called)

    def _clipped(self) -> None:
        self.called.append("clip")
        self.gradients = [parameter.grad.clone() for parameter in self.run.model.parameters()]
        self.norms.append(float(torch.nn.utils.get_total_norm(self.gradients)))

    def _stepped(self, optimizer, *_: object) -> None:
        self.called.append("step")
        self.rates.append(optimizer.param_groups[0]["lr"])

    @property
    def steps(self) -> int:
        return self.called.count("step")

    def _losses(self, run, batch):
        if run.pruner is not None:
            masks = run.pruner.masks()
            self.masks.append((run.progress.step, digest(masks), zeros(masks)))
            self.clocks.append((run.progress.step, run.scheduler.last_epoch, run.pruner.step))
        self.modes.append((run.model.training, run.teacher is not None and run.teacher.training))
        return self.losses(run, batch)

    def built(self, app: str, words: list[str], look) -> None:
        """Calls ``look(run)`` in place of training: Accelerate forgets its state when the run is over."""
        self.patch.setattr(build, "train", lambda run, *_: look(run) or 0)
        assert apps.main(app, words) == 0


@pytest.fixture
def live(monkeypatch) -> Live:
    return Live(monkeypatch)


def zeros(masks: dict[str, Tensor]) -> int:
    return sum(int((~mask).sum()) for mask in masks.values())


def digest(masks: dict[str, Tensor]) -> str:
    return hashlib.sha256(b"".join(mask.numpy().tobytes() for mask in masks.values())).hexdigest()


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


def summary(folder: Path) -> dict[str, float]:
    return json.loads((folder / "all_results.json").read_text())


def in_layers(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value for name, value in model.named_parameters() if ".layer." in name and value.dim() == 2}


# ---- what a run reaches and writes ----------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("pattern", ["1x1", "4x1"])
def test_asked_is_reached_and_the_folder_holds_the_live_model(place, app, pattern, tmp_path, live):
    out = tmp_path / "out"
    assert apps.main(app, pruned(place, app, out, f"--pruning_pattern={pattern}", "--target_sparsity=0.7")) == 0
    model, reached = KINDS[app].from_pretrained(out), json.loads((out / "pruning_report.json").read_text())
    counted = {name: int((value == 0).sum()) for name, value in in_layers(model).items()}
    written = {row["name"]: row["zeros"] for group in reached["groups"] for row in group["layers"]}
    assert counted == written
    asked = sum(counted.values())
    assert asked == zeros(live.run.pruner.masks())
    assert 0 <= round(0.7 * WEIGHTS) - asked < (1 if pattern == "1x1" else 4)
    assert summary(out)["sparsity_asked"] == 0.7
    assert summary(out)["sparsity"] == pytest.approx(asked / WEIGHTS)
    assert float(rows(out)[-1]["sparsity/reached"]) == pytest.approx(asked / WEIGHTS, abs=1e-6)

    tokenizer = AutoTokenizer.from_pretrained(out)
    inputs = tokenizer(["the plot is great .", "Where does Anna live ?"], padding=True, return_tensors="pt")
    with torch.no_grad():
        ours, theirs = live.run.model.eval()(**inputs), model(**inputs)
    for name in theirs:
        assert torch.equal(ours[name], theirs[name]), name
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(place / app / "bert").get_vocab()


@BOTH
def test_everything_is_written(place, app, tmp_path, monkeypatch):
    monkeypatch.undo()  # with pictures
    uploaded = hub(monkeypatch)
    typed = ["train_prune.py", "--do_prune", "--hub_token", "hf_secret", "--output_dir", "my runs/out"]
    monkeypatch.setattr(sys, "argv", typed)
    out = tmp_path / "out"
    more = ("--push_to_hub", "--hub_token=hf_secret", "--checkpointing_steps=5")
    assert apps.main(app, pruned(place, app, out, *more)) == 0
    assert uploaded == {path.name for path in out.iterdir() if path.is_file()}
    for name in ("pruning_report.png", "training_curves.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 100
    assert "bert.encoder.layer.1.output.dense.weight" in (out / "pruning_report.md").read_text()

    _, head, card = (out / "README.md").read_text().split("---\n", 2)
    front = yaml.safe_load(head)
    metrics = front["model-index"][0]["results"][0]["metrics"]
    assert front["library_name"] == "transformers" and {"pruning_core", "sparse"} == set(front["tags"])
    assert front["pipeline_tag"] == {"text_classification": "text-classification", "qa": "question-answering"}[app]
    found = {name: value for name, value in summary(out).items() if name.startswith("eval_")}
    assert {f"eval_{row['type']}": row["value"] for row in metrics} == pytest.approx(found, abs=1e-4)
    assert len(re.findall(r"^\| `.*\.dense\.weight` \| 4x1 \| \d+\.\d\d% \|$", card, re.M)) == 2 * 3
    assert "asked 80.00%, reached 79.98% of 4,096 weights" in card
    assert "python train_prune.py --do_prune --output_dir 'my runs/out'\n" in card
    assert "base_model" not in front  # a folder of this machine says nothing to others

    settings = yaml.safe_load((out / "args.yaml").read_text())
    assert settings["num_train_epochs"] == 2 and settings["learning_rate"] == 1e-3 and "hub_token" not in settings
    for path in (path for path in out.rglob("*") if path.is_file()):
        assert b"hf_secret" not in path.read_bytes(), path
    assert (out / "step_10/state.pt").is_file()

    table = rows(out)
    assert [(row["epoch"], row["step"]) for row in table] == [("1", "6"), ("2", "12")]
    assert {"train/loss", "sparsity/asked", "sparsity/reached", "learning_rate", "time"} < table[0].keys()
    assert summary(out)["steps"] == 12 and summary(out)["epochs"] == 2
    assert {name.removeprefix("eval_") for name in found} < table[0].keys()


def hub(monkeypatch) -> set[str]:
    """Stands in for it: what was uploaded."""
    uploaded: set[str] = set()

    class Api:
        def __init__(self, token: str) -> None:
            assert token == "hf_secret"

        def whoami(self) -> dict[str, str]:
            return {"name": "somebody"}

        def create_repo(self, name: str, exist_ok: bool) -> SimpleNamespace:
            return SimpleNamespace(repo_id=f"somebody/{name}")

        def upload_folder(self, repo_id: str, folder_path: Path, ignore_patterns: list[str]) -> None:
            assert repo_id == "somebody/out"
            names = [str(path.relative_to(folder_path)) for path in folder_path.rglob("*") if path.is_file()]
            uploaded.update(huggingface_hub.utils.filter_repo_objects(names, ignore_patterns=ignore_patterns))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(build.hub, "answers", lambda: True)
    return uploaded


def test_a_token_with_an_equals_sign_is_left_out_as_well(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_prune.py", "--hub_token=hf_secret", "--do_prune"])
    assert build.card.command() == "train_prune.py --do_prune"


@BOTH
def test_a_dense_run_has_no_sparsity(place, app, tmp_path, live):
    out = tmp_path / "out"
    assert apps.main(app, words(place, app, out)) == 0
    names = {path.name for path in out.iterdir()}
    assert not {"pruning_report.json", "pruning_config.yaml"} & names
    assert {"model.safetensors", "config.json", "tokenizer.json", "all_results.json", "README.md"} < names
    assert not any("sparsity" in name or "dense" in name for name in {**summary(out), **rows(out)[0]})
    assert all((value != 0).all() for value in in_layers(live.run.bare).values())


def test_metrics_are_those_of_the_saved_model_and_of_the_dense_one_before(place, tmp_path):
    app, out = "text_classification", tmp_path / "out"
    more = {"learning_rate": 0.01, "num_train_epochs": 6, "target_sparsity": 0.3}
    assert apps.main(app, pruned(place, app, out, **more)) == 0
    assert summary(out)["dense_accuracy"] == pytest.approx(accuracy(place / app / "bert", place), abs=1e-6)
    assert summary(out)["eval_accuracy"] == pytest.approx(accuracy(out, place), abs=1e-6)
    assert summary(out)["eval_accuracy"] > 0.7 > summary(out)["dense_accuracy"]


def accuracy(folder: Path, place: Path) -> float:
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    held_out = some_rows("text_classification", HELD_OUT, seed=1)
    inputs = tokenizer([row["sentence"] for row in held_out], padding=True, return_tensors="pt")
    with torch.no_grad():
        guess = model(**inputs).logits.argmax(-1).tolist()
    return sum(one == row["label"] for one, row in zip(guess, held_out, strict=True)) / HELD_OUT


def test_losses_are_means_over_the_batches(place, tmp_path, monkeypatch):
    original, seen = loop.losses, []

    def losses(run, batch):
        loss, parts = original(run, batch)
        seen.append(float(loss.detach()))
        return loss, parts

    monkeypatch.setattr(loop, "losses", losses)
    out = tmp_path / "out"
    assert apps.main("qa", words(place, "qa", out, gradient_accumulation_steps=4, max_train_steps=3)) == 0
    parts = seen[:6], seen[6:]  # two steps, and one of the second epoch
    assert len(parts[1]) == 4
    assert [float(row["train/loss"]) for row in rows(out)] == [
        pytest.approx(sum(part) / len(part), rel=1e-4) for part in parts
    ]


@pytest.mark.slow
@BOTH
def test_without_data_and_model_it_trains_the_embedded_ones(app, tmp_path, live):
    few = {"max_train_samples": 64, "max_eval_samples": 8, "learning_rate": None}
    assert apps.main(app, apps.arguments(None, None, tmp_path / "out", "--do_prune", **few)) == 0
    assert live.run.data.embedded and live.run.options.learning_rate == build.FROM_RANDOM["learning_rate"]
    assert live.steps == live.run.timeline.steps and "dense_f1" not in summary(tmp_path / "out")
    assert summary(tmp_path / "out")["sparsity"] == pytest.approx(0.8, abs=1e-3)


# ---- the optimizer --------------------------------------------------------------------------------------------------


@BOTH
def test_all_weights_learn_and_biases_and_norms_do_not_decay(place, app, tmp_path, live):
    def look(run):
        names = {parameter: name for name, parameter in run.bare.named_parameters()}
        groups = [[names.pop(parameter) for parameter in group["params"]] for group in run.optimizer.param_groups]
        assert not names  # each is there, once
        decay = {
            name: group["weight_decay"]
            for group, each in zip(run.optimizer.param_groups, groups, strict=True)
            for name in each
        }
        assert {name for name in decay if decay[name] == 0} == {
            name for name in decay if name.endswith("bias") or "LayerNorm" in name
        }
        assert {value for value in decay.values() if value} == {0.1}

    live.built(app, words(place, app, tmp_path / "out", "--weight_decay=0.1"), look)


@BOTH
def test_the_head_and_all_layers_change(place, app, tmp_path):
    assert apps.main(app, pruned(place, app, tmp_path / "out", "--target_sparsity=0.5")) == 0
    before = load_file(place / app / "bert/model.safetensors")
    after = load_file(tmp_path / "out/model.safetensors")
    assert before.keys() == after.keys()
    same = [name for name in before if torch.equal(before[name], after[name])]
    assert not same, same
    assert (after[HEADS[app]] != before[HEADS[app]]).all() and (after[HEADS[app]] != 0).all()


def test_the_learning_rate_is_a_function_of_the_steps_made(place, tmp_path, live):
    more = {"gradient_accumulation_steps": 2, "max_train_steps": 5, "num_warmup_steps": 2}
    assert apps.main("qa", words(place, "qa", tmp_path / "out", **more)) == 0
    assert live.rates == pytest.approx([0, 0.5e-3, 1e-3, 2e-3 / 3, 1e-3 / 3])
    assert float(rows(tmp_path / "out")[-1]["learning_rate"]) == 0


def test_gradients_are_clipped(place, tmp_path, live):
    assert apps.main("qa", words(place, "qa", tmp_path / "out", "--max_grad_norm=0.01")) == 0
    assert live.norms == pytest.approx([0.01] * 12, rel=1e-3)


# ---- accumulation and the clock -------------------------------------------------------------------------------------


@BOTH
def test_a_step_is_made_of_several_batches_and_hooks_are_called_once(place, app, tmp_path, live):
    """6 batches in windows of 4: the second window of an epoch is not full."""
    assert apps.main(app, pruned(place, app, tmp_path / "out", gradient_accumulation_steps=4, num_train_epochs=3)) == 0
    assert live.called == ["clip", "before", "step", "after"] * 6
    assert [step for step, *_ in live.masks] == [0] * 4 + [1] * 2 + [2] * 4 + [3] * 2 + [4] * 4 + [5] * 2
    of_step: dict[int, set[str]] = {}
    for step, digested, _ in live.masks:
        of_step.setdefault(step, set()).add(digested)
    assert all(len(each) == 1 for each in of_step.values())  # masks change between steps, never inside of one
    assert len(set.union(*of_step.values())) == 3 + 1
    assert (live.run.progress.step, live.run.scheduler.last_epoch, live.run.pruner.step) == (6, 6, 6)


@BOTH
def test_accumulated_gradients_are_those_of_one_large_batch(place, app, tmp_path, live):
    still = {"model_name_or_path": place / app / "still", "max_train_steps": 1, "max_grad_norm": 1e9}
    found = []
    for size, count in ((4, 2), (8, 1)):
        more = {"per_device_train_batch_size": size, "gradient_accumulation_steps": count, **still}
        assert apps.main(app, words(place, app, tmp_path / f"{count}", **more)) == 0
        found.append(live.gradients)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_max_train_steps_may_end_within_an_epoch(place, tmp_path, live):
    out = tmp_path / "out"
    assert apps.main("qa", pruned(place, "qa", out, gradient_accumulation_steps=2, max_train_steps=5)) == 0
    assert [(row["epoch"], row["step"]) for row in rows(out)] == [("1", "3"), ("2", "5")]
    assert live.steps == summary(out)["steps"] == 5
    assert summary(out)["sparsity"] == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize(
    ("more", "start", "end"),
    [
        ({}, 0, 8),  # half of the epochs is cooldown
        ({"warm_epochs": 0.5}, 2, 8),
        ({"warm_epochs": 0.5, "cooldown_epochs": 0.5}, 2, 14),
        ({"warm_epochs": 1, "cooldown_epochs": 0}, 4, 16),
        ({"cooldown_epochs": 3.5, "pruning_frequency": 5}, 0, 2),
    ],
)
def test_masks_change_between_warm_epochs_and_cooldown_only(place, tmp_path, live, more, start, end):
    """4 epochs of 4 steps of 2 batches."""
    four = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "num_train_epochs": 4}
    assert apps.main("qa", pruned(place, "qa", tmp_path / "out", **four, **more)) == 0
    masks = {step: (digested, count) for step, digested, count in live.masks}
    masks[16] = digest(live.run.pruner.masks()), zeros(live.run.pruner.masks())
    counts = [masks[step][1] for step in range(17)]
    asked = int(0.8 * WEIGHTS / 4) * 4
    assert not any(counts[:start]) and counts == sorted(counts)
    assert counts[end - 1] < asked and counts[end:] == [asked] * (17 - end)
    assert len({masks[step][0] for step in range(end, 17)}) == 1
    if "pruning_frequency" not in more:
        assert len(set(counts[start : end + 1])) == end - start + (counts[start] == 0)


def test_weights_go_on_learning_in_the_cooldown_and_zeros_stay(place, tmp_path):
    app, out = "text_classification", tmp_path / "out"
    more = {"num_train_epochs": 3, "cooldown_epochs": 2, "checkpointing_steps": "epoch"}
    assert apps.main(app, pruned(place, app, out, **more)) == 0
    models = [torch.load(out / f"epoch_{i}/state.pt", weights_only=True)["model"] for i in (1, 2, 3)]
    for name in (name for name in models[0] if ".layer." in name and models[0][name].dim() == 2):
        first, second, third = (model[name] for model in models)
        assert torch.equal(first == 0, second == 0) and torch.equal(first == 0, third == 0), name
        assert (first != second)[first != 0].all() and (second != third)[first != 0].all(), name


# ---- where options come from ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "option", "value"),
    [
        ("target_sparsity", "target_sparsity", 0.6),
        ("pruning_pattern", "pattern", "1x1"),
        ("pruning_type", "pruning_type", "snip_momentum"),
        ("pruning_scope", "pruning_scope", "global"),
        ("pruning_frequency", "pruning_frequency", 2),
    ],
)
def test_flags_win_over_the_recipe_and_leave_the_rest(place, tmp_path, live, flag, option, value):
    recipe = {"target_sparsity": 0.5, "pattern": "2x1", "pruning_type": "magnitude", "pruning_scope": "local"}
    recipe |= {"pruning_frequency": 3, "excluded_op_names": ["classifier|qa_outputs|pooler|layer.0"]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    def look(run):
        (pruner,) = run.pruner.config.pruners
        for name, wanted in {**recipe, option: value}.items():
            assert getattr(pruner, name) == wanted, name
        assert [(pruner.start_step, pruner.end_step)] == [(0, 6)]
        (group,) = run.pruner._groups
        assert group.total == WEIGHTS // 2

    more = {
        "pruning_config": tmp_path / "recipe.yaml",
        flag: value,
        "pruning_frequency": value if "freq" in flag else None,
    }
    live.built("qa", pruned(place, "qa", tmp_path / "out", **more), look)


def test_flags_win_for_every_pruner_of_the_recipe(place, tmp_path):
    both = [{"op_names": [f"layer.{i}"], "pattern": pattern} for i, pattern in enumerate(("1x1", "4x1"))]
    recipe = {"pruning_configs": both, "target_sparsity": 0.3, "pruning_type": "magnitude"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    more = {"pruning_config": tmp_path / "recipe.yaml", "target_sparsity": 0.5}
    assert apps.main("qa", pruned(place, "qa", tmp_path / "out", **more)) == 0
    report = json.loads((tmp_path / "out/pruning_report.json").read_text())
    shares = [sum(row["zeros"] for row in group["layers"]) / (WEIGHTS / 2) for group in report["groups"]]
    assert shares == [0.5, 0.5]
    assert [{row["pattern"] for row in group["layers"]} for group in report["groups"]] == [{"1x1"}, {"4x1"}]


@pytest.mark.parametrize("app", ["qa", pytest.param("text_classification", marks=pytest.mark.slow)])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_trains(place, app, recipe, tmp_path, live):
    target = yaml.safe_load(recipe.read_text()).get("target_sparsity", 0.0)
    more = {"pruning_config": recipe, "max_train_steps": 2, "cooldown_epochs": 0, "num_train_epochs": None}
    assert apps.main(app, pruned(place, app, tmp_path / "out", "--dist_loss=kl", **more)) == 0
    assert live.steps == 2
    assert summary(tmp_path / "out")["sparsity"] == pytest.approx(target, abs=2e-3)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_opens_with_a_command_that_is_understood(recipe):
    comments = [line.removeprefix("#").strip() for line in recipe.read_text().splitlines() if line.startswith("#")]
    found = re.search(r"python apps/(\w+)/train_prune\.py ((?:--\w+(?: [^-\s]\S*)?\s*(?:\\ )?)+)", " ".join(comments))
    options = apps.parsed(found[1], found[2].replace("\\ ", "").split())
    assert options.do_prune
    assert apps.ROOT / (options.pruning_config or "apps/common/recipes/4x1.yaml") == recipe


@BOTH
def test_bf16_reaches_the_target_with_weights_in_fp32(place, app, tmp_path, live, capsys):
    more = ("--mixed_precision=bf16", "--dist_loss=l2", "--feature_weight=0.1")
    assert apps.main(app, pruned(place, app, tmp_path / "out", *more)) == 0
    assert "1 process on cpu in bf16" in capsys.readouterr().out
    saved = load_file(tmp_path / "out/model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}
    assert summary(tmp_path / "out")["sparsity"] == pytest.approx(0.8, abs=1e-3)


def test_a_loss_that_is_not_finite_ends_the_run_with_one_line(place, tmp_path, monkeypatch, capsys):
    original, seen = loop.losses, []

    def losses(run, batch):
        loss, parts = original(run, batch)
        seen.append(loss)
        worse = float("nan") if len(seen) == 8 else 1.0
        return loss * worse, {name: value * worse for name, value in parts.items()}

    monkeypatch.setattr(loop, "losses", losses)
    assert apps.main("qa", words(place, "qa", tmp_path / "out", checkpointing_steps=4)) == 2
    message = capsys.readouterr().err
    assert re.fullmatch(r"loss: is not finite in epoch 2, got loss; .*lower --learning_rate\n", message), message
    assert len(seen) == 8  # it is noticed before anything is saved
    assert sorted(path.name for path in (tmp_path / "out").glob("step_*")) == ["step_4"]
    assert not (tmp_path / "out/model.safetensors").exists()


# ---- the teacher ----------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    ("kind", "share", "temperature", "feature"),
    [("kl", 0.3, 3.0, 0.0), ("kl", 1.0, 2.0, None), ("l2", 0.5, 2.0, 0.0), ("l2", 1.0, 2.0, 0.25)],
)
def test_the_loss_is_its_formula(place, app, tmp_path, live, kind, share, temperature, feature):
    def look(run):
        run.model.eval()
        batch = next(iter(run.train_batches))
        loss, parts = live.losses(run, batch)
        with torch.no_grad():
            ours, theirs = (
                model(**batch, output_hidden_states=True)
                for model in (run.bare, KINDS[app].from_pretrained(place / app / "teacher"))
            )
        tokens = batch["attention_mask"].sum(1).tolist()
        assert len(set(tokens)) > 1  # some rows are padded
        heads = ["logits"] if app == "text_classification" else ["start_logits", "end_logits"]
        terms = []
        for head in heads:
            for row, length in enumerate(tokens):
                end = None if head == "logits" else length
                terms.append(divergence(ours[head][row][:end], theirs[head][row][:end], kind, temperature))
        wanted = {"task": ours.loss, "dist_logits": torch.stack(terms).mean()}
        if feature != 0:
            errors = []
            for s, t in zip(ours.hidden_states, theirs.hidden_states, strict=True):
                s, t = (torch.cat([row[:length] for row, length in zip(x, tokens, strict=True)]) for x in (s, t))
                errors.append((s - t).square().sum() / t.square().sum())
            wanted["dist_feature"] = (2 if feature is None else feature) * sum(errors) / len(errors)
        learned = sum(value for name, value in wanted.items() if name.startswith("dist_"))
        wanted["loss"] = (1 - share) * wanted["task"] + share * learned
        assert parts.keys() == wanted.keys()
        torch.testing.assert_close({name: value.detach() for name, value in parts.items()}, wanted)
        torch.testing.assert_close(loss.detach(), wanted["loss"])
        assert loss.requires_grad and wanted["dist_logits"] > 1e-6

    more = {"dist_loss": kind, "distill_loss_weight": share, "feature_weight": feature}
    more |= {"temperature": temperature if kind == "kl" else None}
    more["teacher_model_name_or_path"] = place / app / "teacher"
    live.built(app, words(place, app, tmp_path / "out", **more), look)


def divergence(s: Tensor, t: Tensor, kind: str, temperature: float) -> Tensor:
    if kind == "l2":
        return (s - t).square().mean()
    p, q = (t / temperature).softmax(0), (s / temperature).softmax(0)
    return temperature**2 * (p * (p / q).log()).sum()


def test_a_teacher_of_another_size_teaches_its_logits_alone(place, tmp_path, live):
    apps.save_model(tmp_path / "wide", "qa", hidden_size=32)

    def look(run):
        _, parts = live.losses(run, next(iter(run.train_batches)))
        assert parts.keys() == {"loss", "task", "dist_logits"}

    more = {"dist_loss": "kl", "teacher_model_name_or_path": tmp_path / "wide"}
    live.built("qa", words(place, "qa", tmp_path / "out", **more), look)


@BOTH
def test_the_teacher_stays_as_it_is(place, app, tmp_path, live):
    more = {"teacher_model_name_or_path": place / app / "teacher", "feature_weight": 0.1}
    assert apps.main(app, pruned(place, app, tmp_path / "out", "--dist_loss=kl", **more)) == 0
    teacher, learning = live.run.teacher, {id(p) for g in live.run.optimizer.param_groups for p in g["params"]}
    assert live.modes == [(True, False)] * 12  # the student trains, the teacher never does
    assert not any(parameter.requires_grad or id(parameter) in learning for parameter in teacher.parameters())
    saved = load_file(place / app / "teacher/model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in teacher.named_parameters())
    assert {"train/task", "train/dist_logits", "train/dist_feature"} < rows(tmp_path / "out")[0].keys()


@BOTH
def test_the_model_teaches_itself_unless_told_otherwise(place, app, tmp_path, live):
    def look(run):
        run.model.eval()
        _, parts = live.losses(run, next(iter(run.train_batches)))
        assert float(parts["dist_logits"].detach()) == 0
        assert run.teacher is not run.bare

    live.built(app, words(place, app, tmp_path / "out", "--dist_loss=kl"), look)


# ---- pruned once, learning another task -----------------------------------------------------------------------------


def zeros_of(folder: Path) -> dict[str, Tensor]:
    saved = load_file(folder / "model.safetensors")
    return {name: value == 0 for name, value in saved.items() if ".layer." in name and value.dim() == 2}


@pytest.mark.parametrize(("pattern", "way"), [("1x1", "flag"), ("4x1", "recipe")])
def test_zeros_of_one_task_stay_on_another(place, tmp_path, capsys, pattern, way):
    app, three = "text_classification", [{**row, "label": i % 3} for i, row in enumerate(apps.reviews(17, seed=2))]
    for name in ("three", "held_out"):
        apps.write(tmp_path / f"{name}.jsonl", three)
    assert apps.main(app, pruned(place, app, tmp_path / "one", f"--pruning_pattern={pattern}")) == 0
    files = {"train_file": tmp_path / "three.jsonl", "validation_file": tmp_path / "held_out.jsonl"}
    again = {**files, "model_name_or_path": tmp_path / "one", "pruning_frequency": None, "learning_rate": 0.01}
    lock = ["--pruning_type=pattern_lock"]
    if way == "recipe":
        lock = [f"--pruning_config={apps.ROOT / 'apps/common/recipes/pattern-lock.yaml'}"]
    assert apps.main(app, pruned(place, app, tmp_path / "two", *lock, **again)) == 2
    assert "--ignore_mismatched_sizes" in capsys.readouterr().err
    assert apps.main(app, pruned(place, app, tmp_path / "two", *lock, "--ignore_mismatched_sizes", **again)) == 0
    before, after = zeros_of(tmp_path / "one"), zeros_of(tmp_path / "two")
    assert round(0.8 * WEIGHTS) - sum(int(each.sum()) for each in before.values()) in (0, 1)
    assert all(torch.equal(before[name], after[name]) for name in before)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all((one[name] != two[name])[~before[name]].any() for name in before)
    assert two["classifier.weight"].shape == (3, 16)
    assert summary(tmp_path / "two")["sparsity"] == pytest.approx(summary(tmp_path / "one")["sparsity"])
    assert "dense_accuracy" not in summary(tmp_path / "two")  # its head was new


def test_a_sparse_classifier_learns_to_answer_questions(place, tmp_path):
    assert apps.main("text_classification", pruned(place, "text_classification", tmp_path / "one")) == 0
    again = {"model_name_or_path": tmp_path / "one", "pruning_type": "pattern_lock", "pruning_frequency": None}
    assert apps.main("qa", pruned(place, "qa", tmp_path / "two", **again)) == 0
    before, after = zeros_of(tmp_path / "one"), zeros_of(tmp_path / "two")
    assert len(before) == 12 and all(torch.equal(before[name], after[name]) for name in before)


# ---- steps that a scaler skips --------------------------------------------------------------------------------------


@pytest.fixture
def half(monkeypatch):
    """fp16 on the CPU, which is refused: from the scaler on, the loop takes the way that it takes on CUDA."""

    def begin(options):
        accelerator, ranks = begin_as_ever(options)
        accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1000)
        return accelerator, ranks

    begin_as_ever = processes.begin
    monkeypatch.setattr(processes, "begin", begin)


def with_infinite_gradients(monkeypatch, *calls: int) -> None:
    """In these calls of ``losses``, counted from 0. The loss itself stays finite, as it does when fp16 overflows."""
    original, seen = loop.losses, []

    def losses(run, batch):
        loss, parts = original(run, batch)
        seen.append(None)
        return loss * (float("inf") if len(seen) - 1 in calls else 1.0), parts

    monkeypatch.setattr(loop, "losses", losses)


@pytest.mark.parametrize("kind", ["fused", "plain"])
@pytest.mark.parametrize("bad", [0, 2, 4])
def test_a_skipped_step_is_none(place, tmp_path, monkeypatch, half, live, kind, bad):
    """``accelerator.optimizer_step_was_skipped`` says no for fused optimizers: they are called, and do nothing."""
    AdamW, skipped, seen = torch.optim.AdamW, processes.skipped, []
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups, lr, fused: AdamW(groups, lr=lr, fused=kind == "fused"))

    def look(accelerator, scale):
        verdict, run = skipped(accelerator, scale), live.run
        weights = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in run.model.parameters())).hexdigest()
        seen.append((verdict, accelerator.optimizer_step_was_skipped, weights))
        return verdict

    monkeypatch.setattr(processes, "skipped", look)
    with_infinite_gradients(monkeypatch, bad)
    out = tmp_path / "out"
    more = {"max_train_steps": 6, "gradient_accumulation_steps": 1, "num_train_epochs": None}
    assert apps.main("qa", pruned(place, "qa", out, **more)) == 0
    verdicts, theirs, weights = zip(*seen, strict=True)
    assert verdicts == tuple(i == bad for i in range(7))
    assert theirs == tuple(i == bad and kind == "plain" for i in range(7))
    assert live.clocks == [(i - (i > bad),) * 3 for i in range(7)]
    assert len(set(weights)) == 6 + (bad == 0)
    assert bad == 0 or weights[bad] == weights[bad - 1]
    assert summary(out)["steps"] == 6 and summary(out)["sparsity"] == pytest.approx(0.8, abs=1e-3)
    assert live.run.accelerator.scaler.get_scale() == 32


def test_a_first_epoch_of_skipped_steps_is_survived(place, tmp_path, monkeypatch, half):
    with_infinite_gradients(monkeypatch, *range(6))
    assert apps.main("qa", words(place, "qa", tmp_path / "out")) == 0
    assert summary(tmp_path / "out")["steps"] == 12


def test_a_skipped_step_saves_nothing(place, tmp_path, monkeypatch, half):
    saved = []
    monkeypatch.setattr(loop.state, "save", lambda run, folder: saved.append(folder.name))
    with_infinite_gradients(monkeypatch, 0, 5)
    assert apps.main("qa", words(place, "qa", tmp_path / "out", checkpointing_steps=4)) == 0
    assert saved == ["step_4", "step_8"]


def test_fp16_trains_without_a_warning(place, tmp_path, half):
    assert apps.main("qa", words(place, "qa", tmp_path / "out")) == 0


def test_weights_that_are_not_finite_after_the_last_step_are_noticed(place, tmp_path, monkeypatch):
    """Without a scaler: the loss of the last batch is finite, its gradients are not."""
    with_infinite_gradients(monkeypatch, 11)
    assert apps.main("qa", words(place, "qa", tmp_path / "out")) == 2
