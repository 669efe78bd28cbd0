"""What was asked and what was reached, per layer, counted from the weights. As text, plain data, JSON and a picture."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pruning_core.checkpoint import write_atomically


@dataclass(frozen=True)
class LayerRow:
    """One weight. ``asked`` is None where nobody asked for zeros; ``note`` says why a layer was left dense."""

    name: str
    kind: str
    shape: tuple[int, ...]
    weights: int
    zeros: int
    pattern: str | None = None
    asked: float | None = None
    note: str = ""

    @property
    def reached(self) -> float:
        return self.zeros / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class GroupRow:
    """One pruner: its title, what it asks for now and at its end, and its layers."""

    title: str
    target: float
    asked: float
    layers: tuple[LayerRow, ...]

    @property
    def weights(self) -> int:
        return sum(layer.weights for layer in self.layers)

    @property
    def zeros(self) -> int:
        return sum(layer.zeros for layer in self.layers)

    @property
    def reached(self) -> float:
        return self.zeros / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class Report:
    """``print(report)`` for the table; ``to_dict``, ``save_json`` and ``plot`` for the rest."""

    step: int | None
    groups: tuple[GroupRow, ...]
    dense: tuple[LayerRow, ...]
    parameters: int
    zeros: int
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """Zeros among all parameters of the model, biases and embeddings included."""
        return self.zeros / self.parameters if self.parameters else 0.0

    @property
    def reached(self) -> float:
        """Zeros among the weights that take part."""
        weights = sum(group.weights for group in self.groups)
        return sum(group.zeros for group in self.groups) / weights if weights else 0.0

    def to_dict(self) -> dict[str, Any]:
        groups = []
        for group in self.groups:
            layers = [{**asdict(layer), "reached": layer.reached} for layer in group.layers]
            groups.append({**asdict(group), "layers": layers, "reached": group.reached})
        return {
            "step": self.step,
            "sparsity": self.sparsity,
            "parameters": self.parameters,
            "zeros": self.zeros,
            "metrics": _plain(self.metrics),
            "groups": groups,
            "dense": [{**asdict(layer), "reached": layer.reached} for layer in self.dense],
        }

    def save_json(self, path: str | Path) -> None:
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        write_atomically(path, lambda file: file.write(text.encode()))

    def save_markdown(self, path: str | Path) -> None:
        """The table as it is printed, in a code block: it renders everywhere."""
        text = f"# Pruning report\n\n```text\n{self}\n```\n"
        write_atomically(path, lambda file: file.write(text.encode()))

    def __str__(self) -> str:
        lines = [] if self.step is None else [f"step {self.step}"]
        for group in self.groups:
            now = f"asked {group.asked:.2%}"
            if group.asked != group.target:
                now += f" now, {group.target:.2%} at the end"
            zeros = f"{group.zeros:,} of {group.weights:,} weights are zero"
            lines += [group.title, f"  {now}, reached {group.reached:.2%}: {zeros}"]
            lines += _table(group.layers)
        if self.dense:
            lines += ["left dense" if self.groups else "weights", *_table(self.dense)]
        lines.append(f"model: {self.zeros:,} of {self.parameters:,} parameters are zero, {self.sparsity:.2%}")
        if self.metrics:
            lines.append("metric: " + ", ".join(f"{name} {value}" for name, value in self.metrics.items()))
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """A bar per layer: the share of zeros reached, and a line at what was asked of the layer's group."""
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("plot: needs matplotlib; pip install matplotlib") from error

        rows = [layer for group in self.groups for layer in group.layers] + list(self.dense)
        figure = Figure(figsize=(8, min(1.4 + 0.2 * (len(rows) + len(self.groups)), 500)), layout="constrained")
        axes = figure.subplots()
        axes.barh(range(len(rows)), [1] * len(rows), color="0.95", height=0.8)
        first = 0
        for i, group in enumerate(self.groups):
            here, label = range(first, first + len(group.layers)), f"{group.title}; asked {group.asked:.1%} (line)"
            axes.barh(here, [row.reached for row in group.layers], color=f"C{i % 9}", height=0.8, label=label)
            axes.vlines(group.asked, first - 0.45, here.stop - 0.55, color="black", linewidth=1.2)
            first = here.stop
        dense = [row.reached for row in self.dense]
        if dense:
            label = "left dense" if self.groups else "weights"
            axes.barh(range(first, len(rows)), dense, color="0.6", height=0.8, label=label)
        for position, row in enumerate(rows):
            axes.annotate(f"{row.reached:.1%}", (1.01, position), va="center", fontsize=6, annotation_clip=False)
        axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=7)
        axes.set_ylim(max(len(rows), 1) - 0.4, -0.6)
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axes.tick_params(length=0, labelsize=7)
        axes.spines[:].set_visible(False)
        axes.set_title(f"{self.sparsity:.1%} of {self.parameters:,} parameters are zero", fontsize=10)
        if rows:
            figure.legend(loc="outside lower left", fontsize=7, frameon=False)
        kind = Path(path).suffix.lstrip(".").lower() or "png"
        write_atomically(path, lambda file: figure.savefig(file, format=kind, dpi=120))


def _plain(metric: Any) -> Any:
    """What an evaluation function returned, as JSON has it: numbers of any library as numbers, the rest as text."""
    if isinstance(metric, dict):
        return {str(name): _plain(each) for name, each in metric.items()}
    if isinstance(metric, list | tuple):
        return [_plain(each) for each in metric]
    if hasattr(metric, "tolist"):  # tensors, arrays and NumPy scalars
        return _plain(metric.tolist())
    return metric if isinstance(metric, str | int | float | None) else str(metric)


def _table(layers: tuple[LayerRow, ...]) -> list[str]:
    """Aligned rows under a head line; empty columns are left out."""
    head = ("layer", "type", "shape", "pattern", "asked", "reached", "zeros", "why")
    rows = [head]
    for layer in layers:
        shape = "x".join(str(length) for length in layer.shape)
        asked = "" if layer.asked is None else f"{layer.asked:.2%}"
        reached, zeros = f"{layer.reached:.2%}", f"{layer.zeros:,}"
        rows.append((layer.name, layer.kind, shape, layer.pattern or "", asked, reached, zeros, layer.note))
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    numbers = {"asked", "reached", "zeros"}
    padded = []
    for column in columns:
        width = max(len(cell) for cell in column)
        padded.append([cell.rjust(width) if column[0] in numbers else cell.ljust(width) for cell in column])
    return ["    " + "  ".join(cells).rstrip() for cells in zip(*padded, strict=True)]
