"""Cuts copies of a model, to find out what its code can follow, and proves each in float64."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from pruning_core.graph.cut.attributes import Attributes
from pruning_core.graph.cut.compare import CutModel
from pruning_core.graph.cut.difference import IN_FLOAT64, tolerance_of, wanted
from pruning_core.graph.cut.follow import follow, follow_usual_names
from pruning_core.graph.cut.reference import masked_run, recorded_run
from pruning_core.graph.cut.slicing import cut_parameters, empty_parameters
from pruning_core.graph.errors import CannotRunError, GraphError, RoundedError
from pruning_core.graph.inputs import Inputs
from pruning_core.graph.plan import Plan, named_tensors
from pruning_core.graph.trace.recorder import Recorder
from pruning_core.graph.trace.upcast import Upcast, in_double, stored_in_double


@dataclass(frozen=True)
class Way:
    """How a trial runs: with ``lively`` weights; ``upcast`` to float64; with ``stored`` weights in float64 too."""

    lively: bool = False
    upcast: bool = True
    stored: bool = False


WAYS = (Way(lively=True), Way(lively=True, stored=True), Way(), Way(stored=True), Way(upcast=False))
"""The strictest first. One that a model cannot run in is left for the next: all can run in the last."""


class TrialCuts:
    """Cuts a copy of the model for one plan after another; GraphError where its code does not follow the cut, or where
    the cut copy computes something else than the masked one."""

    def __init__(self, model: nn.Module, example: Inputs, recorded: Recorder | None = None) -> None:
        self.model, self.example, self.recorded, self.ways = model, example, recorded, list(WAYS)

    def __call__(self, plan: Plan, numbers: bool = True) -> None:
        """Without ``numbers`` shapes alone are compared, with the recorded run, as long as they do not depend on what
        was cut (which experts are chosen)."""
        if not numbers and self.recorded is not None:
            with contextlib.suppress(GraphError):
                return _cut_shapes(self.model, plan, self.example, self.recorded)
        while True:
            try:
                return _cut(self.model, plan, self.example, self.ways[0], self.recorded)
            except CannotRunError as error:
                if len(self.ways) == 1:
                    raise
                failed = self.ways.pop(0)
                if isinstance(error, RoundedError):  # whatever the weights are
                    self.ways = [each for each in self.ways if not each.upcast or each.stored != failed.stored]


def _cut_shapes(model: nn.Module, plan: Plan, example: Inputs, recorded: Recorder) -> None:
    trial = shared_copy(model)
    empty_parameters(trial, plan)
    attributes = Attributes(trial)
    attributes.follow_parameters()
    follow(attributes, CutModel(trial, recorded_run(recorded, plan), example, None, 0.0))


def _cut(model: nn.Module, plan: Plan, example: Inputs, way: Way, recorded: Recorder | None) -> None:
    trial = shared_copy(model)
    if way.lively:
        enliven(trial)
        example = pytree.tree_map_only(Tensor, _varied_input, example)
    if way.upcast:
        example = in_double(example)
    with stored_in_double(named_tensors(trial).values()) if way.stored else contextlib.nullcontext():
        upcast = Upcast(trial, None if way.lively else {}) if way.upcast else None
        trace = masked_run(trial, plan, example, upcast, recorded)
        reference = wanted(trace, plan.outputs_may_shrink)
        if upcast is not None and upcast.rounded:
            raise RoundedError("example_inputs: what they give is rounded on the way")
        cut_parameters(trial, plan)
        attributes = Attributes(trial)
        attributes.follow_parameters()
        tolerance = IN_FLOAT64 if way.upcast else tolerance_of(trace.dtypes)
        cut = CutModel(trial, trace, example, reference, tolerance)
        follow(attributes, cut)


def cut_copy(model: nn.Module, plan: Plan, example: Inputs, recorded: Recorder) -> nn.Module:
    """A cut copy whose attributes follow, with weights behind which nothing can hide; shapes alone are compared, of a
    cut that a trial has proved."""
    trial = shared_copy(model)
    enliven(trial)
    cut_parameters(trial, plan)
    attributes = Attributes(trial)
    attributes.follow_parameters()
    cut = CutModel(trial, recorded_run(recorded, plan), example, None, 0.0)
    follow(attributes, cut)
    follow_usual_names(attributes, cut, plan)
    return trial


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy that shares the memory of parameters and buffers: other data can be put into either.

    Activations that a module keeps from its last step cannot be copied: the copy gets their values.
    """
    kept = [leaf for module in model.modules() for leaf in pytree.tree_leaves(list(vars(module).values()))]
    memo: dict[int, Any] = {id(leaf): leaf.detach() for leaf in kept if isinstance(leaf, Tensor) and not leaf.is_leaf}
    for each in model.parameters():
        if type(each) is nn.Parameter:
            memo[id(each)] = nn.Parameter(each.detach(), each.requires_grad)
    memo.update((id(each), each.detach()) for each in model.buffers() if type(each) is Tensor)
    return copy.deepcopy(model, memo)


def enliven(model: nn.Module) -> None:
    """Varies what is one number everywhere: the weights of a fresh norm, a layer scale of 1e-6, a zero that switches a
    branch off. Behind such numbers a wrong cut could hide."""
    generator = torch.Generator().manual_seed(0)
    alone = _alone(model)
    for tensor in model.parameters():
        if id(tensor) in alone and _is_constant(tensor):
            tensor.data = _varied(tensor, generator)
    for module in model.modules():
        for buffer in (module.running_mean, module.running_var) if isinstance(module, _BatchNorm) else ():
            if buffer is not None and _is_constant(buffer):
                buffer.data = _varied(buffer, generator).abs()


def _alone(model: nn.Module) -> set[int]:
    """Parameters that share their memory with no other."""
    memories: dict[int, list[int]] = {}
    for tensor in model.parameters():
        memories.setdefault(tensor.untyped_storage().data_ptr(), []).append(id(tensor))
    return {found[0] for found in memories.values() if len(found) == 1}


def _is_constant(tensor: Tensor) -> bool:
    """Whether all numbers are one; a single number only where it is so small that it switches something off."""
    if not tensor.is_floating_point() or not tensor.numel():
        return False
    low, high = tensor.detach().aminmax()
    return bool(low == high) and (tensor.numel() > 1 or abs(float(low)) < 0.01)


def _varied(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers around the constant; where it is tiny, ones that matter and keep the scale of what they multiply."""
    constant = float(tensor.detach().flatten()[0])
    if abs(constant) > 0.01:
        numbers = constant * (0.5 + torch.rand(tensor.shape, generator=generator, dtype=torch.float64))
    else:
        size = 0.5 if tensor.dim() < 2 else (tensor.numel() / tensor.shape[0]) ** -0.5
        numbers = size * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    return numbers.to(tensor)


def _varied_input(tensor: Tensor) -> Tensor:
    """Images of one colour become noise."""
    if tensor.dim() < 3 or not _is_constant(tensor):
        return tensor
    return torch.rand(tensor.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(tensor)
