"""Where a run writes: ``runs/train/exp``, ``exp2``, ...; and its table of results."""

from __future__ import annotations

import csv
import io
import os
import re
from pathlib import Path
from typing import Any

from apps.common.errors import BadInput
from pruning_core.checkpoint import write_atomically


def new_folder(project: Path, name: str, *, exist_ok: bool) -> Path:
    """``project/name``, or the first of ``name2``, ``name3``, ... that is free; with ``exist_ok`` in any case."""
    folder, number = project / name, 2
    while folder.exists() and not exist_ok:
        folder, number = project / f"{name}{number}", number + 1
    return folder


def latest_folder(project: Path, marker: str, *, option: str = "--resume", what: str = "interrupted run") -> Path:
    """The folder under ``project`` in which ``marker`` was written last."""
    found = [path for path in project.glob(f"*/{marker}") if path.is_file()]
    if not found:
        raise BadInput(f"{option}: no {what}, got {project}; give the folder of the {what.split()[-1]}")
    newest = max(found, key=lambda path: path.stat().st_mtime)
    return newest.parents[len(Path(marker).parts) - 1]


def check_writable(folder: Path, option: str) -> None:
    place = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise BadInput(f"{option}: is no folder to write to, got {str(folder)!r}; choose another")


class ResultsTable:
    """``results.csv``: a row an epoch, rewritten whole, so that a kill never leaves half a row."""

    def __init__(self, path: Path, rows: list[dict[str, Any]] | None = None) -> None:
        self.path = path
        self.rows = list(rows or [])

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append({name: _short(value) for name, value in row.items()})
        self.write()

    def write(self) -> None:
        columns = list(dict.fromkeys(name for each in self.rows for name in each))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomically(self.path, lambda file: file.write(text.getvalue().encode()))

    def column(self, name: str) -> list[tuple[int, float]]:
        """(epoch, value) of the rows that have it."""
        return [(int(row["epoch"]), float(row[name])) for row in self.rows if row.get(name, "") != ""]


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def safe_name(name: str) -> str:
    """A run's name is one folder: no path, no dots."""
    if not re.fullmatch(r"[\w.+-]+", name) or name.strip(".") == "":
        raise BadInput(f"--name: must be a plain folder name, got {name!r}; put the path into --project")
    return name
