"""How far the outputs of a cut model are from those of the masked one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from pruning_core.graph.cut.reference import MaskedRun
from pruning_core.graph.errors import CannotRunError, GraphError
from pruning_core.graph.inputs import leaves
from pruning_core.graph.trace.labels import left
from pruning_core.graph.trace.shadows import Shadow

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
IN_FLOAT64 = TOLERANCE[torch.float64]
ROUNDING = 1e-6
"""More than this in float32 may be rounding or a fault: float64 decides."""
ENDLESS = 1e30
"""Beyond it a number stands for infinity, as in masked logits, and says nothing about the scale of the others."""


def wanted(trace: MaskedRun, outputs_may_shrink: bool) -> list[Tensor]:
    """What the cut model must give: the masked model's outputs, of those that lose channels the kept part."""
    found = numbers_of(trace.output)
    if not outputs_may_shrink:
        return [leaf.detach().clone() for leaf in found]
    return [kept_part(trace, shadow, leaf) for shadow, leaf in zip(trace.outputs, found, strict=True)]


def numbers_of(output: Any) -> list[Tensor]:
    """The tensors of an output; CannotRunError where one holds NaN, which equals nothing."""
    found = [each if each.layout == torch.strided else each.to_dense() for each in leaves(output)]
    if any(bool(each.isnan().any()) for each in found if each.is_floating_point() or each.is_complex()):
        raise CannotRunError(
            "example_inputs: the model's outputs on them are NaN, so that no cut can be checked; give inputs that it "
            "computes numbers from"
        )
    return found


def kept_part(trace: MaskedRun, shadow: Shadow, value: Tensor) -> Tensor:
    """The kept part of a value that lies where an output with this shadow loses channels."""
    shape = left(shadow, trace.dead) if isinstance(shadow, Tensor) else None
    if not isinstance(shadow, Tensor) or shape is None or shape == tuple(value.shape):
        return value.detach().clone()
    return value[~trace.dead[shadow.long()]].reshape(shape)


def relative_difference(want: Tensor, have: Tensor) -> float:
    """``max |want - have| / max |want|``; 0 for tensors without floating-point numbers. Equal infinities are equal."""
    if want.is_complex() and have.is_complex():
        want, have = torch.view_as_real(want), torch.view_as_real(have)
    if not want.is_floating_point() or not want.numel():
        return 0.0
    size = want.abs()
    scale = float(size.masked_fill(size > ENDLESS, 0).max().clamp_min(torch.finfo(want.dtype).tiny))
    return float((want - have.detach()).masked_fill(want == have, 0).abs().max()) / scale


def tolerance_of(dtypes: Iterable[torch.dtype]) -> float:
    """What a run that computes in these may differ by."""
    return max(TOLERANCE.get(dtype, 0.0) for dtype in dtypes)


def accept(reference: list[Tensor], got: list[Tensor], tolerance: float) -> float:
    """The largest relative difference; GraphError if it is above the tolerance."""
    worst = 0.0
    got = [each if each.layout == torch.strided else each.to_dense() for each in got]
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
