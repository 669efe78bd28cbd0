"""Removing channels in one call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from pruning_core.channels.planner import plan_channels, read_budget
from pruning_core.channels.report import ChannelReport
from pruning_core.graph import ChannelGraph, Plan, Slimmed, slim_


@dataclass(frozen=True)
class Slim:
    """The result of ``slim``; prints as report and verification.

    ``model``: the same object, smaller. ``plan``: what it followed. ``report``: what is left of each layer.
    ``cut``: how far the model is from the masked one.
    """

    model: nn.Module
    plan: Plan
    report: ChannelReport
    cut: Slimmed

    def __str__(self) -> str:
        return f"{self.report}\n{self.cut}"


def slim(
    model: nn.Module,
    budget: Mapping[str, float],
    example_inputs: Any,
    *,
    train_inputs: Any = None,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    ema: nn.Module | Iterable[nn.Module] | None = None,
    outputs_may_shrink: bool = False,
    narrow_heads: bool = False,
    trial: bool = True,
    **options: Any,
) -> Slim:
    """Removes channels until the budget is met: traces, plans, cuts in place, verifies, and reports.

    ``budget``: the share that is left, ``{"macs": 0.5}``, ``params``, ``channels`` or ``latency``. ``example_inputs``,
    ``train_inputs``, ``outputs_may_shrink``, ``narrow_heads``, ``trial``: as in ``ChannelGraph.trace``. ``options``:
    those of ``plan_channels`` (``criterion``, ``limits``, ``round_to``, ``batches``, ``to_loss`` ...). ``optimizer``
    and ``ema`` are cut along, so training goes on. On any error everything is as it was.

    >>> done = pc.slim(model, {"macs": 0.5}, torch.randn(1, 3, 224, 224), optimizer=optimizer)
    >>> print(done)
    """
    read_budget(budget)  # before the model runs
    graph = ChannelGraph.trace(
        model,
        example_inputs,
        train_inputs,
        outputs_may_shrink=outputs_may_shrink,
        narrow_heads=narrow_heads,
        trial=trial,
    )
    plan = plan_channels(graph, budget, **options)
    report = ChannelReport.of(graph, plan)  # of the model as it is now
    return Slim(model, plan, report, slim_(model, plan, optimizer=optimizer, ema=ema))
