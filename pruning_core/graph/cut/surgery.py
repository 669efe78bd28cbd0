"""Removes channels in place: same modules, same Parameter objects, smaller tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pruning_core.graph.cut.attributes import Attributes
from pruning_core.graph.cut.compare import CutModel, left
from pruning_core.graph.cut.follow import follow, follow_usual_names
from pruning_core.graph.cut.reference import MaskedRun, masked_run
from pruning_core.graph.cut.slicing import cut_optimizer, cut_parameters, put
from pruning_core.graph.cut.structure import remember
from pruning_core.graph.errors import GraphError
from pruning_core.graph.inputs import as_inputs, leaves
from pruning_core.graph.plan import Plan, named_tensors

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}


@dataclass(frozen=True)
class Slimmed:
    """What ``slim_`` did.

    ``params_before``, ``params_after``: parameters. ``difference``: the largest relative difference from the masked
    model, over ``compared`` numbers (none where a detector finds nothing on the example). ``attributes``: what was
    changed, by module.
    """

    params_before: int
    params_after: int
    difference: float
    compared: int
    attributes: Mapping[str, Mapping[str, Any]]

    def __str__(self) -> str:
        share = self.params_after / max(self.params_before, 1)
        checked = f"largest relative difference from the masked model {self.difference:.1e}"
        if not self.compared:
            checked = "the example's outputs hold no numbers: shapes alone were compared with the masked model"
        return f"{self.params_before:,} -> {self.params_after:,} parameters ({share:.1%}); {checked}"


def slim_(
    model: nn.Module,
    plan: Plan,
    *,
    example_inputs: Any = None,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    ema: nn.Module | Iterable[nn.Module] | None = None,
) -> Slimmed:
    """Cuts the model in place as the plan says, and with it optimizer states and averaged copies.

    Parameters stay the same objects, so training goes on. The cut model runs on the example and must give what the
    masked dense model gives (for a graph traced with ``outputs_may_shrink``: in the channels that are kept); if it does
    not, everything is put back and ``GraphError`` says where they part. ``example_inputs`` is needed only for a plan
    that was loaded: one that a graph made remembers what the graph was traced with.
    """
    plan.check(model)
    example = plan.example if example_inputs is None else as_inputs(example_inputs)
    if example is None:
        raise GraphError("example_inputs: a loaded plan has none, got None; give what model(...) takes")
    copies = [ema] if isinstance(ema, nn.Module) else list(ema or ())
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer or ())
    for each in copies:
        plan.check(each)
    before = sum(parameter.numel() for parameter in model.parameters())
    trace = masked_run(model, plan, example)
    reference = [_wanted(trace, leaf, plan.outputs_may_shrink) for leaf in leaves(trace.output)]
    undo = Undo([model, *copies])
    try:
        cut_parameters(model, plan)
        attributes = Attributes(model)
        attributes.follow_parameters()
        cut = CutModel(model, trace, example, lambda got: _compare(reference, leaves(got), trace.dtypes))
        difference = follow(attributes, cut)
        follow_usual_names(attributes, cut, plan)
        for each in copies:
            cut_parameters(each, plan)
            attributes.apply_to(each)
        states = [each for one in optimizers for each in cut_optimizer(one, undo.tensors[0], plan, model)]
    except BaseException:
        undo.run()
        raise
    for state, key, value in states:
        state[key] = value
    for each in (model, *copies):
        remember(each, plan, attributes.changed)
    after = sum(parameter.numel() for parameter in model.parameters())
    compared = sum(leaf.numel() for leaf in reference if leaf.is_floating_point())
    return Slimmed(before, after, difference, compared, attributes.changed)


def _wanted(trace: MaskedRun, leaf: Tensor, outputs_may_shrink: bool) -> Tensor:
    return kept_part(trace, leaf, leaf) if outputs_may_shrink else leaf.detach().clone()


def kept_part(trace: MaskedRun, output: Tensor, value: Tensor) -> Tensor:
    """The kept part of a value that lies where an output loses channels."""
    shadow = trace.shadow_of(output)
    shape = left(shadow, trace.dead) if isinstance(shadow, Tensor) else None
    if not isinstance(shadow, Tensor) or shape is None or shape == tuple(output.shape):
        return value.detach().clone()
    return value[~trace.dead[shadow.long()]].reshape(shape)


def relative_difference(want: Tensor, have: Tensor) -> float:
    """``max |want - have| / max |want|``; 0 for tensors without floating-point numbers."""
    if not want.is_floating_point() or not want.numel():
        return 0.0
    scale = float(want.abs().max().clamp_min(torch.finfo(want.dtype).tiny))
    return float((want - have.detach()).abs().max()) / scale


def _compare(reference: list[Tensor], got: list[Tensor], dtypes: set[torch.dtype]) -> float:
    tolerance = max(TOLERANCE.get(dtype, 0.0) for dtype in dtypes)
    worst = 0.0
    if len(reference) != len(got):
        raise GraphError(f"slim_: gives {len(got)} tensors, not {len(reference)}; the model was put back as it was")
    for want, have in zip(reference, got, strict=True):
        if want.shape != have.shape:
            raise GraphError(
                f"slim_: an output changed its shape from {tuple(want.shape)} to {tuple(have.shape)}; "
                "the model was put back as it was"
            )
        apart = relative_difference(want, have)
        if not apart <= tolerance:
            raise GraphError(
                f"slim_: the cut model does not compute what the masked one does, got a relative difference of "
                f"{apart:.1e}; the model was put back as it was"
            )
        worst = max(worst, apart)
    return worst


class Undo:
    """A snapshot of everything a cut replaces, for rollback."""

    def __init__(self, models: list[nn.Module]) -> None:
        self.tensors = [self._tensors(model) for model in models]
        self._attributes = [(module, dict(module.__dict__)) for model in models for module in model.modules()]

    @staticmethod
    def _tensors(model: nn.Module) -> dict[str, tuple[Tensor, Tensor, Tensor | None]]:
        return {name: (tensor, tensor.data, tensor.grad) for name, tensor in named_tensors(model).items()}

    def run(self) -> None:
        """Restores tensors, gradients and attributes."""
        for tensors in self.tensors:
            for tensor, data, grad in tensors.values():
                put(tensor, data)
                tensor.grad = grad
        for module, attributes in self._attributes:
            for name, value in attributes.items():
                if module.__dict__.get(name) is not value:
                    module.__dict__[name] = value
