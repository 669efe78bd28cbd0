"""What a run shows at its end: curves with the sparsity on the same axis, the report of every layer, a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apps.common.run_folder import ResultsTable
from pruning_core import SparsityReport
from pruning_core.report import save_figure

ASKED, REACHED = "sparsity/asked", "sparsity/reached"
TRAIN = "train/"


def epochs_of(count: float) -> str:
    return f"{count:g} epoch" if count == 1 else f"{count:g} epochs"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def write_report(report: SparsityReport, folder: Path, *, plots: bool = True) -> None:
    """The table of every layer, as text, JSON and a picture."""
    report.save_json(folder / "pruning_report.json")
    report.save_markdown(folder / "pruning_report.md")
    if plots:
        report.plot(folder / "pruning_report.png")


def plot_curves(
    table: ResultsTable,
    scores: Sequence[tuple[str, str]],
    path: Path,
    *,
    title: str,
    dense: tuple[str, float] | None = None,
    full: float = 1.0,
) -> None:
    """Scores and sparsity over the epochs on one axis, beside the dense model's; the losses below.

    ``scores``: (column, name). ``dense``: (its name, value). ``full``: what a perfect score is, 1 or 100.
    """

    def draw(figure: Any) -> None:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
        styles = ["C0-", "C0--", "C0:", "C0-."]
        lines = [(*score, style, full) for score, style in zip(scores, styles, strict=False)]
        for column, name, style, whole in [*lines, (REACHED, "sparsity", "C3-", 1.0)]:
            points = [(epoch, value / whole) for epoch, value in table.column(column)]
            if points:
                top.plot(*zip(*points, strict=True), style, label=name, marker="." if len(points) < 40 else "")
        if dense is not None:
            top.axhline(dense[1] / full, color="0.5", linewidth=1, zorder=1, label=f"{dense[0]} of the dense model")
        top.set_ylim(0, 1.02)
        top.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        top.set_ylabel(title)
        for column in dict.fromkeys(key for row in table.rows for key in row if key.startswith(TRAIN)):
            points = table.column(column)
            marker = "." if len(points) < 2 else ""
            bottom.plot(*zip(*points, strict=True), label=column.removeprefix(TRAIN), marker=marker)
        bottom.set_ylabel("training loss")
        bottom.set_xlabel("epoch")
        bottom.xaxis.get_major_locator().set_params(integer=True)
        for axes, columns in ((top, 4), (bottom, 6)):
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, fontsize=9)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.3)

    save_figure(draw, path)
