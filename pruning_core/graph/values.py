"""What layers read, channel by channel, while a model runs on real batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pruning_core.graph.labels import NONE, Labels
from pruning_core.graph.masked import READERS
from pruning_core.graph.recorder import Call, Recorder, Where
from pruning_core.graph.rules import rule_of
from pruning_core.graph.shadows import Stored
from pruning_core.graph.tracing import untouched


class ValueReader(Recorder):
    """Adds up the absolute values that go into weighted layers, by label."""

    def __init__(self, labels: Labels, stored: Stored, rule: Callable[[Call], Any], where: Where) -> None:
        super().__init__(labels, stored, rule, where)
        self.sums = torch.zeros(len(labels), dtype=torch.float64)
        self.counts = torch.zeros(len(labels), dtype=torch.float64)

    def execute(self, call: Call, args: Any, kwargs: Any) -> Any:
        if call.name in READERS:
            for tensor in pytree.tree_leaves((args, kwargs)):
                shadow = call.shadows.get(id(tensor))
                if isinstance(shadow, Tensor) and tensor.is_floating_point():
                    self._add(tensor, shadow)
        return call.func(*args, **kwargs)

    def _add(self, tensor: Tensor, labels: Tensor) -> None:
        at = labels.reshape(-1).long()
        values = tensor.detach().abs().double().reshape(-1).cpu()
        self.sums.index_add_(0, at, values)
        self.counts.index_add_(0, at, torch.ones_like(values))


def mean_values(model: nn.Module, run: Callable[[nn.Module], Any], narrow_heads: bool) -> np.ndarray:
    """For each label the mean absolute value that is read of it; labels are numbered as ``ChannelGraph`` does."""
    labels = Labels(narrow_heads)
    stored = Stored(labels, model)
    where = Where(model)
    reader = ValueReader(labels, stored, rule_of, where)
    where.watch = reader.entered
    try:
        with untouched(model), torch.inference_mode(), reader:
            run(model)
    finally:
        where.remove()
    means = (reader.sums / reader.counts.clamp_min(1)).numpy()
    means[NONE] = 0
    return means
