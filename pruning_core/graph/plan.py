"""A plan: what is to be removed, as plain data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from pruning_core.checkpoint import write_atomically
from pruning_core.graph.labels import Axis
from pruning_core.graph.tracing import GraphError

FORMAT, VERSION = "pruning_core.channel_plan", 1


@dataclass(frozen=True)
class Plan:
    """Which indices of which axes go. ``consumers`` read what is removed; ``norms`` take statistics over it;
    ``narrow_heads`` says how the graph looked at attention; ``multiplied`` names the operations that sum removed
    channels of one activation times those of another."""

    sizes: dict[Axis, int]
    removed: dict[Axis, tuple[int, ...]]
    channels: dict[str, tuple[int, ...]]
    consumers: frozenset[Axis] = frozenset()
    norms: frozenset[str] = frozenset()
    model: str = ""
    narrow_heads: bool = False
    multiplied: frozenset[str] = frozenset()

    def kept(self, axis: Axis) -> list[int]:
        gone = set(self.removed.get(axis, ()))
        return [index for index in range(self.sizes[axis]) if index not in gone]

    def __bool__(self) -> bool:
        return bool(self.removed)

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "axes": {str(axis): {"size": self.sizes[axis], "removed": ranges(at)} for axis, at in _named(self.removed)},
            "channels": {name: ranges(at) for name, at in sorted(self.channels.items())},
            "consumers": sorted(map(str, self.consumers)),
            "norms": sorted(self.norms),
            "narrow_heads": self.narrow_heads,
            "multiplied": sorted(self.multiplied),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        data = data if isinstance(data, Mapping) else {}
        if data.get("format") != FORMAT or data.get("version") != VERSION:
            raise GraphError(
                f"plan: is no channel plan of version {VERSION}, got format {data.get('format')!r} "
                f"version {data.get('version')!r}; write it with plan.save()"
            )
        try:
            axes = {Axis.parse(name): each for name, each in data["axes"].items()}
            return cls(
                {axis: int(each["size"]) for axis, each in axes.items()},
                {axis: tuple(indices(each["removed"])) for axis, each in axes.items()},
                {name: tuple(indices(at)) for name, at in data["channels"].items()},
                frozenset(Axis.parse(name) for name in data["consumers"]),
                frozenset(data["norms"]),
                str(data["model"]),
                bool(data.get("narrow_heads", False)),
                frozenset(data.get("multiplied", ())),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise GraphError(f"plan: is damaged, got {type(error).__name__}: {error}; make it again") from error

    def save(self, path: str | Path) -> None:
        text = json.dumps(self.to_dict(), indent=1)
        write_atomically(path, lambda file: file.write(text.encode()))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        try:
            data = json.loads(Path(path).read_text())
        except ValueError as error:
            raise GraphError(f"{path}: is no JSON, got {error}; give a file written by plan.save()") from error
        return cls.from_dict(data)

    def difference(self, other: Plan) -> dict[str, tuple[int, int]]:
        """Group by group how many channels go in this plan and in the other, where they differ."""
        names = sorted(self.channels.keys() | other.channels.keys())
        pairs = {name: (self.channels.get(name, ()), other.channels.get(name, ())) for name in names}
        return {name: (len(a), len(b)) for name, (a, b) in pairs.items() if set(a) != set(b)}

    def check(self, model: nn.Module) -> None:
        tensors = named_tensors(model)
        for axis, size in self.sizes.items():
            if axis.tensor not in tensors:
                raise GraphError(
                    f"plan: names a layer that the model lacks, got {axis.tensor!r}; make it for this model"
                )
            shape = tuple(tensors[axis.tensor].shape)
            if axis.dim >= len(shape) or shape[axis.dim] != size:
                raise GraphError(
                    f"plan: is for another model: {axis.tensor} has shape {shape}, the plan wants {size} at "
                    f"dimension {axis.dim}; make it for this model"
                )
            if any(not 0 <= index < size for index in self.removed[axis]):
                raise GraphError(f"plan: {axis} removes an index that is not there; make it again")
            if len(set(self.removed[axis])) == size:
                raise GraphError(
                    f"plan: {axis} removes all of its {size} indices, of which one must stay; make it again"
                )


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def digest(model: nn.Module) -> str:
    """Names and shapes in sixteen letters."""
    text = json.dumps(sorted((name, list(tensor.shape)) for name, tensor in named_tensors(model).items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def ranges(at: Iterable[int]) -> list[list[int]]:
    """[0, 1, 2, 7] is [[0, 2], [7, 7]]: removed channels often lie together."""
    found = np.array(sorted(at), dtype=int)
    if not len(found):
        return []
    breaks = np.flatnonzero(np.diff(found) != 1)
    starts, ends = found[np.r_[0, breaks + 1]], found[np.r_[breaks, len(found) - 1]]
    return [[int(a), int(b)] for a, b in zip(starts, ends, strict=True)]


def indices(pairs: Iterable[Iterable[int]]) -> list[int]:
    return [index for first, last in pairs for index in range(int(first), int(last) + 1)]


def _named(removed: Mapping[Axis, Any]) -> list[tuple[Any, Any]]:
    return sorted(removed.items(), key=lambda each: str(each[0]))
