"""Auto slim: configurations that make whole channels and heads zero, and their removal from the trained model."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pruning_core.channels.example_inputs import example_for
from pruning_core.criteria import fold_lines
from pruning_core.graph import ChannelGraph, ChannelGroup, GraphError, slim_
from pruning_core.graph.cut.difference import relative_difference
from pruning_core.graph.inputs import leaves, untouched
from pruning_core.graph.trace.labels import Axis
from pruning_core.selection import family

Removed = dict[str, list[int]]
SAME = 1e-5
"""Largest relative difference of float32 outputs: rounding in another order, less than a norm over 10,000 shows."""


def parse_auto_slim_config(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    ffn2_sparsity: float = 0.0,
    mha_sparsity: float = 0.0,
    **options: Any,
) -> list[dict[str, Any]]:
    """Options of pruners that zero input channels of linear layers, so that ``model_slim`` can remove them.

    ``ffn2_sparsity``: share of hidden channels, in the second of two consecutive linear layers. ``mha_sparsity``: share
    of attention heads, in the projection that reads them. ``dataloader``: its first batch is what the model is traced
    with; None: a guess. ``options``: more options for each, such as ``pruning_scope="local"``.
    """
    asked = {"ffn2_sparsity": ffn2_sparsity, "mha_sparsity": mha_sparsity}
    for name, share in asked.items():
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
            raise ValueError(f"{name}: must be at least 0 and below 1, got {share!r}")
    if not any(asked.values()):
        return []
    graph, configs = _traced(model, dataloader), []
    for name, share in asked.items():
        heads = name == "mha_sparsity"
        if not share:
            continue
        found = _readers(graph, heads)
        if not found:
            what = "attention with removable heads" if heads else "two consecutive linear layers"
            raise ValueError(f"{name}: {type(model).__name__} has no {what}, got {share}; set it to 0")
        for width, layers in found.items():
            names = [f"^{re.escape(layer)}$" for layer in layers]
            configs.append({"op_names": names, "pattern": f"channelx{width}", "target_sparsity": share, **options})
    return configs


def model_slim(model: nn.Module, dataloader: Iterable[Any] | None = None, round_multiplier: int = 32) -> nn.Module:
    """Removes in place what no layer reads any more: channels and heads whose every consumer holds zeros for them.

    Outputs do not change; this is verified on the example, and a group of channels that would change them stays.
    ``round_multiplier``: as many zero channels stay as make the width a multiple of it; heads are not rounded.
    ``dataloader``: as in ``parse_auto_slim_config``.
    """
    if isinstance(round_multiplier, bool) or not isinstance(round_multiplier, int) or round_multiplier < 1:
        raise ValueError(f"round_multiplier: must be a whole number from 1, got {round_multiplier!r}")
    graph = _traced(model, dataloader)
    removed: Removed = {}
    for group in graph.groups.values():
        dead = _unread(graph, group)
        while dead and _width(graph, group) == 1 and (len(group) - len(dead)) % round_multiplier:
            dead.pop()
        if dead:
            removed[group.name] = dead
    removed = _harmless(graph, graph.restored(removed))
    if removed:
        slim_(model, graph.plan(removed))
    else:
        warnings.warn("model_slim: no channel is zero in every layer that reads it; nothing was removed", stacklevel=2)
    return model


def _traced(model: nn.Module, dataloader: Iterable[Any] | None) -> ChannelGraph:
    if dataloader is None:
        return ChannelGraph.trace(model, example_for(model, None))
    batch = next(iter(dataloader), None)
    if isinstance(batch, tuple | list) and batch:
        batch = batch[0]  # (inputs, target)
    if batch is None:
        raise ValueError("dataloader: has no batch; give one that yields what the model takes")
    device = next((parameter.device for parameter in model.parameters()), None)
    batch = dict(batch) if isinstance(batch, Mapping) else (batch,)
    return ChannelGraph.trace(model, pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), batch))


def _consumers(graph: ChannelGraph, group: ChannelGroup) -> list[Axis]:
    return [axis for axis in group.axes if axis in graph.consumers]


def _width(graph: ChannelGraph, group: ChannelGroup) -> int:
    """How many inputs of its first consumer one unit takes: 1 for a channel, more for a head; 0 without a consumer."""
    consumers = _consumers(graph, group)
    return group.rows(consumers[0]) if consumers else 0


def _readers(graph: ChannelGraph, heads: bool) -> dict[int, list[str]]:
    """Inputs per unit -> the linear layers that read units of other linear layers, and nothing else does.

    A layer whose rows are outputs of the model, a classifier, is not among them.
    """
    found: dict[int, list[str]] = {}
    heads_of_model = {axis.tensor.rpartition(".")[0] for axis, _, why in graph.frozen() if why == "is an output"}
    for group in graph.groups.values():
        width = _width(graph, group)
        layers = {axis: axis.tensor.rpartition(".")[0] for axis in group.axes}
        linear = all(family(graph.model.get_submodule(layer)) == "Linear" for layer in layers.values())
        if not linear or (width > 1) != heads:
            continue
        for axis in _consumers(graph, group):
            blocks = [tuple(range(i * width, i * width + width)) for i in range(len(group))]
            if layers[axis] in heads_of_model:
                continue
            if width == 1 or [each[axis] for each in group.slices] == blocks:
                found.setdefault(width, []).append(layers[axis])
    return {width: list(dict.fromkeys(layers)) for width, layers in found.items() if width}


def _unread(graph: ChannelGraph, group: ChannelGroup) -> list[int]:
    """The channels for which every consumer holds zeros, but one where all are."""
    consumers = _consumers(graph, group)
    zero = {axis: fold_lines(graph.stored.names[axis.tensor].detach() == 0, axis.dim).all(1) for axis in consumers}
    dead = [
        i
        for i, at in enumerate(group.slices)
        if consumers and all(zero[axis][list(at[axis])].all() for axis in consumers)
    ]
    return dead[: len(group) - 1]


def _harmless(graph: ChannelGraph, removed: Removed) -> Removed:
    """All of it where the outputs stay as they are, else the groups that can go without changing them."""
    if not removed or _changes_nothing(graph, removed):
        return removed
    kept: Removed = {}
    for name, channels in removed.items():
        more = graph.restored({**kept, name: channels})
        if _changes_nothing(graph, more):
            kept = more
    return kept


def _changes_nothing(graph: ChannelGraph, removed: Removed) -> bool:
    """Whether the outputs on the example are the same without these channels; a norm over channels sees them go."""
    whole, cut = copy.deepcopy(graph.model), copy.deepcopy(graph.model)
    try:
        slim_(cut, graph.plan(removed))
    except GraphError:
        return False
    half = (torch.float16, torch.bfloat16)
    args, kwargs = graph.example
    if any(parameter.dtype in half for parameter in whole.parameters()):  # its rounding would hide a difference
        whole, cut = whole.float(), cut.float()
        args, kwargs = pytree.tree_map_only(Tensor, lambda x: x.float() if x.dtype in half else x, graph.example)
    with untouched(whole), untouched(cut), torch.no_grad():
        pairs = zip(leaves(whole(*args, **kwargs)), leaves(cut(*args, **kwargs)), strict=True)
        return all(relative_difference(want, have) <= SAME for want, have in pairs)
