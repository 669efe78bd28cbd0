"""Cost of the masking engine: mask updates, hooks per step, memory; beside AdamW and beside a peer.

    python -m benchmarks.engine [--peer-python PATH] [--json FILE] [--repeats N] [--peer-repeats N]
                                [--cases bert-base/4x1,yolov5s/1x1] [--allocator steady|system]

Every case runs in fresh processes of one thread: ``--repeats`` of them for CPU time, of which the median counts, and
one for memory; the peer's take turns with ours. ``benchmarks.measure`` says what is measured and how. The bars are
upper limits for our own figures, in CPU seconds, in ``AdamW.step``s of default settings, or in MiB.

The peer of llama-1b is torch.ao, which torch brings. That of the others is Neural Compressor 2.6, which needs an
environment of its own::

    uv venv peer --python 3.11
    uv pip install --python peer/bin/python neural-compressor==2.6 six 'setuptools<81' 'numpy<2' 'transformers<5' torch
    python -m benchmarks.engine --peer-python peer/bin/python
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measure import MEMORY_ENVIRONMENT, ONE_THREAD, STEADY_ENVIRONMENT, Case
from pruning_core.report import markdown_table

ROOT = Path(__file__).resolve().parent.parent
CASES = (
    Case("bert-base", "4x1", 0.8),
    Case("yolov5s", "1x1", 0.8),
    Case("bert-base", "1x1", 0.8),
    Case("bert-base", "2:4", 0.5),
    Case("bert-base", "channelx1", 0.8),
    Case("llama-1b", "2:4", 0.5, criterion="magnitude", dtype="bfloat16", every=4, cooldown=3),
)
WHAT = {
    "begin": "on_train_begin",
    "update_mid": "mask update, halfway",
    "update_end": "mask update, final",
    "window": "hooks per step, in the window",
    "cooldown": "hooks per step, in cooldown",
}
PEER_COMMANDS = [line.strip() for line in (__doc__ or "").splitlines()[-4:] if line.strip()]


def name_of(case: Case) -> str:
    return f"{case.model}/{case.pattern}"


@dataclass(frozen=True)
class Bar:
    """The most that our figure may be: CPU seconds or ns a weight, ``AdamW.step``s; MiB or multiples of the model.

    Memory is counted above the level before.
    """

    seconds: float | None = None
    ns: float | None = None
    adamw: float | None = None
    mib: float | None = None
    model: float | None = None

    def __str__(self) -> str:
        time = [(self.seconds, "{:g} s"), (self.ns, "{:g} ns a weight"), (self.adamw, "{:g} x AdamW")]
        parts = [*time, (self.mib, "+{:g} MiB"), (self.model, "+{:g} x model")]
        return ", ".join(text.format(value) for value, text in parts if value is not None)


def bar(case: Case, row: str) -> Bar:
    if case.model == "llama-1b":
        return Bar(ns=20, model=0.2) if row.startswith("update") else Bar(model=0.1)
    bert_4x1 = (case.model, case.pattern) == ("bert-base", "4x1")
    if row == "cooldown":
        return Bar(adamw=0.35)
    if row in ("begin", "window"):
        return Bar(adamw=0.7) if bert_4x1 and row == "window" else Bar()
    if bert_4x1:
        return Bar(seconds=1.0, mib=64)
    return Bar(seconds=0.2) if case.model == "yolov5s" else Bar()


@dataclass(frozen=True)
class Row:
    """One line of the table: CPU seconds, MiB, and what they are multiples of."""

    what: str
    seconds: float
    bar: str
    met: bool | None
    adamw: float
    adamw_fused: float
    mib: float
    model: float
    peer_seconds: float | None = None
    peer_adamw: float | None = None
    peer_mib: float | None = None
    peer_model: float | None = None
    peer_ratio: float | None = None

    def cells(self) -> list[str]:
        verdict = "" if self.met is None else " ok" if self.met else " OVER"
        ratios = [_number(x, "{:.2f} x") for x in (self.adamw, self.adamw_fused)]
        memory = [_number(self.mib, "+{:.0f}"), _number(self.model, "+{:.2f} x")]
        ours = [_number(self.seconds, "{:.3f}"), self.bar + verdict, *ratios, *memory]
        peer = [
            _number(self.peer_seconds, "{:.3f}"),
            _number(self.peer_adamw, "{:.2f} x"),
            _number(self.peer_mib, "+{:.0f}"),
            _number(self.peer_model, "+{:.2f} x"),
        ]
        return [self.what, *ours, *peer, _number(self.peer_ratio, "{:.1f} x")]


HEADINGS = (
    *("what", "ours, CPU-s", "bar", "/ AdamW", "/ fused AdamW", "ours, MiB", "/ model"),
    *("peer, CPU-s", "peer / AdamW", "peer, MiB", "peer / model", "peer / ours"),
)


def _number(value: float | None, text: str) -> str:
    return "" if value is None else text.format(value)


def measure(python: str, module: str, case: Case, steady: bool) -> dict[str, Any]:
    """Runs one case in a process of its own; its last line is JSON."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    allocator = MEMORY_ENVIRONMENT if case.memory else STEADY_ENVIRONMENT if steady else {}
    environment = {**inherited, **ONE_THREAD, **allocator}
    command = [python, "-m", f"benchmarks.{module}", case.to_json()]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{module}, {case}: failed\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    numbers = {name: median(run[name] for run in runs) for name in runs[0] if name != "versions"}
    return {**numbers, "versions": runs[0]["versions"]}


