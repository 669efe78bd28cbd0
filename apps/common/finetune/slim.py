"""``--slim_config``: channels are removed before training begins, the same ones on every rank."""

from __future__ import annotations

import contextlib
import itertools
from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from apps.common.errors import BadInput
from apps.common.finetune.run import Cut, Data
from apps.common.ranks import Ranks
from apps.common.yaml_file import read_yaml
from pruning_core import ChannelGraph, ChannelOptions, ChannelReport, Plan, plan_channels, slim_, structure
from pruning_core.options import Positive

OPTION = "--slim_config"
EXAMPLE = "apps/common/recipes/slim.yaml"
PLAN, REPORT, PICTURE = "channel_plan.json", "channel_report.json", "channels.png"


class SlimConfig(ChannelOptions):
    """What the file says: the options of ``plan_channels``, a budget, and how many batches scores are computed from."""

    budget: dict[str, float] = Field({"macs": 0.5})
    batches: Positive = 16
    criterion: str = "taylor"
    round_to: Positive = 8
    uniform: bool = True

    @classmethod
    def load(cls, path: str) -> SlimConfig:
        content = read_yaml(
            path, option=OPTION, missing=f"see {EXAMPLE}", expected="a mapping", example=f"see {EXAMPLE}"
        )
        try:
            return cls.read(content)
        except ValueError as error:
            raise BadInput(f"{OPTION}: {error}; see {EXAMPLE}") from error


def cut(
    options: Namespace,
    saved: Mapping[str, Any] | None,
    ranks: Ranks,
    model: PreTrainedModel,
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
) -> Cut | None:
    """Rank 0 plans: a measured latency, or the last bit of a gradient, may differ from rank to rank. A run that goes on
    is cut as it was begun."""
    if not options.slim_config:
        return None
    planned: tuple[dict[str, Any] | None, ChannelReport | None] = (saved.get("slim") if saved else None, None)
    example = data.example(tokenizer.model_input_names)
    with ranks.together():
        if saved is None and ranks.first:
            planned = _planned(SlimConfig.load(options.slim_config), options, model, data, example)
    text = ranks.from_first(planned[0])
    with ranks.together(), _said():
        plan = Plan.from_dict(text)
        return Cut(plan, slim_(model.eval(), plan, example_inputs=example), planned[1])


def _planned(
    config: SlimConfig, options: Namespace, model: PreTrainedModel, data: Data, example: dict[str, Tensor]
) -> tuple[dict[str, Any], ChannelReport]:
    choice = config.model_dump(exclude={"budget", "batches", "seed"})
    seeded = torch.Generator().manual_seed(options.seed)
    batches = data.batches(options.per_device_train_batch_size, seeded)
    with _said():
        graph = ChannelGraph.trace(model, example)
        plan = plan_channels(
            graph,
            config.budget,
            **choice,
            batches=itertools.islice(batches, config.batches),
            to_loss=lambda model, batch: model(**batch).loss,
            seed=options.seed,
        )
        return plan.to_dict(), ChannelReport.of(graph, plan)


@contextlib.contextmanager
def _said() -> Iterator[None]:
    """The core's one line becomes the option's."""
    try:
        yield
    except ValueError as error:
        raise BadInput(f"{OPTION}: {error}") from error


def write(cut: Cut | None, folder: Path, *, goes_on: bool) -> None:
    """Plan and report, in place of those of a run that is written over."""
    for name in () if goes_on else (PLAN, REPORT, PICTURE):
        (folder / name).unlink(missing_ok=True)
    if cut is not None:
        cut.plan.save(folder / PLAN)
    if cut is not None and cut.report is not None:
        cut.report.save_json(folder / REPORT)
        cut.report.plot(folder / PICTURE)


def needs_import(model: PreTrainedModel) -> bool:
    """Whether ``from_pretrained`` loads it only where ``pruning_core`` is imported: its configuration does not say the
    widths."""
    found = structure(model)
    return found is not None and not found.get("configuration")


def summary(cut: Cut) -> str:
    """One line."""
    before, after = cut.done.params_before, cut.done.params_after
    text = f"channels removed: {before:,} -> {after:,} weights ({after / before:.1%})"
    if cut.report is not None:
        macs = cut.report.macs
        text += f", {macs[1] / max(macs[0], 1):.1%} of the multiply-adds are left"
    return text
