"""Units are the connected components of tied labels, such that removing any unit leaves every tensor rectangular."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from pruning_core.graph.trace.labels import NONE, Labels, varying
from pruning_core.graph.trace.recorder import Operation


class Components:
    """The unit of each label, and the reason of each frozen unit."""

    def __init__(self, of_label: np.ndarray, reasons: dict[int, str], removable: np.ndarray) -> None:
        self.of_label, self.reasons = of_label, reasons
        self.count = int(of_label.max()) + 1
        self._fixed = np.bincount(of_label) == 1  # an axis that no operation has touched
        self._fixed[of_label[removable]] = False
        self._fixed[list(reasons)] = True

    @classmethod
    def solve(cls, labels: Labels) -> Components:
        """Computes the connected components; a unit with a frozen label is frozen, with the first reason found."""
        pairs = torch.cat([torch.zeros(2, 0, dtype=torch.int32), *labels.ties], dim=1).numpy()
        ones = np.ones(pairs.shape[1], dtype=bool)
        matrix = coo_matrix((ones, (pairs[0], pairs[1])), shape=(len(labels), len(labels)))
        _, component = connected_components(matrix, directed=False)
        reasons: dict[int, str] = {int(component[NONE]): ""}
        for frozen, why in labels.frozen:
            for found in np.unique(component[frozen.numpy()]):
                reasons.setdefault(int(found), why)
        return cls(component, reasons, torch.cat([torch.zeros(0, dtype=torch.int32), *labels.removable]).numpy())

    def fixed(self, unit: int) -> bool:
        """Whether a unit cannot be removed, with or without a reason."""
        return bool(self._fixed[unit])

    def of(self, labels: Tensor) -> Tensor:
        """The unit of each label; -1 for those that cannot be removed."""
        units = self.of_label[labels.numpy()]
        return torch.from_numpy(np.where(self._fixed[units], -1, units))


def rectangles(labels: Labels, operations: Iterable[Operation]) -> Components:
    """Ties labels until removing any unit leaves every tensor rectangular: a view of heads loses whole lines."""
    several = [each for made in operations for each in _label_tensors(made.shadow) if len(varying(each)) > 1]
    while True:
        components = Components.solve(labels)
        tied: set[int] = set()
        for each in several:
            _tie_lines(labels, components, each, tied)
        if not tied:
            return components


def _label_tensors(shadow: Any) -> list[Tensor]:
    if isinstance(shadow, Tensor):
        return [shadow]
    return [each for item in shadow for each in _label_tensors(item)] if isinstance(shadow, (tuple, list)) else []


def _tie_lines(labels: Labels, components: Components, found: Tensor, tied: set[int]) -> None:
    """Ties along the outer dimension where units differ along two dimensions.

    Units tied in this round wait for the next: they may be rectangular by then.
    """
    core = found
    for dim in range(found.dim()):
        if core.stride(dim) == 0:
            core = core.narrow(dim, 0, 1)
    units = components.of(core)
    dims = [dim for dim in range(units.dim()) if bool((units != units.narrow(dim, 0, 1)).any())]
    here = set(units.unique().tolist()) - {-1}
    if len(dims) < 2 or here & tied:
        return
    with labels.at("a view with two axes of channels"):
        labels.tie(core, core.narrow(dims[0], 0, 1).expand(core.shape))
    tied |= here
