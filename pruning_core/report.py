"""Reports: text and Markdown tables, JSON, bar charts; files are written atomically."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from pruning_core.checkpoint import write_atomically


def text_table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[str] = (), indent: str = "") -> str:
    """Aligned rows under a header line.

    Columns named in ``right`` are aligned to the right; columns without any text are left out.
    """
    padded = []
    for name, *cells in zip(head, *rows, strict=True):
        if any(cells) or len(head) == 1:
            width = max(map(len, (name, *cells)))
            padded.append([cell.rjust(width) if name in right else cell.ljust(width) for cell in (name, *cells)])
    return "\n".join(indent + "  ".join(line).rstrip() for line in zip(*padded, strict=True))


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; ``|`` in cells is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def plain(value: Any) -> Any:
    """``value`` ready for JSON: tensors, arrays and NumPy scalars as lists and numbers, anything else as text."""
    if isinstance(value, dict):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if hasattr(value, "tolist"):  # tensors, arrays and NumPy scalars
        return plain(value.tolist())
    return value if isinstance(value, str | int | float | None) else str(value)


class Report:
    """Base class of reports: ``print`` it, ``to_dict``, ``save_json``, ``save_markdown``, ``plot``."""

    title = "Report"

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, ready for JSON."""
        raise NotImplementedError

    def draw(self, bars: Bars) -> None:
        """Adds the bars of the report to ``bars``."""
        raise NotImplementedError

    def save_json(self, path: str | Path) -> None:
        """Writes ``to_dict()`` as indented JSON."""
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        write_atomically(path, lambda file: file.write(text.encode()))

    def save_markdown(self, path: str | Path) -> None:
        """Writes the report as it is printed, in a Markdown code block."""
        text = f"# {self.title}\n\n```text\n{self}\n```\n"
        write_atomically(path, lambda file: file.write(text.encode()))

    def plot(self, path: str | Path) -> None:
        """Writes a chart with a bar per layer; the suffix of ``path`` is the format (default png). Needs matplotlib."""
        bars = Bars()
        self.draw(bars)
        save_figure(bars.finish, path, height=min(1.6 + 0.2 * len(bars.names), 500))


class Bars:
    """A chart of horizontal bars, one line per layer: filled by ``Report.draw``, drawn by ``finish``."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.notes: list[str] = []
        self.heading = self.xlabel = ""
        self.shares = False
        self._calls: list[Callable[[Any], object]] = []

    def add(self, first: int, values: Sequence[float], color: str, label: str | None = None) -> None:
        """Bars on the lines from ``first`` on."""
        places = range(first, first + len(values))
        self._calls.append(lambda axes: axes.barh(places, values, color=color, height=0.8, label=label))

    def mark(self, first: int, count: int, value: float) -> None:
        """A black vertical line at ``value`` across ``count`` bars."""
        low, high = first - 0.45, first + count - 0.55
        self._calls.append(lambda axes: axes.vlines(value, low, high, color="black", linewidth=1.2))

    def finish(self, figure: Any) -> None:
        """Draws everything on a matplotlib figure."""
        axes = figure.subplots()
        for call in self._calls:
            call(axes)
        for position, note in enumerate(self.notes):
            axes.annotate(note, (1.01, position), va="center", fontsize=6, annotation_clip=False)
        axes.set_yticks(range(len(self.names)), self.names, fontsize=7)
        axes.set_ylim(max(len(self.names), 1) - 0.4, -0.6)
        if self.shares:
            axes.set_xlim(0, 1)
            axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        axes.set_xlabel(self.xlabel, fontsize=8)
        axes.tick_params(length=0, labelsize=7)
        axes.spines[:].set_visible(False)
        axes.set_title(self.heading, fontsize=10)
        if self.names:
            figure.legend(loc="outside lower left", ncols=1 if self.shares else 3, fontsize=7, frameon=False)


def save_figure(draw: Callable[[Any], object], path: str | Path, *, width: float = 8, height: float = 6) -> None:
    """Runs ``draw(figure)`` on a matplotlib figure of ``width`` by ``height`` inches and writes it."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("plot: needs matplotlib; pip install matplotlib") from error

    figure = Figure(figsize=(width, height), layout="constrained")
    draw(figure)
    kind = Path(path).suffix.lstrip(".").lower() or "png"
    write_atomically(path, lambda file: figure.savefig(file, format=kind, dpi=120))
