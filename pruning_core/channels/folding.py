"""Folds a removed channel's constant output into its consumers' biases.

A row of zeros outputs ``activation(bias)`` for any input. This is verified, not derived: the model runs on two inputs,
each removed input of every consumer must be constant, and the folded model must compute what the model did.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pruning_core.graph import GraphError, Plan
from pruning_core.graph.cut.difference import TOLERANCE, kept_part, relative_difference
from pruning_core.graph.cut.reference import masked_run
from pruning_core.graph.inputs import Inputs, leaves, untouched
from pruning_core.graph.trace.labels import Axis

FOLDABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
WHY = "with prune_bias=False what a pruned row still gives must be folded into the bias of every layer that reads it"


class PadsZerosError(GraphError):
    """A consumer pads with zeros where a removed channel would be another constant."""

    def __init__(self, axis: Axis) -> None:
        super().__init__(f"{axis.tensor}: {WHY}, got a convolution that pads with zeros; set prune_bias=True")
        self.axis = axis


class Consumer:
    """A consumer of removed channels, and the values that it read from them."""

    def __init__(self, model: nn.Module, axis: Axis, dead: tuple[int, ...]) -> None:
        path, _, name = axis.tensor.rpartition(".")
        module = model.get_submodule(path)
        plain = isinstance(module, FOLDABLE) and name == "weight" and axis.dim == 1
        if not plain or getattr(module, "groups", 1) != 1:
            raise GraphError(
                f"{axis.tensor}: {WHY}, got a consumer {type(module).__name__}; set prune_bias=True for what it reads"
            )
        self.path, self.module, self.dead, self.axis = path, module, list(dead), axis
        self.found: list[Tensor] = []

    def see(self, module: nn.Module, inputs: Any, keywords: Any) -> None:
        """A forward pre-hook."""
        read: Tensor = next(iter((*inputs, *keywords.values())))
        dim = 1 - self.module.get_parameter("weight").dim()  # as many dimensions after the channels as a kernel has
        self.found.append(read.movedim(dim, -1).reshape(-1, read.shape[dim])[:, self.dead])

    def constants(self) -> Tensor:
        """The constant of each removed channel; GraphError where it depends on the input."""
        found = torch.cat(self.found)
        apart = float((found - found[:1]).abs().max()) if len(found) else 0.0
        if not apart <= 100 * torch.finfo(found.dtype).eps * float(found.abs().max()):
            raise GraphError(
                f"{self.path}: {WHY}, got inputs that change by {apart:.1e}; set prune_bias=True for what it reads"
            )
        padding = getattr(self.module, "_reversed_padding_repeated_twice", ())
        if any(padding) and self.module.padding_mode == "zeros" and bool(found[:1].any()):
            raise PadsZerosError(self.axis)
        return found[0]

    def fold(self, constants: Tensor, undo: ExitStack) -> bool:
        """Adds the constants to the bias; whether the layer got a new one."""
        weight = self.module.get_parameter("weight")
        columns = weight.data[:, self.dead].double()
        folded = columns.flatten(2).sum(-1) if columns.dim() > 2 else columns
        more = (folded @ constants.double()).to(weight.dtype)
        bias = self.module._parameters["bias"]
        if bias is not None:
            undo.callback(setattr, bias, "data", bias.data)
            bias.data = bias.data + more
        elif bool(more.any()):
            undo.callback(self.module._parameters.__setitem__, "bias", None)
            self.module._parameters["bias"] = nn.Parameter(more, requires_grad=weight.requires_grad)
            return True
        return False


def fold_constants(model: nn.Module, plan: Plan, example: Inputs, undo: ExitStack) -> bool:
    """Adds the constants of the plan's channels to the biases of consumers; whether any layer got a new bias."""
    consumers = [Consumer(model, axis, plan.removed[axis]) for axis in sorted(plan.consumers, key=str)]
    runs = [example, pytree.tree_map_only(Tensor, _changed, example)]
    hooks = [consumer.module.register_forward_pre_hook(consumer.see, with_kwargs=True) for consumer in consumers]
    try:
        wanted = [_run(model, inputs) for inputs in runs]
    finally:
        for hook in hooks:
            hook.remove()
    with torch.no_grad():
        found = [(consumer, consumer.constants()) for consumer in consumers if consumer.found]  # all before any changes
        grown = [consumer.fold(constants, undo) for consumer, constants in found]
    for inputs, want in zip(runs, wanted, strict=True):
        trace = masked_run(model, plan, inputs)
        for shadow, value, leaf in zip(trace.outputs, want, leaves(trace.output), strict=True):
            _compare(kept_part(trace, shadow, value), kept_part(trace, shadow, leaf))
    return any(grown)


def _changed(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    generator = torch.Generator().manual_seed(1)
    return torch.randn(tensor.shape, generator=generator).to(tensor)


def _run(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    with untouched(model), torch.inference_mode():
        return [leaf.clone() for leaf in leaves(model(*inputs[0], **inputs[1]))]


def _compare(want: Tensor, have: Tensor) -> None:
    apart = relative_difference(want, have)
    if not apart <= TOLERANCE.get(want.dtype, 0.0):
        raise GraphError(
            f"prune: {WHY}, got outputs {apart:.1e} apart, so something else reads it as well (a norm or a mean over "
            "channels); set prune_bias=True"
        )
