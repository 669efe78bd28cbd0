"""What a plan leaves of each layer, and why the rest stays. As text, plain data, JSON and a picture."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pruning_core.checkpoint import write_atomically
from pruning_core.graph import ChannelGraph, Plan
from pruning_core.graph.labels import Axis

Removed = Mapping[str, Iterable[int]]
LONGEST = 60


@dataclass(frozen=True)
class LayerRow:
    """One weight's output channels. ``stays`` says how many can never go, and the commonest reason."""

    name: str
    shape: tuple[int, ...]
    channels: int
    kept: int
    stays: int
    why: str


@dataclass(frozen=True)
class GroupRow:
    """Channels that go together: how many there are and stay, and the weights that they run through."""

    name: str
    channels: int
    kept: int
    weights: tuple[str, ...]


@dataclass(frozen=True)
class ChannelReport:
    """``ChannelReport.of(graph, plan)``; ``print`` it, or ``to_dict``, ``save_json``, ``plot``."""

    layers: tuple[LayerRow, ...]
    groups: tuple[GroupRow, ...]
    params: tuple[int, int]
    macs: tuple[int, int]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, graph: ChannelGraph, plan: Plan | None = None) -> ChannelReport:
        removed: Removed = plan.channels if plan is not None else {}
        return cls(
            tuple(_layers(graph, removed)),
            tuple(_groups(graph, removed)),
            (graph.params(), graph.params(removed)),
            (graph.macs(), graph.macs(removed)),
            (*graph.notes, *_untraced(graph)),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def save_json(self, path: str | Path) -> None:
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        write_atomically(path, lambda file: file.write(text.encode()))

    def __str__(self) -> str:
        rows = [("layer", "shape", "channels", "kept", "stays because")]
        for row in self.layers:
            because = f"{row.stays}: {row.why}" if row.stays else ""
            rows.append((row.name, "x".join(map(str, row.shape)), str(row.channels), str(row.kept), because[:LONGEST]))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            f"{name:<{widths[0]}}  {shape:<{widths[1]}}  {channels:>{widths[2]}}  {kept:>{widths[3]}}  {why}".rstrip()
            for name, shape, channels, kept, why in rows
        ]
        free = sum(group.channels for group in self.groups)
        lines.append(f"{free:,} channels in {len(self.groups)} groups can go")
        for what, (before, after) in (("parameters", self.params), ("multiply-adds", self.macs)):
            lines.append(f"{what}: {before:,} -> {after:,}, {after / max(before, 1):.1%} are left")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def plot(self, path: str | Path) -> None:
        """A bar per layer: the channels that are kept, over those that there were."""
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("plot: needs matplotlib; pip install matplotlib") from error

        rows = self.layers
        figure = Figure(figsize=(8, min(1.6 + 0.2 * len(rows), 500)), layout="constrained")
        axes = figure.subplots()
        places = range(len(rows))
        axes.barh(places, [row.channels for row in rows], color="0.9", height=0.8, label="before")
        axes.barh(places, [row.kept for row in rows], color="C0", height=0.8, label="kept")
        axes.barh(places, [min(row.stays, row.kept) for row in rows], color="C1", height=0.8, label="cannot go")
        axes.set_yticks(places, [row.name for row in rows], fontsize=7)
        axes.set_ylim(max(len(rows), 1) - 0.4, -0.6)
        axes.set_xlabel("output channels", fontsize=8)
        axes.tick_params(length=0, labelsize=7)
        axes.spines[:].set_visible(False)
        share = self.params[1] / max(self.params[0], 1), self.macs[1] / max(self.macs[0], 1)
        axes.set_title(f"{share[0]:.1%} of parameters and {share[1]:.1%} of multiply-adds are left", fontsize=10)
        figure.legend(loc="outside lower left", ncols=3, fontsize=7, frameon=False)
        kind = Path(path).suffix.lstrip(".").lower() or "png"
        write_atomically(path, lambda file: figure.savefig(file, format=kind, dpi=120))


def _layers(graph: ChannelGraph, removed: Removed) -> Iterable[LayerRow]:
    dead, free = graph.dead(removed), {axis for group in graph.groups.values() for axis in group.axes}
    why: dict[Axis, list[tuple[int, str]]] = {}
    for axis, count, reason in graph.frozen():
        why.setdefault(axis, []).append((count, reason))
    for name, tensor in graph.stored.names.items():
        outputs = [axis for axis in _axes(graph, name) if axis not in graph.consumers]
        if tensor.dim() < 2 or name not in graph.parameters or not outputs:
            continue
        axis = next((each for each in outputs if each in free), outputs[0])  # of a table not its rows
        channels = tensor.shape[axis.dim]
        kept = channels - int(dead[graph.labels.axes[axis].numpy()].sum())
        reasons = sorted(why.get(axis, []), reverse=True)
        stays = sum(count for count, _ in reasons)
        yield LayerRow(name, tuple(tensor.shape), channels, kept, stays, reasons[0][1] if reasons else "")


def _axes(graph: ChannelGraph, name: str) -> list[Axis]:
    return [Axis(name, dim) for dim in range(graph.stored.names[name].dim())]


def _groups(graph: ChannelGraph, removed: Removed) -> Iterable[GroupRow]:
    for name, group in graph.groups.items():
        weights = Counter(axis.tensor for axis in group.axes if graph.stored.names[axis.tensor].dim() > 1)
        yield GroupRow(name, len(group), len(group) - len(list(removed.get(name, ()))), tuple(weights))


def _untraced(graph: ChannelGraph) -> list[str]:
    names = graph.untraced()
    if not names:
        return []
    return [f"{len(names)} parameters are used by nothing on these inputs and stay as they are: {', '.join(names[:3])}"]