def side_by_side(case: Case, sides: dict[str, tuple[str, str, int]], steady: bool) -> dict[str, dict[str, Any]]:
    """Per side: {"time": medians, "memory": figures, "runs": all}; repeats of the sides take turns."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for i in range(max(repeats for _, _, repeats in sides.values())):
        for name, (python, module, repeats) in sides.items():
            if i < repeats:
                runs[name].append(measure(python, module, case, steady))
    result = {}
    for name, (python, module, _) in sides.items():
        memory = measure(python, module, replace(case, memory=True), steady)
        result[name] = {"time": medians(runs[name]), "memory": memory, "runs": runs[name]}
    return result


def rows(case: Case, sides: dict[str, dict[str, Any]]) -> list[Row]:
    ours, peer = sides["ours"], sides.get("peer")
    lines = []
    for name, what in WHAT.items():
        seconds, mib = ours["time"][name], ours["memory"][name]
        adamw, limit = seconds / ours["time"]["adamw"], bar(case, name)
        ns, model = 1e9 * seconds / ours["time"]["weights"], mib / ours["memory"]["model_mib"]
        times = [(seconds, limit.seconds), (ns, limit.ns), (adamw, limit.adamw)]
        pairs = [*times, (mib, limit.mib), (model, limit.model)]
        asked = [value <= most for value, most in pairs if most is not None]
        beside: dict[str, float] = {}
        if peer is not None:
            beside = {
                "peer_seconds": peer["time"][name],
                "peer_adamw": peer["time"][name] / peer["time"]["adamw"],
                "peer_mib": peer["memory"][name],
                "peer_model": peer["memory"][name] / peer["memory"]["model_mib"],
                "peer_ratio": peer["time"][name] / seconds,
            }
        met = all(asked) if asked else None
        fused = seconds / ours["time"]["adamw_fused"]
        label = f"{case.model} {case.pattern}: {what}"
        lines.append(Row(label, seconds, str(limit), met, adamw, fused, mib, model, **beside))
    return lines


def about(results: list[tuple[Case, dict[str, dict[str, Any]]]], allocator: str) -> dict[str, Any]:
    versions = {name: side["time"]["versions"] for name, side in results[0][1].items()}
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "versions": versions,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, of which one is used",
        "seed": results[0][0].seed,
        "allocator": allocator,
        "repeats": {name: len(side["runs"]) for name, side in results[0][1].items()},
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--peer-python", help="interpreter of an environment with neural-compressor==2.6")
    parser.add_argument("--json", type=Path, help="writes all figures to this file")
    parser.add_argument("--repeats", type=int, default=3, help="processes per case for CPU time (default 3)")
    parser.add_argument("--peer-repeats", type=int, default=1, help="the same for the peer, which is slow (default 1)")
    parser.add_argument(
        "--allocator", choices=["steady", "system"], default="steady", help="settings of malloc, see benchmarks.measure"
    )
    known = [name_of(case) for case in CASES]
    parser.add_argument(
        "--cases", default=",".join(known), help=f"which models and patterns (default {','.join(known)})"
    )
    options = parser.parse_args()
    options.cases = options.cases.split(",")
    unknown = sorted(set(options.cases) - set(known))
    if unknown:
        parser.error(f"--cases: unknown case, got {', '.join(unknown)}; known: {', '.join(known)}")
    if min(options.repeats, options.peer_repeats) < 1:
        parser.error("--repeats and --peer-repeats: must be at least 1")
    return options


def main() -> None:
    options = arguments()
    results, lines = [], []
    for case in [case for case in CASES if name_of(case) in options.cases]:
        print(f"{name_of(case)} ...", file=sys.stderr, flush=True)
        sides = {"ours": (sys.executable, "ours", options.repeats)}
        if case.model == "llama-1b":
            sides["peer"] = (sys.executable, "peer_torch_ao", options.peer_repeats)
        elif options.peer_python:
            # Not resolved: a virtual environment is known by the path of its link.
            peer = str(Path(options.peer_python).absolute())
            sides["peer"] = (peer, "peer_neural_compressor", options.peer_repeats)
        results.append((case, side_by_side(case, sides, options.allocator == "steady")))
        lines += rows(*results[-1])
    print(markdown_table(HEADINGS, [line.cells() for line in lines]))
    print(json.dumps(about(results, options.allocator)))
    if not options.peer_python and any(case.model != "llama-1b" for case, _ in results):
        print("The peer columns are empty. To fill them:", *PEER_COMMANDS, sep="\n    ")
    if options.json:
        cases = [{"case": asdict(case), **measured} for case, measured in results]
        report = {"about": about(results, options.allocator), "rows": [asdict(line) for line in lines], "cases": cases}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
