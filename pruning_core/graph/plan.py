"""A plan: which channels are removed, as plain data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from pruning_core.checkpoint import write_atomically
from pruning_core.graph.errors import GraphError
from pruning_core.graph.inputs import Inputs
from pruning_core.graph.trace.labels import Axis
from pruning_core.graph.trace.recorder import Recorder

FORMAT, VERSION = "pruning_core.channel_plan", 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which indices of which axes go, with all that cutting needs to know. Plain data, but for the last two.

    ``sizes`` and ``removed``: per axis its length and the indices that go. ``channels``: the same as group -> channels.
    ``consumers``: axes that read removed channels. ``norms``: modules that take statistics over them, with the
    dimension of their input that these lie on; None where it is not one. ``multiplied``: operations that sum removed
    channels of one activation times those of another. ``narrow_heads`` and ``outputs_may_shrink``: how the graph was
    traced. ``model``: a digest of the model's names and shapes. ``criterion``: what ranked the channels, if anything
    did. ``configuration``: the numbers of a Transformers configuration that say what is left; ``slim_`` changes them.
    ``notes``: what a report should say. ``example``, ``recorded``: what the graph was traced with, and its run; they
    are not saved.
    """

    sizes: dict[Axis, int]
    removed: dict[Axis, tuple[int, ...]]
    channels: dict[str, tuple[int, ...]] = field(default_factory=dict)
    consumers: frozenset[Axis] = frozenset()
    norms: dict[str, int | None] = field(default_factory=dict)
    multiplied: frozenset[str] = frozenset()
    narrow_heads: bool = False
    outputs_may_shrink: bool = False
    model: str = ""
    criterion: str = ""
    configuration: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    example: Inputs | None = field(default=None, compare=False, repr=False)
    recorded: Recorder | None = field(default=None, compare=False, repr=False)

    def kept(self, axis: Axis) -> np.ndarray:
        """The indices of an axis that stay, int64."""
        stays = np.ones(self.sizes[axis], dtype=bool)
        stays[list(self.removed.get(axis, ()))] = False
        return np.flatnonzero(stays)

    def __bool__(self) -> bool:
        return bool(self.removed)

    def to_dict(self) -> dict[str, Any]:
        """Plain data (JSON), without the example; ``Plan.from_dict`` reads it back."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": self.model,
            "axes": {str(axis): {"size": self.sizes[axis], "removed": ranges(at)} for axis, at in _named(self.removed)},
            "channels": {name: ranges(at) for name, at in sorted(self.channels.items())},
            "consumers": sorted(map(str, self.consumers)),
            "norms": dict(sorted(self.norms.items())),
            "narrow_heads": self.narrow_heads,
            "outputs_may_shrink": self.outputs_may_shrink,
            "multiplied": sorted(self.multiplied),
            "criterion": self.criterion,
            "configuration": dict(self.configuration),
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The plan that ``to_dict`` wrote; GraphError for anything else."""
        data = data if isinstance(data, Mapping) else {}
        if data.get("format") != FORMAT or data.get("version") != VERSION:
            raise GraphError(
                f"plan: is no channel plan of version {VERSION}, got format {data.get('format')!r} "
                f"version {data.get('version')!r}; write it with plan.save()"
            )
        try:
            axes = {Axis.parse(name): each for name, each in data["axes"].items()}
            return cls(
                sizes={axis: int(each["size"]) for axis, each in axes.items()},
                removed={axis: tuple(indices(each["removed"])) for axis, each in axes.items()},
                channels={name: tuple(indices(at)) for name, at in data["channels"].items()},
                consumers=frozenset(Axis.parse(name) for name in data["consumers"]),
                norms={str(path): None if dim is None else int(dim) for path, dim in dict(data["norms"]).items()},
                multiplied=frozenset(data.get("multiplied", ())),
                narrow_heads=bool(data.get("narrow_heads", False)),
                outputs_may_shrink=bool(data.get("outputs_may_shrink", False)),
                model=str(data["model"]),
                criterion=str(data.get("criterion", "")),
                configuration={str(name): each for name, each in dict(data.get("configuration", {})).items()},
                notes=tuple(map(str, data.get("notes", ()))),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise GraphError(f"plan: is damaged, got {type(error).__name__}: {error}; make it again") from error

    def save(self, path: str | Path) -> None:
        """Writes JSON, atomically."""
        text = json.dumps(self.to_dict(), indent=1)
        write_atomically(path, lambda file: file.write(text.encode()))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads what ``save`` wrote."""
        try:
            data = json.loads(Path(path).read_text())
        except ValueError as error:
            raise GraphError(f"{path}: is no JSON, got {error}; give a file written by plan.save()") from error
        return cls.from_dict(data)

    def difference(self, other: Plan) -> dict[str, tuple[int, int]]:
        """Per group: how many channels this plan and the other remove, where they differ."""
        names = sorted(self.channels.keys() | other.channels.keys())
        pairs = {name: (self.channels.get(name, ()), other.channels.get(name, ())) for name in names}
        return {name: (len(a), len(b)) for name, (a, b) in pairs.items() if set(a) != set(b)}

    def check(self, model: nn.Module) -> None:
        """GraphError unless the model has every axis of the plan, at its size."""
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
    """Parameters and buffers by name, tied ones once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def digest(model: nn.Module) -> str:
    """A hash of the names and shapes of a model, 16 hexadecimal digits."""
    text = json.dumps(sorted((name, list(tensor.shape)) for name, tensor in named_tensors(model).items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def ranges(at: Iterable[int]) -> list[list[int]]:
    """Sorted indices as closed ranges: [0, 1, 2, 7] -> [[0, 2], [7, 7]]."""
    found = np.sort(np.array(at if isinstance(at, np.ndarray) else list(at), dtype=int))
    if not len(found):
        return []
    breaks = np.flatnonzero(np.diff(found) != 1)
    starts, ends = found[np.r_[0, breaks + 1]], found[np.r_[breaks, len(found) - 1]]
    return np.stack([starts, ends], 1).tolist()


def indices(pairs: Iterable[Iterable[int]]) -> list[int]:
    """The inverse of ``ranges``."""
    return [index for first, last in pairs for index in range(int(first), int(last) + 1)]


def _named(removed: Mapping[Axis, Any]) -> list[tuple[Any, Any]]:
    return sorted(removed.items(), key=lambda each: str(each[0]))
