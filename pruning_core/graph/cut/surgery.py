"""Removes channels in place: same modules, same Parameter objects, smaller tensors."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pruning_core.graph.cut.attributes import Attributes
from pruning_core.graph.cut.compare import CutModel
from pruning_core.graph.cut.configuration import configure, reload_apart
from pruning_core.graph.cut.difference import IN_FLOAT64, ROUNDING, tolerance_of, wanted
from pruning_core.graph.cut.follow import follow, follow_usual_names
from pruning_core.graph.cut.reference import masked_run
from pruning_core.graph.cut.slicing import check_optimizers, cut_optimizer, cut_parameters
from pruning_core.graph.cut.structure import remember
from pruning_core.graph.errors import CannotRunError, GraphError
from pruning_core.graph.inputs import Inputs, as_inputs, put, without_collection
from pruning_core.graph.plan import Plan, named_tensors
from pruning_core.graph.trace.upcast import Upcast, in_double, stored_in_double
from pruning_core.graph.wrappers import agree, refuse_unready, renew, replicas_of, unwrapped

HALF = {torch.float16, torch.bfloat16}


@dataclass(frozen=True)
class Slimmed:
    """What ``slim_`` did.

    ``params_before``, ``params_after``: parameters. ``difference``: the largest relative difference from the masked
    model, over ``compared`` numbers (none where a detector finds nothing on the example). ``in_float64``: the same of
    both models run in float64, where ``difference`` alone could be rounding or a fault; None where it was not needed,
    NaN where the model cannot run in float64. ``attributes``: what was changed, by module.
    """

    params_before: int
    params_after: int
    difference: float
    compared: int
    attributes: Mapping[str, Mapping[str, Any]]
    in_float64: float | None = None

    def __str__(self) -> str:
        share = self.params_after / max(self.params_before, 1)
        checked = f"largest relative difference from the masked model {self.difference:.1e}"
        if self.in_float64 is not None:
            unproved = "not checked in float64, which the model cannot run in"
            checked += f" ({unproved if math.isnan(self.in_float64) else f'{self.in_float64:.1e} in float64'})"
        if not self.compared:
            checked = "the example's outputs hold no numbers: shapes alone were compared with the masked model"
        return f"{self.params_before:,} -> {self.params_after:,} parameters ({share:.1%}); {checked}"


@without_collection()
def slim_(
    model: nn.Module,
    plan: Plan,
    *,
    example_inputs: Any = None,
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    ema: nn.Module | Iterable[nn.Module] | None = None,
) -> Slimmed:
    """Cuts the model in place as the plan says, and with it optimizer states and averaged copies.

    Parameters stay the same objects and gradients lose what their parameters lose, so training goes on, also under
    ``DistributedDataParallel``, where all ranks must call it, with one plan.

    The cut model runs on the example and must give what the masked dense model gives (for a graph traced with
    ``outputs_may_shrink``: in the channels that are kept); if it does not, everything is put back and ``GraphError``
    says where they part. Where they differ by more than 1e-6, and in half precision, both run again in float64 and must
    agree to 1e-9. ``example_inputs`` is needed only for a plan that was loaded: one that a graph made remembers what
    the graph was traced with.
    """
    model = unwrapped(model)
    refuse_unready(model)
    plan.check(model)
    example = plan.example if example_inputs is None else as_inputs(example_inputs)
    if example is None:
        raise GraphError("example_inputs: a loaded plan has none, got None; give what model(...) takes")
    copies = [unwrapped(each) for each in _several(ema, nn.Module)]
    optimizers = _several(optimizer, Optimizer)
    for each in copies:
        if not isinstance(each, nn.Module):
            raise GraphError(f"ema: must be a module or several, got {type(each).__name__}")
        plan.check(each)
    check_optimizers(model, optimizers)
    replicas = replicas_of(model)
    if replicas:
        agree(model, "plan", json.dumps(plan.to_dict(), sort_keys=True))
    params = sum(parameter.numel() for parameter in model.parameters())
    recorded = plan.recorded if example_inputs is None else None
    trace = masked_run(model, plan, example, recorded=recorded)
    reference, tolerance = wanted(trace, plan.outputs_may_shrink), tolerance_of(trace.dtypes)
    before = Snapshot([model, *copies])
    try:
        cut_parameters(model, plan)
        attributes = Attributes(model)
        attributes.follow_parameters()
        cut = CutModel(model, trace, example, reference, tolerance)
        difference = follow(attributes, cut)
        follow_usual_names(attributes, cut, plan)
        exact = None
        if tolerance > IN_FLOAT64 and (difference > ROUNDING or trace.dtypes & HALF):
            exact = _proved(model, plan, example, before)
        for each in copies:
            cut_parameters(each, plan)
            attributes.apply_to(each)
        if plan.configuration:
            _configured([model, *copies], plan, example)
        states = [each for one in optimizers for each in cut_optimizer(one, before.tensors[0], plan, model)]
    except BaseException:
        before.restore()
        raise
    for state, key, value in states:
        state[key] = value
    for replica in replicas:
        renew(replica)
    for each in (model, *copies):
        remember(each, plan, attributes.changed)
    after = sum(parameter.numel() for parameter in model.parameters())
    compared = sum(leaf.numel() for leaf in reference if leaf.is_floating_point() or leaf.is_complex())
    return Slimmed(params, after, difference, compared, attributes.changed, exact)


def _configured(models: list[nn.Module], plan: Plan, example: Inputs) -> None:
    """The configurations say what is left: a model that is built from one and given these weights computes the same."""
    for each in models:
        configure(each, plan.configuration)
    apart = reload_apart(models[0], example)
    if apart:
        raise GraphError(f"uniform: the configuration says another model, {apart}; everything was put back as it was")


def _several(given: Any, kind: type) -> list[Any]:
    """A list of what may be given as one, as several, or not at all."""
    if given is None:
        return []
    return list(given) if isinstance(given, Iterable) and not isinstance(given, kind) else [given]


def _proved(model: nn.Module, plan: Plan, example: Inputs, dense: Snapshot) -> float:
    """The relative difference from the masked dense model, both in float64; NaN where that cannot run."""
    cut, example = Snapshot([model]), in_double(example)
    for stored in (contextlib.nullcontext, lambda: stored_in_double(named_tensors(model).values())):
        upcast = Upcast(model, {})
        dense.restore()
        try:
            with stored():
                trace = masked_run(model, plan, example, upcast, plan.recorded)
                reference = wanted(trace, plan.outputs_may_shrink)
        except CannotRunError:
            continue
        finally:
            cut.restore()
        if upcast.rounded:
            continue
        with stored():
            proof = CutModel(model, trace, example, reference, IN_FLOAT64)
            run = proof.run()
        if run.error is None:
            return proof.accept(run.output)
    return math.nan


class Snapshot:
    """A snapshot of everything a cut replaces, for rollback."""

    def __init__(self, models: list[nn.Module]) -> None:
        self.tensors = [self._tensors(model) for model in models]
        self._attributes = [(module, dict(module.__dict__)) for model in models for module in model.modules()]

    @staticmethod
    def _tensors(model: nn.Module) -> dict[str, tuple[Tensor, Tensor, Tensor | None]]:
        return {name: (tensor, tensor.data, tensor.grad) for name, tensor in named_tensors(model).items()}

    def restore(self) -> None:
        """Puts tensors, gradients and attributes back."""
        for tensors in self.tensors:
            for tensor, data, grad in tensors.values():
                put(tensor, data)
                tensor.grad = grad
        for module, attributes in self._attributes:
            for name, value in attributes.items():
                if module.__dict__.get(name) is not value:
                    module.__dict__[name] = value
