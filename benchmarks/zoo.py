"""Half of the channels of every group removed from every model of the zoo, and what came of it.

    python -m benchmarks.zoo [--family F ...] [--models a,b] [--seconds 600] [--csv FILE] [--float64 | --float32]
                             [--torch-pruning [beside|alone]]
    python -m benchmarks.zoo --read FILE ...     the tables of what was measured before

Each model runs in a process of its own, in one thread: traced, planned (random criterion, the same share of every
group), trained for one AdamW step, cut with that optimizer, and then checked by ``benchmarks.zoo_check``: outputs keep
their shapes, the cut model computes what the masked one does, one more training step moves the same Parameter objects,
and a fresh dense model takes structure and weights from files and gives the same bits. All values are random; nothing
is loaded. A model with batch norms trains on two images.

With ``--torch-pruning`` the same models are given to Torch-Pruning, where ``pip install torch-pruning==1.6.1`` was run.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measure import ONE_THREAD
from benchmarks.zoo_check import Case
from benchmarks.zoo_models import FAMILIES, SEED, entries
from pruning_core.report import markdown_table

ROOT = Path(__file__).resolve().parent.parent
SMALL_FIRST = ("nets", "handwritten", "segmentation", "ultralytics", "transformers", "detection", "classification")
BARS = {"classification": 80, "segmentation": 6, "detection": 12, "ultralytics": 10, "transformers": 23}
LARGEST = ("regnet_y_128gf", "vit_h_14", "vit_l_32", "vit_l_16", "convnext_large")
PACKAGES = ("torch", "torchvision", "transformers", "ultralytics", "torch-pruning")
COLUMNS = (
    *("family", "model", "result", "dtype", "params_before", "params_after", "macs_before", "macs_after"),
    *("difference", "effect", "trace_s", "plan_s", "slim_s", "prunable", "weights", "peak_gib", "wall_s", "notes"),
)
PEER_COLUMNS = ("tp_result", "tp_params_after", "tp_seconds")

LONGEST = 70
Row = dict[str, Any]


def most_seconds(model: str) -> int:
    """CPU seconds for trace and slim together."""
    return 90 if model in LARGEST else 30


def call(module: str, case: Case, limit: float) -> Row:
    """What a process of its own says on its last line; a crash or a hang is a result too."""
    command = [sys.executable, "-m", f"benchmarks.{module}", case.to_json()]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **ONE_THREAD}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        out, complaints = process.communicate(timeout=limit)
        why = f"process ended with {process.returncode} {_last(complaints)}"
    except subprocess.TimeoutExpired:
        process.kill()
        out, why = process.communicate()[0], f"not done after {limit:g} s"
    except BaseException:
        process.kill()
        raise
    lines = out.splitlines()
    if lines and lines[-1].startswith("{"):
        return json.loads(lines[-1])
    return {"error": f"{lines[-1].removeprefix('step ') if lines else 'start'}: {why}"}


def _last(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1][:200]


def measure(case: Case, limit: float, sides: Iterable[str]) -> Row:
    """One line of the table."""
    row: Row = {"family": case.family, "model": case.name}
    if "ours" in sides:
        start = time.perf_counter()
        row.update(call("zoo_check", case, limit))
        row.update(result=row["error"] or "ok", wall_s=time.perf_counter() - start)
    if "torch-pruning" in sides:
        peer = call("peer_torch_pruning", case, limit)
        row.update(tp_result=peer["error"] or "ok", tp_params_after=peer.get("params_after"))
        row.update(tp_seconds=peer.get("seconds"))
    return row


# ---- what is printed ------------------------------------------------------------------------------------------------


def seconds(row: Row) -> float | None:
    return row["trace_s"] + row["slim_s"] if "slim_s" in row else None


def _ratio(kind: str) -> Callable[[Row], str]:
    def text(row: Row) -> str:
        before, after = row.get(f"{kind}_before"), row.get(f"{kind}_after")
        return f"{before / 1e6:.2f} -> {after / 1e6:.2f} M ({after / before:.0%})" if before and after else ""

    return text


def _value(name: str, form: str = "{}") -> Callable[[Row], str]:
    return lambda row: "" if row.get(name) in (None, "") else form.format(row[name])


def _weights(row: Row) -> str:
    return f"{row['prunable']:.0f} of {row['weights']:.0f}" if "weights" in row else ""


CELLS: dict[str, Callable[[Row], str]] = {
    "model": _value("model"),
    "result": _value("result"),
    "dtype": _value("dtype"),
    "parameters": _ratio("params"),
    "MACs": _ratio("macs"),
    "difference": _value("difference", "{:.0e}"),
    "trace, CPU-s": _value("trace_s", "{:.1f}"),
    "slim, CPU-s": _value("slim_s", "{:.1f}"),
    "prunable weights": _weights,
    "notes": _value("notes"),
}
PEER_CELLS: dict[str, Callable[[Row], str]] = {
    "Torch-Pruning": _value("tp_result"),
    "its parameters, M": lambda row: f"{row['tp_params_after'] / 1e6:.2f}" if row.get("tp_params_after") else "",
    "its seconds": _value("tp_seconds", "{:.1f}"),
}


def line(row: Row) -> str:
    """One model, as it finishes."""
    told = {name: cell(row) for name, cell in {**CELLS, **PEER_CELLS}.items()}
    head = f"{told.pop('model'):42}{told.pop('result') or '-'}"
    return "  ".join([head, *(f"{name} {text}" for name, text in told.items() if text)])


def table(rows: list[Row]) -> str:
    """Markdown; columns without any text are left out, long messages are cut."""
    cells = {**CELLS, **PEER_CELLS}
    known = {name: cell for name, cell in cells.items() if any(cell(row) for row in rows)}
    return markdown_table(list(known), [[cell(row)[:LONGEST] for cell in known.values()] for row in rows])


OVERVIEW = ("family", "models", "ok", "largest difference", "median CPU-s", "slowest, CPU-s", "Torch-Pruning")


def overview(by_family: dict[str, list[Row]]) -> str:
    """A line for each family; differences are those in float64."""
    lines = []
    for family, rows in by_family.items():
        timed = [(spent, row["model"]) for row in rows if (spent := seconds(row)) is not None]
        apart = [row["difference"] for row in rows if row.get("dtype") == "float64" and "difference" in row]
        peer = [row["tp_result"] == "ok" for row in rows if "tp_result" in row]
        ours = [str(sum(row.get("result") == "ok" for row in rows)), f"{max(apart):.0e}"] if apart else ["", ""]
        slowest = "{1} {0:.0f}".format(*max(timed)) if timed else ""
        middle = f"{median(spent for spent, _ in timed):.1f}" if timed else ""
        lines.append([family, str(len(rows)), *ours, middle, slowest, f"{sum(peer)} of {len(peer)}" if peer else ""])
    return markdown_table(OVERVIEW, lines)


def summary(family: str, rows: list[Row]) -> list[str]:
    """How many hold everything, beside the bar, and the slowest beside its own."""
    lines = []
    if any("result" in row for row in rows):
        good = sum(row.get("result") == "ok" for row in rows)
        lines.append(f"{family}: {good} of {len(rows)} ok (bar {BARS.get(family, len(rows))})")
        timed = [(spent, row["model"]) for row in rows if (spent := seconds(row)) is not None]
        over = [
            f"{model} {spent:.0f} s (bar {most_seconds(model)})" for spent, model in timed if over_bar(spent, model)
        ]
        if timed:
            slowest = "slowest trace + slim: {1} {0:.1f} CPU-s".format(*max(timed))
            lines.append(f"    {slowest}; " + (f"OVER: {', '.join(over)}" if over else "all within their bars"))
    if any("tp_result" in row for row in rows):
        good = sum(row.get("tp_result") == "ok" for row in rows)
        lines.append(f"{family}, Torch-Pruning: {good} of {len(rows)} ok")
    return lines


def over_bar(spent: float, model: str) -> bool:
    return spent > most_seconds(model)


def about() -> str:
    """Seed, date and versions, for the first line of the file."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    versions = ", ".join(f"{name} {text}" for name, text in found.items())
    return f"# seed {SEED}, {datetime.now(UTC).date().isoformat()}, {versions}"


