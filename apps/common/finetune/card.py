"""The model card, and the way to the hub."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import yaml

from apps.common.errors import BadInput
from apps.common.finetune import hub, slim
from apps.common.finetune.arguments import SECRET
from apps.common.finetune.run import Run
from pruning_core import SparsityReport, structure


def model_card(run: Run, report: SparsityReport | None) -> str:
    metrics = {name: round(value, 4) for name, value in run.progress.metrics.items()}
    base = run.options.model_name_or_path
    entries = [{"type": name, "value": value} for name, value in metrics.items()]
    result = {"task": {"type": run.app.task}, "dataset": {"name": run.data.name, "type": run.data.name}}
    head: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": run.app.task,
        "tags": ["pruning_core", *(["sparse"] if report else []), *(["slim"] if structure(run.bare) else [])],
        "model-index": [{"name": run.options.output_dir.name, "results": [{**result, "metrics": entries}]}],
    }
    if base and not Path(base).exists():
        head["base_model"] = base
    lines = ["---", yaml.safe_dump(head, sort_keys=False).rstrip(), "---", "", f"# {run.options.output_dir.name}", ""]
    kind = "" if report is None else "A sparse "
    lines += [f"{kind}`{run.architecture}` for {run.data.name}.", ""]
    lines += _scores(run)
    if slim.needs_import(run.bare):
        lines += ["Whole channels were removed: `import pruning_core` before `from_pretrained`.", ""]
    if report is not None:
        lines += _zeros(run, report)
    lines += ["## Made with", "", "```bash", f"python {run.options.command}", "```"]
    return "\n".join(lines)


def _scores(run: Run) -> list[str]:
    lines = ["| | " + " | ".join(run.data.metrics) + " |", "| --- |" + " ---: |" * len(run.data.metrics)]
    kinds = [("dense, before", run.progress.dense)] if run.progress.dense else []
    for name, metrics in [*kinds, ("this model", run.progress.metrics)]:
        cells = [f"{metrics[each]:.4f}" if each in metrics else "" for each in run.data.metrics]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _zeros(run: Run, report: SparsityReport) -> list[str]:
    lines = ["## Sparsity", ""]
    for group in report.groups:
        lines.append(
            f"{group.title}: asked {group.asked:.2%}, reached {group.reached:.2%} of {group.weights:,} weights."
        )
    lines += ["", f"Of all {report.parameters:,} parameters {report.sparsity:.2%} are zero.", ""]
    lines += ["| layer | pattern | zeros |", "| --- | --- | ---: |"]
    lines += [
        f"| `{row.name}` | {row.pattern} | {row.reached:.2%} |" for group in report.groups for row in group.layers
    ]
    lines += ["", "The file holds the zeros: it is as large as the dense one, and dense kernels run it no faster.", ""]
    if run.options.dist_loss:
        lines += [f"Learned from a dense teacher as well ({run.options.dist_loss}).", ""]
    return lines


def command() -> str:
    """As it was typed, without the token."""
    words, skip = [], False
    for word in sys.argv:
        if not skip and not word.startswith(f"--{SECRET}="):
            words.append(word)
        skip = word == f"--{SECRET}"
        if skip:
            words.pop()
    return shlex.join(words)


def check_hub(options: Any) -> None:
    """Before training: a mistake must not cost the upload."""
    if not options.push_to_hub:
        return
    if not hub.answers():
        raise BadInput("--push_to_hub: the hub does not answer, got True; leave it out and upload the folder later")
    try:
        user = huggingface_hub.HfApi(token=options.hub_token).whoami()["name"]
    except Exception as error:
        raise BadInput(
            f"--push_to_hub: not logged in ({type(error).__name__}); run hf auth login or give --hub_token"
        ) from error
    if options.hub_model_id is None and options.output_dir is None:
        raise BadInput(f"--push_to_hub: under which name? give --hub_model_id {user}/...")


def push(run: Run, folder: Path) -> None:
    api = huggingface_hub.HfApi(token=run.options.hub_token)
    name = api.create_repo(run.options.hub_model_id or folder.name, exist_ok=True).repo_id
    api.upload_folder(repo_id=name, folder_path=folder, ignore_patterns=["step_*", "epoch_*", ".*"])
    print(f"uploaded to {huggingface_hub.constants.ENDPOINT}/{name}")
