"""Code in the documents runs, links lead somewhere, commands work."""

import importlib
import os
import re
import subprocess
import sys

import pytest

from pruning_core.criteria import CRITERIA
from tests.support import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
PAGES += sorted((ROOT / "apps").glob("*/README.md"))
BLOCK = re.compile(r"<!-- run -->\n```python\n(.*?)```", re.DOTALL)
SAMPLES = [(page, code) for page in PAGES for code in BLOCK.findall(page.read_text())]


@pytest.mark.parametrize(("page", "code"), SAMPLES, ids=lambda value: getattr(value, "name", ""))
def test_samples_run(page, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        exec(code, {})
    finally:
        if "squared" in CRITERIA:
            CRITERIA.remove("squared")


def test_the_readme_shows_what_its_sample_prints(capsys):
    import torch

    page = (ROOT / "README.md").read_text()
    torch.manual_seed(0)
    exec(BLOCK.search(page)[1], {})
    printed = capsys.readouterr().out.splitlines()
    shown = re.search(r"```text\n(step 100.*?)```", page, re.DOTALL)[1].splitlines()
    assert printed[:3] == shown[:3]
    assert [line.split()[:3] for line in printed] == [line.split()[:3] for line in shown]


SHOWN = re.compile(r"<!-- run -->\n```python\n((?:(?!```).)*)```\n\n```text\n(.*?)```", re.DOTALL)
PRINTED = [
    (page, *shown) for page in sorted((ROOT / "docs/api").glob("*.md")) for shown in SHOWN.findall(page.read_text())
]


@pytest.mark.parametrize(("page", "code", "text"), PRINTED, ids=lambda value: getattr(value, "name", ""))
def test_the_reference_shows_what_its_samples_print(page, code, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        exec(code, {})
    finally:
        if "squared" in CRITERIA:
            CRITERIA.remove("squared")
    assert capsys.readouterr().out == text


def test_there_are_samples():
    assert len(PRINTED) >= 2
    assert len(SAMPLES) >= 4


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
    for named in re.findall(r"`((?:tests|docs|apps|data|benchmarks)/[\w/.-]+\.\w+)`", page.read_text()):
        assert (ROOT / named).exists(), named


def run(*command, cwd=ROOT):
    command = [sys.executable, *command]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}  # two threads beside two test workers wait for each other
    return subprocess.run(command, check=False, cwd=cwd, env=alone, capture_output=True, text=True, timeout=300)


def commands(page, script):
    """The command lines of a page that call a script, continuation lines joined, without the comments."""
    text = page.read_text().replace("\\\n", " ")
    started = r"(?:\w+=\S+ )*(?:python|torchrun[^\n]*?|accelerate launch[^\n]*?)"
    return re.findall(rf"^{started} ?{re.escape(script)} (.*)$", text, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_yolov5_commands_have_known_options_and_files(page):
    from apps.yolov5.arguments import parser

    for command in commands(page, "apps/yolov5/train_prune.py"):
        options = parser().parse_args(command.split())
        for path in (options.pruning_config, options.hyp):
            assert path is None or (ROOT / path).exists(), command


def test_the_yolov5_commands_are_found():
    assert len(commands(ROOT / "apps/yolov5/README.md", "apps/yolov5/train_prune.py")) >= 4


@pytest.mark.parametrize("app", ["text_classification", "qa"])
def test_commands_of_the_text_apps_have_known_options_and_files(app):
    parser = importlib.import_module(f"apps.{app}.arguments").parser
    found = [command for page in PAGES for command in commands(page, f"apps/{app}/train_prune.py")]
    assert len(found) >= 2
    for command in found:
        options = parser().parse_args(command.replace("...", "").split())
        assert options.pruning_config is None or (ROOT / options.pruning_config).exists(), command


@pytest.mark.slow
@pytest.mark.parametrize("demo", ["demo-text", "demo-qa"])
def test_the_text_demos_in_short(demo, tmp_path):
    """Their commands, on fewer rows and for an epoch."""
    shown = subprocess.run(["make", "-n", demo], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    lines = [line for line in shown.replace("\\\n", " ").splitlines() if ".py " in line]
    assert len(lines) == 2
    for line in lines:
        line = re.sub(r" --num_train_epochs \d+", "", line.replace("runs/demo", str(tmp_path)))
        short = ["--max_train_samples", "96", "--max_eval_samples", "32", "--num_train_epochs", "1"]
        done = run(*line.split()[1:], *short)
        assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"sparse .* 80\.00% +(80\.00|79\.9\d)%", done.stdout), done.stdout


@pytest.mark.slow
def test_the_demo_in_short(tmp_path):
    """The commands of `make demo`, with fewer images and epochs."""
    shown = subprocess.run(["make", "-n", "demo"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    lines = [line for line in shown.replace("\\\n", " ").splitlines() if ".py " in line]
    assert len(lines) == 3
    for line in lines:
        line = line.replace("runs/data/shapes", f"{tmp_path}/shapes", 1).replace("runs/demo", str(tmp_path))
        line = re.sub(r"--epochs \d+", "--epochs 3", line).replace("--cooldown_epochs 6", "--cooldown_epochs 1")
        words = line.split()[1:] + (["--train", "12", "--val", "6"] if "shapes_detection" in line else [])
        done = run(*words)
        assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"sparse \(best\.pt\) .* 80\.00% +(80\.00|79\.9\d)%", done.stdout)


@pytest.mark.slow
def test_the_quick_start_and_inspect(tmp_path):
    done = run("apps/quickstart/train_prune.py", "--epochs", "1", "--cooldown_epochs", "1", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "asked 80.00%, reached 79.99%" in done.stdout
    assert (tmp_path / "pruning_report.png").stat().st_size > 5000
    looked = run("-m", "pruning_core", "inspect", tmp_path / "sparse.pt")
    assert looked.returncode == 0, looked.stderr
    assert "asked 80.00%, reached 79.99%" in looked.stdout


def test_the_quick_start_refuses_what_cannot_be():
    done = run("apps/quickstart/train_prune.py", "--pattern", "2:4", "--target_sparsity", "0.8")
    assert done.returncode == 2
    assert done.stderr == ("target_sparsity: pattern 2:4 allows at most 0.5, got 0.8; lower it or change the pattern\n")
