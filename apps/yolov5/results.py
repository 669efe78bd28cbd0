"""What a run tells: a line an epoch, ``results.png``, the last table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apps.common.run_folder import ResultsTable
from pruning_core.checkpoint import write_atomically

BOTH = "metrics/mAP50-95"
MAP50 = "metrics/mAP50"
ASKED, REACHED = "sparsity/asked", "sparsity/reached"


def epoch_line(row: dict[str, Any], epochs: int, seconds_left: float) -> str:
    losses = " ".join(
        f"{name.removeprefix('train/').removesuffix('_loss')} {value:.3g}"
        for name, value in row.items()
        if name.startswith("train/")
    )
    parts = [f"epoch {row['epoch']}/{epochs}", f"loss {losses}"]
    if MAP50 in row:
        parts.append(f"mAP50 {row[MAP50]:.3f} mAP50-95 {row[BOTH]:.3f}")
    if ASKED in row:
        parts.append(f"sparsity {row[REACHED]:.1%}")
    return "  ".join([*parts, f"{duration(seconds_left)} left"])


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def plot(table: ResultsTable, path: Path) -> None:
    """mAP and sparsity over the epochs on one axis, the losses below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    for name, label, style in ((MAP50, "mAP50", "C0-"), (BOTH, "mAP50-95", "C0--"), (REACHED, "sparsity", "C3-")):
        points = table.column(name)
        if points:
            top.plot(*zip(*points, strict=True), style, label=label, marker="." if len(points) < 40 else "")
    top.set_ylim(0, 1.02)
    top.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    top.legend(loc="lower right", frameon=False)
    top.set_ylabel("validation mAP, share of zeros")
    for name in dict.fromkeys(key for row in table.rows for key in row if key.startswith("train/")):
        bottom.plot(*zip(*table.column(name), strict=True), label=name.removeprefix("train/"))
    bottom.legend(loc="upper right", frameon=False, fontsize=8)
    bottom.set_ylabel("training loss")
    bottom.set_xlabel("epoch")
    bottom.xaxis.get_major_locator().set_params(integer=True)
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def last_table(rows: list[tuple[str, dict[str, float], float | None, float | None, int]]) -> str:
    """A row a model: name, metrics, asked and reached sparsity of its pruned layers, bytes of its file."""
    head = ("model", "mAP50", "mAP50-95", "asked", "reached", "file")
    cells = [head]
    for name, metrics, asked, reached, size in rows:
        shares = ["-" if share is None else f"{share:.2%}" for share in (asked, reached)]
        figures = [f"{metrics[key]:.3f}" if key in metrics else "-" for key in (MAP50, BOTH)]
        cells.append((name, *figures, *shares, f"{size / 1e6:.1f} MB" if size else "-"))
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = []
    for row in cells:
        first = row[0].ljust(widths[0])
        rest = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([first, *rest]))
    return "\n".join(lines)
