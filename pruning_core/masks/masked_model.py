"""``MaskedModel``: a model with its groups of masked weights, and what can be asked of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pruning_core.masks.groups import MaskGroup
from pruning_core.masks.options import PrunerOptions
from pruning_core.masks.report import SparsityReport, report_of
from pruning_core.masks.sharding import local, reshard
from pruning_core.selection import unwrap


class PrunerView(NamedTuple):
    """One pruner of the configuration: its options, the names of the weights that take part, and their size in all."""

    config: PrunerOptions
    names: tuple[str, ...]
    weights: int


class MaskedModel(ABC):
    """What was asked of a model, what is zero in it, and its masks."""

    def __init__(self) -> None:
        self.model: nn.Module | None = None
        self.metrics: dict[str, Any] = {}
        self._groups: list[MaskGroup] = []
        self._counted: tuple[list[int], float] = ([], 0.0)

    @property
    @abstractmethod
    def step(self) -> int:
        """The number of the next optimizer step."""

    @property
    def pruners(self) -> tuple[PrunerView, ...]:
        """One ``PrunerView`` per pruner of the configuration; empty before training begins."""
        return tuple(
            PrunerView(group.options, tuple(w.target.name for w in group.taking_part), group.total)
            for group in self._groups
        )

    @property
    def done(self) -> bool:
        """Whether every target is reached; from then on masks are only applied."""
        return bool(self._groups) and all(group.done for group in self._groups)

    @property
    def asked(self) -> float:
        """The sparsity asked for at this step, over all weights that take part; in [0, 1]."""
        return sum(group.sparsity(self.step) * group.total for group in self._groups) / (self._total or 1)

    @property
    def sparsity(self) -> float:
        """The sparsity of the masks, over all weights that take part; in [0, 1].

        Counted when masks have changed. Collective under ``fully_shard``: zeros are summed over the ranks.
        """
        now = [group.updated_at for group in self._groups]
        if self._counted[0] != now:
            self._counted = (now, sum(group.count_cut() for group in self._groups) / (self._total or 1))
        return self._counted[1]

    @property
    def _total(self) -> int:
        return sum(group.total for group in self._groups)

    @property
    def sharded(self) -> bool:
        """Whether the weights are sharded (``fully_shard``): each rank then has a state of its own."""
        return any(group.ranks is not None for group in self._groups)

    @torch.no_grad()
    def mask_(self, other: nn.Module) -> nn.Module:
        """Masks a copy of the model (EMA, SWA) in place, by parameter names, and returns it."""
        self._check_built("mask_")
        reshard(other)
        parameters = dict(unwrap(other).named_parameters(remove_duplicate=False))
        for group in self._groups:
            for weight in group.weights:
                parameter = parameters.get(weight.target.name)
                if parameter is None or tuple(local(parameter).shape) != weight.shape:
                    got = "nothing" if parameter is None else f"{tuple(local(parameter).shape)} for {weight.shape}"
                    raise ValueError(
                        f"mask_: {weight.target.name} is not in that model, got {got}; pass a copy, sharded alike"
                    )
                weight.keep.to(parameter.device).apply_(local(parameter.detach()))
        return other

    def masks(self) -> dict[str, Tensor]:
        """State-dict key -> bool mask, True = kept (the local shard under ``fully_shard``)."""
        self._check_built("masks")
        return {w.target.name: w.keep.whole() for group in self._groups for w in group.weights}

    def report(self) -> SparsityReport:
        """Asked and reached sparsity per layer, counted from the weights; collective under ``fully_shard``."""
        self._check_built("report")
        assert self.model is not None
        reshard(self.model)
        return report_of(unwrap(self.model), self._groups, self.step, self.metrics)

    def _check_built(self, what: str) -> None:
        if not self._groups:
            raise RuntimeError(f"{what}: there are no masks yet; call on_train_begin or attach first")
        self._check_model()

    def _check_model(self) -> None:
        """RuntimeError unless the layers with masks are still the model's layers."""
        assert self.model is not None
        modules = dict(unwrap(self.model).named_modules(remove_duplicate=False))
        for group in self._groups:
            for weight in group.weights:
                if modules.get(weight.target.layer) is not weight.target.module:
                    raise RuntimeError(
                        f"{weight.target.layer}: this layer was replaced or removed under the pruner; change the model "
                        "first, then call on_train_begin"
                    )
