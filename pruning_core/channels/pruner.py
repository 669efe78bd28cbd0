"""Removes channels while a model trains, a few at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from pruning_core.channels.options import GroupLimits, read_options
from pruning_core.channels.planner import Ranking, Removed, ordered
from pruning_core.channels.scores import Data, ToLoss, own_gradients, unit_scores
from pruning_core.criteria import CRITERIA
from pruning_core.graph import ChannelGraph, GraphError, Slimmed, slim_
from pruning_core.graph.inputs import Inputs
from pruning_core.graph.wrappers import unwrapped


class Pruner:
    """Removes the lowest-scored channels from model and optimizer when the loop calls ``rebuild_model``.

    ``criterion``, ``round_to``, ``limits``, ``op_names``, ``excluded_op_names``: as in ``plan_channels``.
    ``distributed``: the model trains on several ranks, each calling ``rebuild_model`` at the same step with a batch of
    its own. Scores are averaged, all ranks remove the same channels.
    """

    def __init__(
        self,
        model: nn.Module,
        distributed: bool = False,
        *,
        criterion: str = "taylor",
        round_to: int = 1,
        limits: float | Mapping[str, Any] = 0.95,
        op_names: Sequence[str] = (),
        excluded_op_names: Sequence[str] = (),
    ) -> None:
        self.model = model
        self.inner = unwrapped(model)
        self.distributed = distributed
        self.options = read_options(
            criterion=criterion,
            round_to=round_to,
            limits=limits,
            op_names=op_names,
            excluded_op_names=excluded_op_names,
        )
        if distributed and not torch.distributed.is_initialized():
            raise GraphError("distributed: there is no process group, got True; start one first, or give False")

    def rebuild_model(self, batch: Any, to_loss_fn: ToLoss, optimizer: Optimizer, prune_num: int) -> Slimmed:
        """Removes ``prune_num`` channels: those that change ``to_loss_fn(model, batch)`` least, to first order.

        Parameters keep their identity and the optimizer its states, so the loop goes on. Balanced pieces and
        ``round_to`` may make it a few channels fewer; the result says what is left.
        """
        if prune_num < 1:
            raise GraphError(f"prune_num: must be at least 1, got {prune_num}")
        example = self._example(batch, to_loss_fn)
        graph = ChannelGraph.trace(self.inner, example)
        criterion = CRITERIA[self.options.criterion](self.options.seed)
        scores = unit_scores(graph, criterion, Data([batch], lambda _, each: to_loss_fn(self.model, each)))
        scores = self._averaged(scores, sorted(graph.where))
        plan = graph.plan(self._chosen(graph, scores, prune_num))
        return slim_(self.model, plan, optimizer=optimizer)

    def _example(self, batch: Any, to_loss_fn: ToLoss) -> Inputs:
        """What the model is called with for this batch."""
        calls: list[Inputs] = []
        hook = self.inner.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
        )
        try:
            with torch.no_grad(), own_gradients(self.inner):
                to_loss_fn(self.inner, batch)
        finally:
            hook.remove()
        if not calls:
            raise GraphError("to_loss_fn: must call the model that it is given, got a function that does not")
        return pytree.tree_map_only(Tensor, Tensor.detach, calls[0])

    def _averaged(self, scores: dict[int, float], units: list[int]) -> dict[int, float]:
        """One and the same on all ranks: the mean over those that have a score, as rank 0 has it."""
        if not self.distributed:
            return scores
        device = next(self.inner.parameters()).device
        rows = [[scores.get(unit, 0.0) for unit in units], [float(unit in scores) for unit in units]]
        sums = torch.tensor(rows, dtype=torch.float64, device=device)
        distributed.all_reduce(sums)
        distributed.broadcast(sums, src=0)
        return {unit: total / count for unit, total, count in zip(units, *sums.tolist(), strict=True) if count}

    def _chosen(self, graph: ChannelGraph, scores: Mapping[int, float], prune_num: int) -> Removed:
        """The longest beginning of the ranking with at most so many channels in it."""
        ranking = Ranking(GroupLimits(graph, self.options), scores, ordered(graph, scores, "global"))
        most = ranking.removed(len(ranking))
        if _count(most) < prune_num:
            raise GraphError(
                f"prune_num: only {_count(most)} channels of this model can go within these limits, got {prune_num}"
            )
        low, high = prune_num, len(ranking)
        while low < high:
            middle = (low + high + 1) // 2
            fits = _count(ranking.removed(middle)) <= prune_num
            low, high = (middle, high) if fits else (low, middle - 1)
        chosen = ranking.removed(low)
        if not _count(chosen):
            raise GraphError(
                f"prune_num: so few channels leave no piece of a chunk or no rounded size, got {prune_num}; give more"
            )
        return chosen


def _count(removed: Removed) -> int:
    return sum(map(len, removed.values()))
