"""The structure of a cut model: plain data to cut a fresh dense model alike, or to pad a state dict back."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pruning_core.checkpoint import METHOD
from pruning_core.graph.cut.attributes import like
from pruning_core.graph.cut.configuration import configuration, configure
from pruning_core.graph.cut.slicing import cut_parameters
from pruning_core.graph.errors import GraphError
from pruning_core.graph.plan import Plan, indices, ranges
from pruning_core.graph.trace.labels import Axis

FORMAT, VERSION = "pruning_core.slim", 1
ATTRIBUTE = "_pruning_core_structure"


def remember(model: nn.Module, plan: Plan, attributes: Mapping[str, Mapping[str, Any]]) -> None:
    """Adds one cut to the model's structure, in indices of the dense model.

    A transformers model says it in its config as well: so ``save_pretrained`` writes it, and ``from_pretrained`` finds
    it, where ``pruning_core`` is imported; where it is not, the shapes do not fit and it refuses. A cut that numbers of
    the config say needs none of that: what the config builds is then dense, and later cuts are told from there.
    """
    said = configuration(model)
    told = getattr(said, "quantization_config", None) or {}
    model.__dict__[ATTRIBUTE] = _with(structure(model), model, plan, attributes)
    if said is not None and plan.removed and not plan.configuration:
        said.quantization_config = {
            "quant_method": METHOD,
            "slim": _with(told.get("slim") if isinstance(told, Mapping) else None, model, plan, attributes),
        }


def _with(
    told: Mapping[str, Any] | None, model: nn.Module, plan: Plan, attributes: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    known: dict[str, Any] = (
        copy.deepcopy(dict(told))
        if told
        else {
            "format": FORMAT,
            "version": VERSION,
            "model": plan.model,
            "kept": {},
            "attributes": {},
        }
    )
    for axis in plan.removed:
        name = str(axis)
        entry = known["kept"].get(name, {"size": plan.sizes[axis], "at": [[0, plan.sizes[axis] - 1]]})
        before = np.array(indices(entry["at"]))
        known["kept"][name] = {"size": entry["size"], "at": ranges(before[plan.kept(axis)])}
    for path, values in attributes.items():
        known["attributes"].setdefault(path, {}).update(
            {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        )
    first = {id(each): name for name, each in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    known["tied"] = {name: first[id(each)] for name, each in every if first[id(each)] != name}
    if plan.configuration and (not told or "configuration" in told):
        known["configuration"] = {**known.get("configuration", {}), **plan.configuration}
    else:
        known.pop("configuration", None)
    return known


def keep_structure(model: nn.Module, found: dict[str, Any]) -> None:
    """Of a model that its config builds dense: the config says it in numbers, or carries the structure."""
    model.__dict__[ATTRIBUTE] = found
    config = configuration(model)
    if config is not None and found.get("configuration"):
        configure(model, found["configuration"])
    elif config is not None:
        config.quantization_config = {"quant_method": METHOD, "slim": found}


def structure(model: nn.Module) -> dict[str, Any] | None:
    """Plain data (JSON) to cut a fresh dense model like this one; None for a model that was never cut."""
    return model.__dict__.get(ATTRIBUTE)


def apply_structure(model: nn.Module, found: Mapping[str, Any]) -> None:
    """Cuts a fresh dense model in place by ``structure``, without a trace; weights keep the values at kept indices."""
    if found.get("format") != FORMAT or found.get("version") != VERSION:
        raise GraphError(
            f"structure: is none of version {VERSION}, got format {found.get('format')!r} "
            f"version {found.get('version')!r}; give what structure(model) gave"
        )
    plan = _plan(found)
    plan.check(model)
    cut_parameters(model, plan)
    modules = dict(model.named_modules())
    for path, values in found["attributes"].items():
        if path not in modules:
            raise GraphError(f"structure: names a module that the model lacks, got {path!r}; build the same model")
        for name, value in values.items():
            setattr(modules[path], name, like(getattr(modules[path], name), value) if type(value) is list else value)
    keep_structure(model, dict(found))


def expanded(state: Mapping[str, Tensor], found: Mapping[str, Any]) -> dict[str, Tensor]:
    """A slim state dict padded with zeros to the dense shapes."""
    full = dict(state)
    for name, entry in found["kept"].items():
        axis = Axis.parse(name)
        if axis.tensor not in full:
            continue
        value = full[axis.tensor]
        shape = list(value.shape)
        shape[axis.dim] = entry["size"]
        padded = torch.zeros(shape, dtype=value.dtype, device=value.device)
        full[axis.tensor] = padded.index_copy(axis.dim, torch.tensor(indices(entry["at"]), device=value.device), value)
    return {name: full.get(found["tied"].get(name, name), value) for name, value in full.items()}


def _plan(found: Mapping[str, Any]) -> Plan:
    sizes, removed = {}, {}
    for name, entry in found["kept"].items():
        axis = Axis.parse(name)
        kept = set(indices(entry["at"]))
        sizes[axis] = int(entry["size"])
        removed[axis] = tuple(index for index in range(sizes[axis]) if index not in kept)
    return Plan(sizes=sizes, removed=removed, model=str(found.get("model", "")))
