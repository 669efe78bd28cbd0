"""Runs a model for its labels and leaves it as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from pruning_core.graph.labels import Labels
from pruning_core.graph.recorder import Recorder, Where
from pruning_core.graph.rules import rule_of
from pruning_core.graph.shadows import Stored


class GraphError(ValueError):
    """A model that cannot be traced or cut, or a plan that does not fit it; the message says what and where."""


Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def as_inputs(example: Any) -> Inputs:
    """A tensor or list is the one argument, a tuple the arguments, a mapping the keywords."""
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


@contextlib.contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """Buffers keep their values: a norm learns nothing from a pass that only looks."""
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
    """Modes, buffers, cached attributes and random state are afterwards what they were. Norms do not learn here."""
    modes = [(module, module.training) for module in model.modules()]
    attributes = [(module, dict(module.__dict__), dict(module._buffers)) for module in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    model.train(training)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    try:
        with still(model), torch.random.fork_rng(enabled=True):
            torch.manual_seed(0)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, before, buffers in attributes:
            _restore(module, before, buffers)
        for module, mode in modes:
            module.training = mode


def _restore(module: nn.Module, before: dict[str, Any], buffers: dict[str, Any]) -> None:
    """What a forward pass cached must not stay: tensors of inference mode cannot be trained with."""
    for name in module.__dict__.keys() - before.keys():
        del module.__dict__[name]
    for name, value in before.items():
        if module.__dict__.get(name) is not value:
            module.__dict__[name] = value
    module._buffers.update(buffers)


def record(
    model: nn.Module,
    example: Inputs,
    labels: Labels,
    stored: Stored,
    training: bool,
    made: Callable[..., Recorder],
    outputs_may_shrink: bool = False,
) -> Recorder:
    """One forward pass; its outputs keep their shape, so all channels in them stay, unless they may shrink."""
    args, kwargs = example
    where = Where(model)
    trace = made(labels, stored, rule_of, where)
    where.watch = trace.entered
    try:
        with untouched(model, training), torch.inference_mode(), trace:
            trace.output = model(*args, **kwargs)
        _end(trace, outputs_may_shrink)
    except Exception as error:
        mode = "training" if training else "evaluation"
        raise GraphError(
            f"example_inputs: the model cannot run them in {mode} mode ({_first_line(error)}, "
            f"in {where.now or 'the model itself'}); give inputs that model(...) takes"
        ) from error
    finally:
        where.remove()
    return trace


def _end(trace: Recorder, outputs_may_shrink: bool) -> None:
    trace.labels.here = ""
    for leaf in leaves(trace.output):
        shadow = trace.shadow_of(leaf)
        if outputs_may_shrink and isinstance(shadow, Tensor):  # a parameter as an output always stays
            trace.labels.free(shadow)
        else:
            trace.freeze(shadow, "is an output")


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:300]


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
