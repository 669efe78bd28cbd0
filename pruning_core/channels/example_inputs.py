"""Example inputs for a trace, where the user gave none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pruning_core.graph import GraphError
from pruning_core.graph.inputs import Inputs, untouched

BATCH = 2
SIZES = {1: (64, 256), 2: (64, 224, 32, 28, 128, 256), 3: (16, 32)}
LENGTH = 8


@dataclass(frozen=True)
class Like:
    """Shape, dtype and device of a float tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def made(self) -> Tensor:
        """Random numbers of this shape, with a fixed seed."""
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.shape, generator=generator).to(self.device, self.dtype)


class Seen:
    """A forward hook that records the first inputs of a model: of float tensors the shape, anything else as it is.

    A class, not a closure: models with it can be copied and pickled.
    """

    def __init__(self) -> None:
        self.inputs: Any = None

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.inputs is None:
            self.inputs = pytree.tree_map_only(Tensor, _remembered, (tuple(args), dict(kwargs)))


def _remembered(tensor: Tensor) -> Any:
    if tensor.is_floating_point():
        return Like(tuple(tensor.shape), tensor.dtype, tensor.device)
    return tensor.detach().clone()


def example_for(model: nn.Module, seen: Seen | None) -> Inputs:
    """The recorded inputs, else a guess by the first layer; verified by a run."""
    error = ""
    for inputs in _candidates(model, seen):
        try:
            with untouched(model), torch.inference_mode():
                model(*inputs[0], **inputs[1])
            return inputs
        except Exception as problem:
            error = error or f"{type(problem).__name__}: {problem}".partition("\n")[0][:200]
    raise GraphError(
        f"example_inputs: could not be guessed for {type(model).__name__}, got "
        f"{error or 'no layer that says what it takes'}; run the model once before prune(), or give it example_inputs"
    )


def _candidates(model: nn.Module, seen: Seen | None) -> Iterator[Inputs]:
    if seen is not None and seen.inputs is not None:
        small = pytree.tree_map(_few(seen.inputs), seen.inputs)
        for inputs in (small, seen.inputs):
            yield pytree.tree_map_only(Like, Like.made, inputs)
    yield from (((each,), {}) for module in model.modules() for each in _guesses(module))


def _few(inputs: Any) -> Any:
    """Cuts a batch short, if all tensors begin with one and the same size: a trace needs no more."""
    shapes = [tuple(leaf.shape) for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, (Tensor, Like))]
    sizes = {shape[:1] for shape in shapes}
    short = len(sizes) == 1 and next(iter(sizes)) > (BATCH,)

    def few(leaf: Any) -> Any:
        if short and isinstance(leaf, Like):
            return Like((BATCH, *leaf.shape[1:]), leaf.dtype, leaf.device)
        return leaf[:BATCH] if short and isinstance(leaf, Tensor) else leaf

    return few


def _guesses(module: nn.Module) -> list[Tensor]:
    """Inputs that a layer takes; those of a model are often those of its first layer."""
    weight = next(module.parameters(recurse=False), None)
    if weight is None:
        return []
    shapes: list[tuple[int, ...]] = []
    if isinstance(module, nn.Linear):
        shapes = [(BATCH, module.in_features), (BATCH, LENGTH, module.in_features)]
    elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        spatial = len(module.kernel_size)
        shapes = [(BATCH, module.in_channels, *[size] * spatial) for size in SIZES[spatial]]
    elif isinstance(module, nn.RNNBase):
        shapes = [(BATCH, LENGTH, module.input_size)]
    elif isinstance(module, nn.Embedding):
        return [torch.zeros(BATCH, LENGTH, dtype=torch.long, device=weight.device)]
    return [Like(shape, weight.dtype, weight.device).made() for shape in shapes]
