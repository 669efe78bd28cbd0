"""What a plan leaves of each layer, and what is frozen, as text, JSON and a chart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from pruning_core.channels.options import frozen_weights
from pruning_core.criteria import CRITERIA
from pruning_core.graph import ChannelGraph, Plan
from pruning_core.graph.couple.groups import Removed
from pruning_core.graph.trace.labels import Axis
from pruning_core.report import Bars, Report, text_table

COLUMNS = ("layer", "shape", "channels", "kept", "frozen")
LONGEST = 60


@dataclass(frozen=True)
class LayerChannels:
    """One weight's output channels. ``stays``: how many are frozen, and ``why``: the most frequent reason."""

    name: str
    shape: tuple[int, ...]
    channels: int
    kept: int
    stays: int
    why: str


@dataclass(frozen=True)
class GroupChannels:
    """A group: its number of channels, how many are kept, and the weights along its axes."""

    name: str
    channels: int
    kept: int
    weights: tuple[str, ...]


@dataclass(frozen=True)
class ChannelReport(Report):
    """``ChannelReport.of(graph, plan)``; ``print`` it, or ``to_dict``, ``save_json``, ``save_markdown``, ``plot``.

    ``params`` and ``macs``: before and after.
    """

    layers: tuple[LayerChannels, ...]
    groups: tuple[GroupChannels, ...]
    params: tuple[int, int]
    macs: tuple[int, int]
    notes: tuple[str, ...]

    title = "Channel report"

    @classmethod
    def of(cls, graph: ChannelGraph, plan: Plan | None = None) -> ChannelReport:
        """The report of a plan, or of a graph that nothing is removed from."""
        removed: Removed = plan.channels if plan is not None else {}
        return cls(
            tuple(_layers(graph, removed)),
            tuple(_groups(graph, removed)),
            (graph.params(), graph.params(removed)),
            (graph.macs(), graph.macs(removed)),
            (*graph.notes, *_untraced(graph), *_ranked(plan), *(plan.notes if plan is not None else ())),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        rows = []
        for row in self.layers:
            because = f"{row.stays}: {row.why}" if row.stays else ""
            shape = "x".join(map(str, row.shape))
            rows.append((row.name, shape, str(row.channels), str(row.kept), because[:LONGEST]))
        free = sum(group.channels for group in self.groups)
        lines = [
            text_table(COLUMNS, rows, right=("channels", "kept")),
            f"{free:,} channels in {len(self.groups)} groups can be removed",
        ]
        for what, (before, after) in (("parameters", self.params), ("multiply-adds", self.macs)):
            lines.append(f"{what}: {before:,} -> {after:,}, {after / max(before, 1):.1%} are left")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def draw(self, bars: Bars) -> None:
        """Bars of kept over original channels."""
        share = self.params[1] / max(self.params[0], 1), self.macs[1] / max(self.macs[0], 1)
        bars.names, bars.xlabel = [row.name for row in self.layers], "output channels"
        bars.heading = f"{share[0]:.1%} of parameters and {share[1]:.1%} of multiply-adds are left"
        bars.add(0, [row.channels for row in self.layers], "0.9", "before")
        bars.add(0, [row.kept for row in self.layers], "C0", "kept")
        bars.add(0, [min(row.stays, row.kept) for row in self.layers], "C1", "frozen")


def _layers(graph: ChannelGraph, removed: Removed) -> Iterable[LayerChannels]:
    dead, free = graph.dead(removed), {axis: group for group in graph.groups.values() for axis in group.axes}
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
        frozen = frozen_weights(graph, free[axis]) if axis in free else []
        if frozen and kept == channels:
            reasons = [(channels, f"{frozen[0]} requires no gradient")]
        stays = sum(count for count, _ in reasons)
        yield LayerChannels(name, tuple(tensor.shape), channels, kept, stays, reasons[0][1] if reasons else "")


def _axes(graph: ChannelGraph, name: str) -> list[Axis]:
    return [Axis(name, dim) for dim in range(graph.stored.names[name].dim())]


def _groups(graph: ChannelGraph, removed: Removed) -> Iterable[GroupChannels]:
    for name, group in graph.groups.items():
        weights = Counter(axis.tensor for axis in group.axes if graph.stored.names[axis.tensor].dim() > 1)
        yield GroupChannels(name, len(group), len(group) - len(list(removed.get(name, ()))), tuple(weights))


def _ranked(plan: Plan | None) -> list[str]:
    """What sees no data ranks hardly better than chance where layers are thin."""
    criterion = CRITERIA[plan.criterion] if plan is not None and plan.criterion in CRITERIA else None
    if plan is None or criterion is None or criterion.needs_gradient or criterion.needs.startswith("the activations"):
        return []
    return [f"ranked by {plan.criterion}, which sees no data and is weak; give batches= and to_loss="]


def _untraced(graph: ChannelGraph) -> list[str]:
    names = graph.untraced()
    if not names:
        return []
    return [f"{len(names)} parameters are not used on these inputs and stay unchanged: {', '.join(names[:3])}"]
