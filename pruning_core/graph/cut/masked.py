"""``masked_``: a dense, trainable model that computes what the cut one will."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import group_norm, layer_norm

from pruning_core.graph.errors import GraphError
from pruning_core.graph.plan import Plan, named_tensors
from pruning_core.graph.trace.labels import Axis


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
    plan.check(model)
    if plan.multiplied:
        where = min(plan.multiplied)
        raise GraphError(
            f"{where}: multiplies removed channels with each other, which masks in place cannot follow; use slim_, "
            "which checks itself"
        )
    modules = dict(model.named_modules())
    norms = {path: _kept(modules, path, plan) for path in sorted(plan.norms)}
    tensors, done = named_tensors(model), Masked()
    with torch.no_grad():
        for axis in sorted(plan.consumers, key=str):
            tensor = tensors[axis.tensor]
            at = torch.tensor(plan.removed[axis], device=tensor.device)
            done.before.append((tensor, axis.dim, at, tensor.index_select(axis.dim, at).clone()))
            tensor.index_fill_(axis.dim, at, 0)
    for path, kept in norms.items():
        if kept is not None:
            done.hooks.append(modules[path].register_forward_hook(_over_kept(kept), with_kwargs=True))
    return done


def _kept(modules: dict[str, nn.Module], path: str, plan: Plan) -> Tensor | None:
    """The channels that a norm keeps, from its own parameters; None where it loses none."""
    if path not in modules:
        raise GraphError(f"plan: names a norm that the model lacks, got {path!r}; make it for this model")
    own = dict(modules[path].named_parameters(recurse=False))
    prefix = f"{path}." if path else ""
    for name in own:
        axis = Axis(prefix + name, 0)
        if axis in plan.removed:
            return torch.tensor(plan.kept(axis))
    if own and all(each.dim() == 1 for each in own.values()):
        return None
    raise GraphError(
        f"{path or 'the model'}: takes statistics over channels outside of a norm with a weight, which masks in place "
        "cannot follow; use slim_, which checks itself"
    )


def _over_kept(kept: Tensor) -> Any:
    def run_again(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        x = args[0] if args else next(iter(kwargs.values()))
        at = kept.to(x.device)
        dim = 1 if isinstance(module, nn.GroupNorm) else -1
        part = _norm(module, x.index_select(dim, at), at)
        return torch.zeros_like(output).index_copy(dim, at, part.to(output.dtype))

    return run_again


def _norm(module: nn.Module, x: Tensor, at: Tensor) -> Tensor:
    own = {name: value[at] for name, value in module.named_parameters(recurse=False)}
    if isinstance(module, nn.LayerNorm):
        return layer_norm(x, (len(at),), own.get("weight"), own.get("bias"), module.eps)
    if isinstance(module, nn.RMSNorm):
        return torch.nn.functional.rms_norm(x, (len(at),), own.get("weight"), module.eps)
    if isinstance(module, nn.GroupNorm):
        groups = len(at) if module.num_groups == module.num_channels else module.num_groups
        return group_norm(x, groups, own.get("weight"), own.get("bias"), module.eps)
    return functional_call(_bare(module), own, (x,))


def _bare(module: nn.Module) -> nn.Module:
    """The module without the hook that calls it."""
    bare = module.__class__.__new__(module.__class__)
    bare.__dict__.update({**module.__dict__, "_forward_hooks": {}, "_forward_hooks_with_kwargs": {}})
    return bare
