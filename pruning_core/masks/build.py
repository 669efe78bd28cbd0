"""Builds the groups of masked weights from a configuration and a model, and finds the optimizers that step them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from pruning_core.masks.config import WeightPruningConfig
from pruning_core.masks.groups import MaskGroup
from pruning_core.masks.options import LOCK, PrunerOptions
from pruning_core.masks.pattern_lock import LockedGroup
from pruning_core.masks.progressive import ProgressiveGroup
from pruning_core.masks.sharding import local
from pruning_core.masks.weight import MaskedWeight
from pruning_core.selection import Selector, Skipped, Target, kind_of

KINDS: dict[str, type[MaskGroup]] = {"basic": MaskGroup, "progressive": ProgressiveGroup, LOCK: LockedGroup}


def build_groups(config: WeightPruningConfig, model: nn.Module) -> list[MaskGroup]:
    """One group per pruner. A weight belongs to the first pruner that selects it."""
    taken: dict[int, str] = {}
    return [_build(f"pruning_configs[{i}]", options, model, taken) for i, options in enumerate(config.pruners)]


def _build(where: str, options: PrunerOptions, model: nn.Module, taken: dict[int, str]) -> MaskGroup:
    excluded = [*options.excluded_op_names, *options.extra_excluded_op_names]
    selector = Selector(where, options.op_names, excluded, options.pruning_op_types)
    targets, skipped = selector.select(model)
    weights = []
    for target in targets:
        frozen = _frozen(where, options, selector, target)
        owner = taken.get(id(target.parameter))
        reason = options.parsed_pattern.unfit(target.layout.shape(target.parameter.shape))
        if frozen is not None:
            skipped.append(Skipped(target.layer, kind_of(target.module), frozen))
        elif owner is not None:
            skipped.append(Skipped(target.layer, kind_of(target.module), f"pruned as {owner}"))
        elif reason is not None and options.kind != LOCK:
            selector.skip(target, f"{reason} (pattern {options.pattern})", skipped)
        else:
            weight = MaskedWeight(target, options)
            reason = _indivisible(weight) or _made_elsewhere(target, model)
            if reason is not None:
                selector.skip(target, reason, skipped)
                continue
            taken[id(target.parameter)] = f"{target.name} by {where}"
            _keep_pruned_(target)
            weights.append(weight)
    if not weights:
        reasons = "; ".join(f"{each.layer}: {each.reason}" for each in skipped[:3])
        raise ValueError(f"{where}: no layer is left to prune ({reasons}); change its op_names or exclusions")
    return KINDS[options.kind](where, options, weights, skipped)


def _indivisible(weight: MaskedWeight) -> str | None:
    """A norm that divides by the length of each unit leaves nothing to cut."""
    if weight.target.norm is None or weight.options.kind == LOCK or not weight.indivisible():
        return None
    return f"its norm divides by the length of each unit, which must not be zero (pattern {weight.options.pattern})"


def _made_elsewhere(target: Target, model: nn.Module) -> str | None:
    """Why what a weight is made from cannot be masked: shards have no norm of their own, and ties no mask."""
    if target.norm is None and target.pruned is None:
        return None
    if local(target.parameter) is not target.parameter:
        return "its weight is computed from a sharded parameter"
    names = [name for name, each in model.named_parameters(remove_duplicate=False) if each is target.parameter]
    return None if len(names) == 1 else f"its weight is computed from {names[0]}, which is {names[1]} too"


@torch.no_grad()
def _keep_pruned_(target: Target) -> None:
    """Weights that ``torch.nn.utils.prune`` has masked become zeros: they stay what they are, and go first."""
    if target.pruned is not None:
        target.parameter.mul_(target.pruned)


def _frozen(where: str, options: PrunerOptions, selector: Selector, target: Target) -> str | None:
    """Why a frozen weight takes no part: no gradient would score it, and it could not recover from a cut.

    Zeros are locked in frozen weights too, which may be unfrozen later.
    """
    if target.parameter.requires_grad or options.kind == LOCK:
        return None
    if not selector.names_explicitly(target.layer):
        return "requires no gradient"
    if options.criterion.needs_gradient:
        raise ValueError(
            f"{where}: {target.layer} cannot be pruned: it requires no gradient, and {options.pruning_type} needs one; "
            "take it out of op_names, or choose magnitude"
        )
    return None


def who_steps(groups: Sequence[MaskGroup], optimizers: Sequence[Optimizer]) -> dict[Optimizer, set[int]]:
    """Optimizer -> ids of the pruned weights it holds; weights that none holds go to the first, with a warning."""
    weights = [weight.target for group in groups for weight in group.weights]
    names = {id(target.parameter): target.name for target in weights}
    held = {}
    for optimizer in optimizers:
        params = {id(p) for param_group in optimizer.param_groups for p in param_group["params"]}
        held[optimizer] = params & names.keys()
    if not any(held.values()):
        raise ValueError("attach: the optimizers hold none of the pruned weights; pass the model's own optimizer")
    orphans = names.keys() - set().union(*held.values())
    trained = {target.name for target in weights if target.parameter.requires_grad}
    for orphan in sorted({names[key] for key in orphans} & trained):
        warnings.warn(f"attach: no optimizer holds {orphan}; it is masked but never trained", stacklevel=5)
    next(params for params in held.values() if params).update(orphans)
    return held
