"""What weights alone say about a channel: how large it is where it is read, times how strongly it is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from pruning_core.criteria import Criterion
from pruning_core.graph import ChannelGraph, GraphError
from pruning_core.graph.trace.labels import Axis

NOT_FINITE = "criterion: a score is not finite, got nan or inf in weights or gradients; repair them first"


class UnitScores(NamedTuple):
    """By unit: its score, and whether it has one."""

    values: np.ndarray
    known: np.ndarray


def of_weights(graph: ChannelGraph, criterion: Criterion, axes: list[Axis]) -> UnitScores:
    """What a channel is made with times what it is read with.

    A batch norm sets the size of a channel, whatever made it: then its scale stands for that. Without one it is what
    the channel is made with, times the scales of other norms and the kernels of depthwise convolutions on the way.
    """
    roles: dict[str, dict[Axis, Tensor]] = {"makes": {}, "reads": {}, "sets": {}, "scales": {}}
    for axis, each in folded(graph, criterion, axes, {}).items():
        role = _role(graph, axis)
        if role:
            value = criterion.finish(each)
            if not bool(value.isfinite().all()):  # also where a norm's scale stands for it
                raise GraphError(NOT_FINITE)
            roles[role][axis] = value / value.mean().clamp_min(1e-300)
    makes, reads, sets, scales = (mean_of_slices(graph, roles[role]) for role in ("makes", "reads", "sets", "scales"))
    made = np.where(makes.known, makes.values, 1.0) * np.where(scales.known, scales.values, 1.0)
    size = np.where(sets.known, sets.values, made)
    known = makes.known | reads.known | sets.known | scales.known
    return UnitScores(size * np.where(reads.known, reads.values, 1.0), known)


def _role(graph: ChannelGraph, axis: Axis) -> str:
    """What a weight does to the channels along an axis; nothing where it is a bias, which cannot be compared."""
    layer, _, name = axis.tensor.rpartition(".")
    module, tensor = graph.model.get_submodule(layer), graph.stored.names[axis.tensor]
    if tensor.dim() == 1:
        return "" if name != "weight" else "sets" if hasattr(module, "running_mean") else "scales"
    if axis in graph.consumers:
        return "reads"
    depthwise = isinstance(module, _ConvNd) and module.groups == module.in_channels > 1
    return "scales" if depthwise else "makes"


def mean_of_slices(graph: ChannelGraph, found: Mapping[Axis, Tensor]) -> UnitScores:
    """The mean over the slices of a unit that have a score."""
    units = graph.components.of_label
    total, count = np.zeros(units.max() + 1), np.zeros(units.max() + 1)
    for axis, values in found.items():
        owners = units[graph.labels.axes[axis].numpy()]
        np.add.at(total, owners, values.double().cpu().numpy())
        np.add.at(count, owners, 1)
    return UnitScores(total / np.maximum(count, 1), count > 0)


def folded(
    graph: ChannelGraph, criterion: Criterion, axes: list[Axis], gradients: Mapping[str, Tensor]
) -> dict[Axis, Tensor]:
    """One step's sums: a tensor is scored once and folded along each of its axes."""
    scored: dict[str, Tensor] = {}
    found = {}
    for axis in axes:
        if axis.tensor not in scored:
            scored.clear()
            gradient = gradients[axis.tensor] if criterion.needs_gradient else None
            scored[axis.tensor] = criterion.score(graph.stored.names[axis.tensor].detach(), gradient)
        score = scored[axis.tensor]
        other = [dim for dim in range(score.dim()) if dim != axis.dim]
        found[axis] = criterion.each_step((score.sum(other) if other else score).double())
    return found
