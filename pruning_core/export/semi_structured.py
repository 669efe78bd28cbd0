"""2:4 weights for sparse tensor cores: which layers fit, and conversion to torch's semi-structured tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pruning_core.checkpoint import CheckpointError


class Rule(NamedTuple):
    """The multiples that rows and columns of a weight must be."""

    rows: int
    columns: int


# What torch's kernels accept of floating-point 2:4; its float32 is 1:2. Where cuSPARSELt is there, it is used.
RULES = {
    "CUTLASS": {torch.float16: Rule(32, 64), torch.bfloat16: Rule(32, 64)},
    "cuSPARSELt": {torch.float16: Rule(16, 16), torch.bfloat16: Rule(16, 16)},
}
KINDS = {
    "CUTLASS": torch.sparse.SparseSemiStructuredTensorCUTLASS,
    "cuSPARSELt": torch.sparse.SparseSemiStructuredTensorCUSPARSELT,
}
CAPABILITY = (8, 0)


@dataclass(frozen=True)
class LayerFit:
    """A Linear layer, and per kernel why it cannot be used, or None."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    why_not: dict[str, str | None]

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        reasons = "; ".join(f"{kernel}: {reason or 'fits'}" for kernel, reason in self.why_not.items())
        return f"{self.name} {shape} {str(self.dtype).removeprefix('torch.')}: {reasons}"


def check_semi_structured(model: nn.Module) -> list[LayerFit]:
    """Checks every Linear layer against the requirements of torch's semi-structured kernels. Needs no GPU."""
    layers = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            weight = module.weight.detach()
            reason = None if is_two_of_four(weight) else "is not 2:4 along its inputs"
            why_not = {kernel: reason or _misfit(weight, rules) for kernel, rules in RULES.items()}
            layers.append(LayerFit(name, tuple(weight.shape), weight.dtype, why_not))
    return layers


def is_two_of_four(weight: Tensor) -> bool:
    """At most two of every four consecutive inputs are kept, and not all weights are."""
    if weight.shape[-1] % 4 or not weight.numel():
        return False
    return int((weight != 0).unflatten(-1, (-1, 4)).sum(-1, dtype=torch.int8).amax()) <= 2


def _misfit(weight: Tensor, rules: dict[torch.dtype, Rule]) -> str | None:
    if weight.dtype not in rules:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in rules)
        return f"dtype must be {allowed}"
    rule = rules[weight.dtype]
    if weight.shape[0] % rule.rows or weight.shape[1] % rule.columns:
        return f"shape must be multiples of {rule.rows}x{rule.columns}"
    return None


def to_semi_structured_(model: nn.Module) -> list[str]:
    """Replaces weights of layers that fit by torch's semi-structured tensors; returns the names of the layers.

    Inference only. The model must be on a GPU of compute capability 8.0 or later, in float16 or bfloat16.
    """
    devices = {parameter.device for parameter in model.parameters()}
    if any(device.type != "cuda" for device in devices):
        where = ", ".join(sorted(map(str, devices)))
        raise CheckpointError(
            f"to_semi_structured_: its kernels run on CUDA only, got a model on {where}; model.cuda() first"
        )
    for device in devices:
        if torch.cuda.get_device_capability(device) < CAPABILITY:
            have = torch.cuda.get_device_name(device)
            raise CheckpointError(f"to_semi_structured_: needs compute capability 8.0 (Ampere), got {have}")
    kernel = "cuSPARSELt" if torch.backends.cusparselt.is_available() else "CUTLASS"
    kind = KINDS[kernel]
    layers = [layer for layer in check_semi_structured(model) if layer.why_not[kernel] is None]
    if not layers:
        raise CheckpointError(
            f"to_semi_structured_: no Linear layer fits {kernel}; check_semi_structured(model) says why"
        )
    for layer in layers:
        module = model.get_submodule(layer.name)
        weight = kind.from_dense(module.get_parameter("weight").detach().contiguous())
        module.register_parameter("weight", nn.Parameter(weight, requires_grad=False))
    return [layer.name for layer in layers]
