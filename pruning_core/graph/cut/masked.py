"""``masked_``: a dense, trainable model that computes what the cut one will."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from pruning_core.graph.errors import GraphError
from pruning_core.graph.plan import Plan, named_tensors
from pruning_core.graph.trace.labels import Axis
from pruning_core.graph.wrappers import unwrapped

HOOKS = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")


@dataclass
class Masked:
    """A model under ``masked_``; ``undo()`` restores the zeroed weights and keeps all others as trained."""

    before: list[tuple[Tensor, int, Tensor, Tensor]] = field(default_factory=list)
    hooks: list[Any] = field(default_factory=list)

    def undo(self) -> None:
        """Removes the hooks and restores the zeroed weights."""
        for hook in self.hooks:
            hook.remove()
        with torch.no_grad():
            for tensor, dim, at, values in reversed(self.before):
                tensor.index_copy_(dim, at, values)
        self.before, self.hooks = [], []


def masked_(model: nn.Module, plan: Plan) -> Masked:
    """Zeroes the consumers of removed channels, and takes norm statistics over the kept channels.

    No tensor becomes smaller. In evaluation mode the outputs are those of the model after ``slim_``; in training mode
    too, where no dropout draws numbers, and so are the gradients of everything that is kept.
    """
    model = unwrapped(model)
    plan.check(model)
    if plan.multiplied:
        where = min(plan.multiplied)
        raise GraphError(
            f"{where}: multiplies removed channels with each other, which masks in place cannot follow; use slim_, "
            "which checks itself"
        )
    modules = dict(model.named_modules())
    tensors, done = named_tensors(model), Masked()
    names = {id(tensor): name for name, tensor in tensors.items()}  # a tied weight has the name of the first
    norms = {path: kept for path in sorted(plan.norms) if (kept := _kept(modules, names, path, plan)) is not None}
    with torch.no_grad():
        for axis in sorted(plan.consumers, key=str):
            tensor = tensors[axis.tensor]
            at = torch.tensor(plan.removed[axis], device=tensor.device)
            done.before.append((tensor, axis.dim, at, tensor.index_select(axis.dim, at).clone()))
            tensor.index_fill_(axis.dim, at, 0)
    for path, kept in norms.items():
        hook = _over_kept(path, plan.norms[path], kept)
        done.hooks.append(modules[path].register_forward_hook(hook, with_kwargs=True))
    return done


def _kept(modules: dict[str, nn.Module], names: dict[int, str], path: str, plan: Plan) -> Tensor | None:
    """The channels that a norm keeps, from its own parameters; None where it loses none."""
    if path not in modules:
        raise GraphError(f"plan: names a norm that the model lacks, got {path!r}; make it for this model")
    own = list(modules[path].parameters(recurse=False))
    vectors = all(each.dim() == 1 for each in own) and len(own) == len(list(modules[path].parameters()))
    removed = [axis for each in own if (axis := Axis(names[id(each)], 0)) in plan.removed]
    if vectors and removed and plan.norms[path] is not None:
        return torch.from_numpy(plan.kept(removed[0]))
    if vectors and own and not removed:
        return None
    raise GraphError(
        f"{path or 'the model'}: takes statistics over channels outside of a norm with a weight, which masks in place "
        "cannot follow; use slim_, which checks itself"
    )


def _over_kept(path: str, dim: int | None, kept: Tensor) -> Any:
    """A hook that runs a norm again, on the kept channels alone."""

    def run_again(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor:
        x = next(each for each in (*args, *kwargs.values()) if isinstance(each, Tensor))
        if not isinstance(output, Tensor) or output.shape != x.shape:
            raise GraphError(
                f"{path}: a norm whose output has another shape than its input, which masks in place cannot follow; "
                "use slim_, which checks itself"
            )
        assert dim is not None
        at, count = kept.to(x.device), x.shape[dim]

        def narrowed(each: Any) -> Any:
            channels = isinstance(each, Tensor) and each.dim() == x.dim() and each.shape[dim] == count
            return each.index_select(dim, at) if channels else each

        own = {name: value[at] for name, value in module.named_parameters(recurse=False)}
        part = functional_call(_narrow(module, len(at)), own, *tree_map(narrowed, (args, kwargs)))
        return torch.zeros_like(output).index_copy(dim, at, part.to(output.dtype))

    return run_again


def _narrow(module: nn.Module, channels: int) -> nn.Module:
    """The norm for fewer channels, with the parameters of the module and without the hooks, one of which calls it."""
    narrow: Any = module.__class__.__new__(module.__class__)
    narrow.__dict__.update({name: {} if name.endswith(HOOKS) else value for name, value in vars(module).items()})
    if isinstance(module, nn.GroupNorm):
        narrow.num_groups = channels if module.num_groups == module.num_channels else module.num_groups
        narrow.num_channels = channels
    elif hasattr(module, "normalized_shape"):
        narrow.normalized_shape = (channels,)
    assert isinstance(narrow, nn.Module)
    return narrow
