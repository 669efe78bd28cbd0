"""Ties that PyTorch's own modules need beyond those of their operations."""

from __future__ import annotations

from torch import nn

from pruning_core.graph.trace.labels import Axis, Labels


def tie_modules(model: nn.Module, labels: Labels) -> None:
    """``nn.MultiheadAttention`` computes at the width of its input: query rows and input columns go in equal number."""
    for path, module in model.named_modules():
        if not isinstance(module, nn.MultiheadAttention):
            continue
        name = "q_proj_weight" if module.in_proj_weight is None else "in_proj_weight"
        rows, columns = (Axis(f"{path}.{name}" if path else name, dim) for dim in (0, 1))
        if rows in labels.axes:
            labels.balance(labels.axes[rows][: module.embed_dim], labels.axes[columns])
