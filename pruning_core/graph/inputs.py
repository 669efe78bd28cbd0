"""Example inputs, running a model without side effects, and giving a tensor other data."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def as_inputs(example: Any) -> Inputs:
    """``(args, kwargs)``: a tensor or list is the one argument, a tuple the arguments, a mapping the keywords."""
    if (
        isinstance(example, tuple)
        and len(example) == 2
        and isinstance(example[0], tuple)
        and isinstance(example[1], dict)
    ):
        return example
    if isinstance(example, tuple):
        return example, {}
    if isinstance(example, Mapping) and all(isinstance(key, str) for key in example):
        return (), dict(example)
    return (example,), {}


def leaves(output: Any) -> list[Tensor]:
    """All tensors of an output: of tuples, dicts, and of plain objects that hold them."""
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif isinstance(leaf, Mapping):
            found += leaves(dict(leaf))
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, nn.Module):
            found += [each for each in vars(leaf).values() if isinstance(each, Tensor)]
    return found


def flat(value: Any) -> list[Any]:
    """What an operation takes or gives, in order; it knows no containers but lists, tuples and dicts."""
    if isinstance(value, (list, tuple)):
        return [leaf for each in value for leaf in flat(each)]
    return flat(list(value.values())) if isinstance(value, dict) else [value]


def mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """The same containers with changed contents."""
    if isinstance(value, (list, tuple)):
        found = [mapped(change, each) for each in value]
        return found if isinstance(value, list) else tuple(found)
    if isinstance(value, dict):
        return {name: mapped(change, each) for name, each in value.items()}
    return change(value)


@contextlib.contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Restores buffers at exit: running statistics do not change."""
    values = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in values:
                if buffer.shape == value.shape and not torch.equal(buffer, value):
                    buffer.copy_(value)


@contextlib.contextmanager
def untouched(model: nn.Module, training: bool = False) -> Iterator[None]:
    """Restores modes, buffers, cached attributes and random state at exit. Batch norms do not update inside."""
    modes = [(module, module.training) for module in model.modules()]
    attributes = [(module, dict(module.__dict__), dict(module._buffers)) for module in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    model.train(training)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    try:
        with buffers_kept(model), torch.random.fork_rng(enabled=True):
            torch.manual_seed(0)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, before, buffers in attributes:
            _restore(module, before, buffers)
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Python's garbage collector waits: one pass over all that a process has imported takes as long as a model's."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def put(tensor: Tensor, data: Tensor) -> None:
    """Gives a tensor other data, of any shape. Autograd remembers a leaf's shape for as long as some graph of it lives
    (the last loss that a loop still holds), and forgets it only when the type changes as well."""
    if tensor.requires_grad and tensor.is_leaf and tensor.shape != data.shape:
        other = torch.float16 if data.dtype != torch.float16 else torch.float32
        tensor.data = torch.empty(0, dtype=other, device=data.device)
    tensor.data = data


def _restore(module: nn.Module, before: dict[str, Any], buffers: dict[str, Any]) -> None:
    """Removes what a forward pass cached: tensors of inference mode cannot be trained with."""
    for name in module.__dict__.keys() - before.keys():
        del module.__dict__[name]
    for name, value in before.items():
        if module.__dict__.get(name) is not value:
            module.__dict__[name] = value
    module._buffers.update(buffers)
