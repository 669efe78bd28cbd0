"""Takes indices out of parameters, buffers and optimizer states, in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pruning_core.graph.errors import GraphError
from pruning_core.graph.inputs import put
from pruning_core.graph.plan import Plan, named_tensors
from pruning_core.graph.trace.labels import Axis

Before = Mapping[str, tuple[Tensor, Tensor, Tensor | None]]


def laid_out(part: Tensor, whole: Tensor) -> Tensor:
    """``part`` in the memory format of ``whole``."""
    for dims, layout in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if whole.dim() == dims and whole.is_contiguous(memory_format=layout) and not whole.is_contiguous():
            return part.contiguous(memory_format=layout)
    return part


def empty_parameters(model: nn.Module, plan: Plan) -> None:
    """Gives every parameter and buffer of the plan the shape that is left, of zeros that take no memory."""
    tensors = named_tensors(model)
    for name in {axis.tensor for axis in plan.removed}:
        tensor = tensors[name]
        kept = [tensor.shape[dim] - len(plan.removed.get(Axis(name, dim), ())) for dim in range(tensor.dim())]
        put(tensor, tensor.detach().new_zeros(()).expand(kept))


def cut_parameters(model: nn.Module, plan: Plan) -> None:
    """Slices every parameter and buffer of the plan in place, and gradients with them."""
    tensors = named_tensors(model)
    by_tensor: dict[str, list[Axis]] = {}
    for axis in plan.removed:
        by_tensor.setdefault(axis.tensor, []).append(axis)
    for name, axes in by_tensor.items():
        tensor = tensors[name]
        data, grad = tensor.detach(), tensor.grad
        for axis in axes:
            kept = torch.from_numpy(plan.kept(axis)).to(data.device)
            data = data.index_select(axis.dim, kept)
            grad = None if grad is None else grad.index_select(axis.dim, kept)
        tensor.grad = None
        put(tensor, laid_out(data, tensor))
        tensor.grad = None if grad is None else laid_out(grad, tensor)


def check_optimizers(model: nn.Module, optimizers: list[Optimizer]) -> None:
    """GraphError for what is no optimizer of this model: its states would be left behind."""
    own = {id(parameter) for parameter in model.parameters()}
    for each in optimizers:
        if not hasattr(each, "param_groups"):
            raise GraphError(f"optimizer: must be a torch.optim.Optimizer or several, got {type(each).__name__}")
        if not any(id(parameter) in own for group in each.param_groups for parameter in group["params"]):
            raise GraphError(
                f"optimizer: holds none of the model's parameters, got a {type(each).__name__} of another model; give "
                "the one that trains this model"
            )


def cut_optimizer(
    optimizer: Optimizer, before: Before, plan: Plan, model: nn.Module
) -> list[tuple[dict[str, Any], str, Tensor]]:
    """States of a parameter's shape lose what it loses; factored ones (Adafactor's rows and columns) their part. What
    each must become: nothing is changed here."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    changes = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names.get(id(parameter))
            axes = [axis for axis in plan.removed if axis.tensor == name]
            if not axes or parameter not in optimizer.state:
                continue
            assert name is not None
            state = optimizer.state[parameter]
            shape = tuple(before[name][1].shape)
            for key, value in state.items():
                if isinstance(value, Tensor) and value.dim():
                    changes.append((state, key, _cut(f"{name}: {key}", key, value, shape, axes, plan)))
    return changes


def _cut(what: str, key: str, value: Tensor, shape: tuple[int, ...], axes: list[Axis], plan: Plan) -> Tensor:
    dims = _dims(key, tuple(value.shape), shape)
    if dims is None:
        raise GraphError(
            f"optimizer: {what} has shape {tuple(value.shape)}, which does not follow from the parameter's {shape}; "
            "make the optimizer anew after slim_"
        )
    part = value
    for axis in axes:
        if axis.dim in dims:
            at = dims.index(axis.dim)
            if part.shape[at] == plan.sizes[axis]:
                part = part.index_select(at, torch.from_numpy(plan.kept(axis)).to(part.device))
    return laid_out(part.clone() if part._is_view() else part, value)


def _dims(key: str, value: tuple[int, ...], shape: tuple[int, ...]) -> list[int | None] | None:
    """Which of the parameter's dimensions each dimension of a state is."""
    if value == shape:
        return list(range(len(shape)))
    if len(value) == len(shape) and all(mine in (1, whole) for mine, whole in zip(value, shape, strict=True)):
        return [dim if value[dim] == shape[dim] else None for dim in range(len(shape))]
    if key.endswith("row") and value == shape[:-1]:
        return list(range(len(shape) - 1))
    if key.endswith("col") and value == shape[:-2] + shape[-1:]:
        return [*range(len(shape) - 2), len(shape) - 1]
    return None
