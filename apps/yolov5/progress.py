"""How far a run is: what a resumed run needs besides weights. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Progress:
    epoch: int = 0
    batch: int = 0
    """Batches of this epoch that are done. All of them: the epoch waits for its evaluation."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    best_dense: dict[str, float] = field(default_factory=dict)
    dense_metrics: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
