"""The state of a pruning run as tensors and plain data, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pruning_core.masks.clock import Clock
from pruning_core.masks.config import WeightPruningConfig
from pruning_core.masks.groups import MaskGroup
from pruning_core.masks.options import PrunerOptions

VERSION = 2


def state_of(config: WeightPruningConfig, clocks: Sequence[Clock], groups: Sequence[MaskGroup]) -> dict[str, Any]:
    """Version, configuration, shard, clocks and, per group, masks (packed bits) and scores."""
    ranks = next((group.ranks for group in groups if group.ranks is not None), None)
    return {
        "version": VERSION,
        "config": config.to_dict(),
        "slice": [0, 1] if ranks is None else [ranks.rank, ranks.size],
        "clocks": [clock.state_dict() for clock in clocks],
        "groups": [group.state_dict() for group in groups],
    }


def load_state(
    state: dict[str, Any], config: WeightPruningConfig, clocks: Sequence[Clock], groups: Sequence[MaskGroup]
) -> None:
    """Restores in place. Checks everything first, so that a state that does not fit changes nothing."""
    check(state, config, clocks, groups)
    for clock, each in zip(clocks, state["clocks"], strict=True):
        clock.load_state_dict(each)
    for group, each in zip(groups, state["groups"], strict=True):
        group.load_state_dict(each)


def check(
    state: dict[str, Any], config: WeightPruningConfig, clocks: Sequence[Clock], groups: Sequence[MaskGroup]
) -> None:
    """ValueError for a state of another version, configuration, model, sharding or number of optimizers."""
    if not isinstance(state, dict) or not {"version", "config", "clocks", "groups", "slice"} <= state.keys():
        raise ValueError("load_state_dict: not the state of a pruner; pass what pruner.state_dict() gave")
    if state["version"] != VERSION:
        how = "use the pruning_core that wrote it"
        raise ValueError(f"load_state_dict: version {VERSION} is read here, got {state['version']}; {how}")
    _check_config(state["config"]["pruning_configs"], config.to_dict()["pruning_configs"])
    ranks = next((group.ranks for group in groups if group.ranks is not None), None)
    here = [0, 1] if ranks is None else [ranks.rank, ranks.size]
    if list(state["slice"]) != here:
        raise ValueError(
            f"load_state_dict: the state is of slice {state['slice'][0]} of {state['slice'][1]}, got rank {here[0]} of "
            f"{here[1]}; under fully_shard each rank loads its own state, on as many ranks as before"
        )
    if len(state["clocks"]) != len(clocks):
        raise ValueError(
            f"load_state_dict: the state is of {len(state['clocks'])} optimizers, got {len(clocks)}; attach the same"
        )
    for group, each in zip(groups, state["groups"], strict=True):
        _check_weights(group, each["weights"])


def _check_config(then: list[dict[str, Any]], now: list[dict[str, Any]]) -> None:
    if len(then) != len(now):
        raise ValueError(f"load_state_dict: the state is of {len(then)} pruners, got {len(now)}; use its configuration")
    for i, (old, new) in enumerate(zip(then, now, strict=True)):
        for option in new:
            if old.get(option, PrunerOptions.model_fields[option].default) != new[option]:
                raise ValueError(
                    f"load_state_dict: the state is of another configuration: pruning_configs[{i}].{option} was "
                    f"{old.get(option)!r}, got {new[option]!r}; continue with the old value"
                )


def _check_weights(group: MaskGroup, states: dict[str, Any]) -> None:
    names = {weight.target.name for weight in group.weights}
    if names != states.keys():
        odd = sorted(names ^ states.keys())[0]
        raise ValueError(f"load_state_dict: the state is of another model: {odd} is on one side only")
    for weight in group.weights:
        shape = states[weight.target.name]["shape"]
        if list(shape) != list(weight.shape):
            raise ValueError(
                f"load_state_dict: {weight.target.name} had shape {list(shape)}, got {list(weight.shape)}; "
                "load the model that the state was saved with"
            )
