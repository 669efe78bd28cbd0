"""The options of channel pruning, declared once and checked at construction."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from pruning_core.criteria import CRITERIA
from pruning_core.graph import ChannelGraph, ChannelGroup
from pruning_core.limits import Limits, LimitsOption, read_limits
from pruning_core.options import Names, Options, Patterns, Positive
from pruning_core.selection import FAMILIES, Selector, family


class ChannelOptions(Options):
    """The options of ``plan_channels``, ``Pruner`` and ``slim``; names and messages are those of masks."""

    criterion: Annotated[str, Field(description="what a channel is worth: a name from `pc.CRITERIA`")] = "l2"
    scope: Annotated[
        Literal["global", "local"],
        Field(description="rank all channels together, or take the same share of each group"),
    ] = "global"
    round_to: Annotated[Positive, Field(description="what is left of a group is a multiple of this")] = 1
    limits: Annotated[
        LimitsOption,
        Field(description="the share of a group that may go: 0.95, or regular expression -> most, or [least, most]"),
    ] = 0.95
    op_names: Annotated[Patterns, Field(description="regular expressions (`re.search`); empty: all layers")] = []
    excluded_op_names: Annotated[
        Patterns, Field(description="regular expressions of layers that stay whole, inputs and outputs")
    ] = []
    pruning_op_types: Annotated[
        Names, Field(description="`Conv` (every convolution), `Linear`, or exact class names", min_length=1)
    ] = list(FAMILIES)
    seed: Annotated[int, Field(description="of `random`")] = 0
    uniform: Annotated[
        bool, Field(description="every block of a stack keeps one width; a Transformers configuration says it")
    ] = False

    @field_validator("criterion")
    @classmethod
    def _known(cls, value: str) -> str:
        CRITERIA[value]
        return value

    @cached_property
    def group_limits(self) -> Limits:
        """The parsed ``limits``."""
        return read_limits(self.limits, most=0.95)


class GroupLimits:
    """How many channels of each group may and must be removed; ValueError for names that the graph lacks."""

    def __init__(self, graph: ChannelGraph, options: ChannelOptions) -> None:
        self.graph, self.round_to, self.limits = graph, options.round_to, options.group_limits
        self._bounds: dict[str, tuple[int, int]] = {}
        self._widths: dict[str, int] = {}
        self._layers = {name: _layers(group) for name, group in graph.groups.items()}
        self.limits.check_names("limits", [layer for layers in self._layers.values() for layer in layers])
        self._selector = Selector("", options.op_names, options.excluded_op_names, options.pruning_op_types)
        self._modules = dict(self._selector.check(graph.model))
        self._selects = bool(options.op_names) or options.pruning_op_types != list(FAMILIES)
        if CRITERIA[options.criterion].needs_gradient:
            self._check_frozen(options.criterion)

    def _check_frozen(self, criterion: str) -> None:
        for group in self.graph.groups.values():
            for name in frozen_weights(self.graph, group):
                layer = name.rpartition(".")[0]
                if self._selector.names_explicitly(layer):
                    raise ValueError(
                        f"op_names: {layer} requires no gradient, and {criterion} needs one; take it out, or choose l2"
                    )

    def frozen(self, group: ChannelGroup) -> list[str]:
        """The frozen weights that the group runs along and that are not named: it stays as it is for their sake."""
        names = frozen_weights(self.graph, group)
        return [name for name in names if not self._selector.names_explicitly(name.rpartition(".")[0])]

    def bounds(self, group: ChannelGroup) -> tuple[int, int]:
        """(least, most) channels to remove; (0, 0) where a layer of the group is excluded, frozen or not selected."""
        if group.name not in self._bounds:
            self._bounds[group.name] = self._bounds_of(group)
        return self._bounds[group.name]

    def _bounds_of(self, group: ChannelGroup) -> tuple[int, int]:
        layers = self._layers[group.name]
        excluded = Selector("", (), self._selector.excluded, ())
        if any(excluded.why_not(layer) for layer in layers) or not self._selected(group):
            return 0, 0
        if self.frozen(group):
            return 0, 0
        least, most = self.limits.of(layers)
        high = min(int(len(group) * most), len(group) - 1)
        return min(int(len(group) * least), high), high

    def _selected(self, group: ChannelGroup) -> bool:
        """Every convolution and linear layer that makes these channels is of the types and names that were given."""
        if not self._selects:
            return True
        makers = [axis.tensor.rpartition(".")[0] for axis in group.axes if axis not in self.graph.consumers]
        known = [layer for layer in makers if family(self.graph.model.get_submodule(layer))]
        return all(layer in self._modules and not self._selector.why_not(layer) for layer in known)

    def rounded(self, group: ChannelGroup, count: int) -> int:
        """The largest number not above ``count`` that leaves each layer a multiple of ``round_to``: a head is many
        rows, and two that a fused gate and value make are one channel for the next layer."""
        rows = self.rows(group) if self.round_to > 1 else 1
        least, most = self.bounds(group)
        count = min(max(count, least), most)
        while count and ((len(group) - count) * rows) % self.round_to:
            count -= 1
        return count

    def rows(self, group: ChannelGroup) -> int:
        """The fewest rows that one channel has in a layer that makes or reads it."""
        if group.name not in self._widths:
            layers = {axis: axis.tensor.rpartition(".")[0] for axis in group.axes}
            known = [axis for axis in group.axes if axis in self.graph.consumers or self._is_layer(layers[axis])]
            self._widths[group.name] = min(group.rows(axis) for axis in known or group.axes[:1])
        return self._widths[group.name]

    def _is_layer(self, path: str) -> bool:
        return family(self.graph.model.get_submodule(path)) is not None


def _layers(group: ChannelGroup) -> list[str]:
    """The layers that a group of channels runs through."""
    return list(dict.fromkeys(axis.tensor.rpartition(".")[0] for axis in group.axes))


def frozen_weights(graph: ChannelGraph, group: ChannelGroup) -> list[str]:
    """The weights along the axes of a group that require no gradient; biases and norms do not count."""
    names = dict.fromkeys(axis.tensor for axis in group.axes if axis.tensor in graph.parameters)
    tensors = {name: graph.stored.names[name] for name in names}
    return [name for name, tensor in tensors.items() if tensor.dim() > 1 and not tensor.requires_grad]


def read_options(**given: Any) -> ChannelOptions:
    """Checked options; tuples of names do as well as lists."""
    return ChannelOptions.read(
        {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
    )
