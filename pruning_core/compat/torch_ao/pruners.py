"""The structured pruners that come with ``torch.ao.pruning``: rules that write row masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pruning_core.compat.torch_ao.sparsifier import BaseStructuredSparsifier


def _mask_and_weight(module: nn.Module, tensor_name: str) -> tuple[Tensor, Tensor]:
    weight = getattr(module, tensor_name)
    if weight.dim() < 2:
        raise ValueError(f"{tensor_name}: must have two axes or more, got {weight.dim()}; name a weight")
    return getattr(module.parametrizations, tensor_name)[0].mask, weight.detach().flatten(1)


class SaliencyPruner(BaseStructuredSparsifier):
    """Masks the ``int(rows * sparsity_level)`` rows with the smallest l1 norm ``sum_i |w_i|``."""

    def update_mask(self, module: nn.Module, tensor_name: str, **kwargs: Any) -> None:
        """Writes the mask of one tensor; ``sparsity_level`` comes from its config."""
        mask, rows = _mask_and_weight(module, tensor_name)
        mask[rows.norm(p=1, dim=1).topk(int(len(mask) * kwargs["sparsity_level"]), largest=False).indices] = False


class LSTMSaliencyPruner(BaseStructuredSparsifier):
    """``SaliencyPruner`` for each of the four gates that ``weight_ih_l*`` and ``weight_hh_l*`` stack.

    Gates may keep other hidden units than one another; ``prune`` then moves rows together and warns.
    """

    def update_mask(self, module: nn.Module, tensor_name: str, **kwargs: Any) -> None:
        """Writes the mask of one stacked weight, gate by gate."""
        mask, rows = _mask_and_weight(module, tensor_name)
        for gate, norms in zip(mask.chunk(4), rows.norm(p=1, dim=1).chunk(4), strict=True):
            gate[norms.topk(int(len(gate) * kwargs["sparsity_level"]), largest=False).indices] = False


class FPGMPruner(BaseStructuredSparsifier):
    """Masks the ``round(rows * sparsity_level)`` rows nearest to all others (He et al. 2019, arXiv:1811.00250).

    ``dist``: 1 or 2 for l1 or l2 (the default) distances, or a function (rows, weights) -> (rows, rows).
    """

    def __init__(self, sparsity_level: float = 0.5, dist: Callable[[Tensor], Tensor] | int | None = None) -> None:
        if not callable(dist) and dist not in (None, 1, 2):
            raise NotImplementedError(f"dist: must be 1, 2 or a function of the rows, got {dist!r}; give one of them")
        super().__init__(defaults={"sparsity_level": sparsity_level})
        self.dist_fn = dist if callable(dist) else lambda rows: torch.cdist(rows, rows, p=float(dist or 2))

    def _compute_distance(self, weight: Tensor) -> Tensor:
        """(rows,): the sum of the distances to all rows."""
        return self.dist_fn(weight.detach().flatten(1)).abs().sum(1)

    def update_mask(self, module: nn.Module, tensor_name: str, **kwargs: Any) -> None:
        """Writes the mask of one tensor; ``sparsity_level`` comes from its config."""
        mask, rows = _mask_and_weight(module, tensor_name)
        count = min(max(round(kwargs["sparsity_level"] * len(mask)), 0), len(mask))
        mask[self._compute_distance(rows).topk(count, largest=False).indices] = False
