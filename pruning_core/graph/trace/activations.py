"""Mean absolute activations per channel, recorded while a model runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pruning_core.graph.inputs import untouched
from pruning_core.graph.trace.labels import NONE, Labels
from pruning_core.graph.trace.operations import CONSUMERS
from pruning_core.graph.trace.recorder import Call, ModulePath, Recorder
from pruning_core.graph.trace.rules import rule_of
from pruning_core.graph.trace.shadows import StoredTensors


class ActivationRecorder(Recorder):
    """Sums absolute inputs of weighted layers, by label."""

    def __init__(self, labels: Labels, stored: StoredTensors) -> None:
        super().__init__(labels, stored)
        self.sums = torch.zeros(len(labels), dtype=torch.float64)
        self.counts = torch.zeros(len(labels), dtype=torch.float64)

    def execute(self, call: Call, args: Any, kwargs: Any) -> Any:
        if call.name in CONSUMERS:
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


def mean_activations(model: nn.Module, run: Callable[[nn.Module], Any], narrow_heads: bool) -> np.ndarray:
    """``mean |x|`` of what layers read of each label while ``run(model)`` works: float64 (labels,)."""
    labels = Labels(narrow_heads)
    reader = ActivationRecorder(labels, StoredTensors(labels, model))
    path = ModulePath(model, reader.entered)
    reader.begin(rule_of, path)
    try:
        with untouched(model), torch.inference_mode(), reader:
            run(model)
    finally:
        path.remove()
    means = (reader.sums / reader.counts.clamp_min(1)).numpy()
    means[NONE] = 0
    return means