# ---- the command ----------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--family", nargs="+", choices=list(FAMILIES), default=list(SMALL_FIRST), metavar="F")
    parser.add_argument("--models", default="", help="only these, separated by commas")
    parser.add_argument("--seconds", type=float, default=600, help="time limit per model and side (default 600)")
    parser.add_argument("--csv", type=Path, help="writes all columns to this file")
    parser.add_argument(
        "--read", type=Path, nargs="+", default=[], metavar="FILE", help="print the tables of --csv files"
    )
    parser.add_argument("--torch-pruning", nargs="?", choices=["beside", "alone"], const="beside")
    kinds = parser.add_mutually_exclusive_group()
    for kind in ("float64", "float32"):
        kinds.add_argument(f"--{kind}", dest="dtype", action="store_const", const=kind, default="")
    options = parser.parse_args()
    options.sides = [] if options.torch_pruning == "alone" else ["ours"]
    if options.torch_pruning:
        options.sides.append("torch-pruning")
    return options


def cases(options: argparse.Namespace) -> list[Case]:
    known = [Case(entry.name, entry.family, options.dtype) for entry in entries(options.family).values()]
    wanted = [name for name in options.models.split(",") if name]
    missing = sorted(set(wanted) - {case.name for case in known})
    if missing:
        raise SystemExit(f"--models: not in these families, got {', '.join(missing)}; see benchmarks/zoo_models.py")
    return [case for case in known if not wanted or case.name in wanted]


def read(files: list[Path]) -> list[Row]:
    """The rows of several files, one for each model: what ours and Torch-Pruning made of it may be in two of them."""
    rows: dict[tuple[str, str], Row] = {}
    for path in files:
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        for row in csv.DictReader(lines):
            known = {name: _number(text) for name, text in row.items() if text}
            rows.setdefault((row["family"], row["model"]), {}).update(known)
    return list(rows.values())


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def main() -> None:
    options = arguments()
    if options.read:
        show(read(options.read), options.family)
        for path in options.read:
            print(path.read_text().partition("\n")[0])
        return
    rows: list[Row] = []
    columns = [*COLUMNS, *(PEER_COLUMNS if options.torch_pruning else ())]
    file = options.csv.open("w", newline="") if options.csv else None
    if file:
        file.write(about() + "\n")
        csv.DictWriter(file, columns).writeheader()
    for case in cases(options):
        rows.append(measure(case, options.seconds, options.sides))
        print(line(rows[-1]), flush=True)
        if file:
            csv.DictWriter(file, columns, extrasaction="ignore").writerow(rows[-1])
            file.flush()
    show(rows, options.family)
    print(about())


def show(rows: list[Row], families: list[str]) -> None:
    by_family = {family: [row for row in rows if row["family"] == family] for family in families}
    by_family = {family: found for family, found in by_family.items() if found}
    print(f"\n{overview(by_family)}")
    for family, found in by_family.items():
        print(f"\n## {family}\n\n{table(found)}")
    print("\n" + "\n".join(text for family, found in by_family.items() for text in summary(family, found)))


if __name__ == "__main__":
    main()
