"""Slim folders that plain ``from_pretrained`` loads: twenty families of Transformers, and what each ends in.

    python -m benchmarks.slim_folders [--macs 0.75] [--families BERT,Llama] [--onnx]

Each family is built at the widths of its default configuration, two blocks per stack and 1,000 words, with random
weights; channels go by a random criterion under ``uniform=True``; ``save_pretrained`` writes a folder. A process that
never imports ``pruning_core`` loads it by ``from_pretrained`` and must give the same bits. ``--onnx`` also exports the
slim model and compares ONNX Runtime with torch (the relative difference).
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from pruning_core import ChannelGraph, export_onnx, plan_channels, slim_
from pruning_core.report import markdown_table
from tests.support.nets.families import FAMILIES, family

BARE = """
import sys, torch, transformers
folder, kind = sys.argv[1:]
model = getattr(transformers, kind).from_pretrained(folder).eval()
given = torch.load(f"{folder}/given.pt", weights_only=True)
with torch.inference_mode():
    outputs = model(**given["inputs"])
got = [each for each in outputs.values() if isinstance(each, torch.Tensor)]
assert "pruning_core" not in sys.modules and "quantization_config" not in model.config.to_dict()
assert len(got) == len(given["outputs"])
print("equal" if all(torch.equal(*pair) for pair in zip(got, given["outputs"])) else "other numbers")
"""
"""What a user runs who has never heard of this project."""


class Outputs(nn.Module):
    """The model without its cache, which is no tensor."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids=None, decoder_input_ids=None, pixel_values=None, input_features=None) -> Any:  # type: ignore[no-untyped-def]
        inputs = {name: value for name, value in locals().items() if isinstance(value, torch.Tensor)}
        self.model.config.use_cache = False
        return {str(i): each for i, each in enumerate(tensors(self.model(**inputs)))}


def tensors(outputs: Any) -> list[torch.Tensor]:
    return [each for each in outputs.values() if isinstance(each, torch.Tensor)]


def reloaded(model: Any, inputs: dict[str, torch.Tensor], folder: Path) -> str:
    """What a bare process says about the folder."""
    model.save_pretrained(folder)
    with torch.inference_mode():
        outputs = [each.clone() for each in tensors(model(**inputs))]
    torch.save({"inputs": inputs, "outputs": outputs}, folder / "given.pt")
    command = [sys.executable, "-c", BARE, str(folder), type(model).__name__]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


def measure(name: str, macs: float, onnx: bool) -> dict[str, str]:
    model, inputs = family(name, narrow=False)
    row = {"family": name, "class": type(model).__name__}
    try:
        graph = ChannelGraph.trace(model, inputs)
        start = time.process_time()
        plan = plan_channels(graph, {"macs": macs}, criterion="random", uniform=True, round_to=8)
        row["plan, CPU-s"] = f"{time.process_time() - start:.1f}"
        row["multiply-adds"] = f"{graph.macs(plan.channels) / graph.macs():.0%}"
        slim_(model, plan)
    except ValueError as error:
        return {**row, "from_pretrained": str(error)}
    row["configuration"] = ", ".join(f"{key} {value:g}" for key, value in plan.configuration.items())
    with tempfile.TemporaryDirectory() as folder:
        row["from_pretrained"] = reloaded(model, inputs, Path(folder))
        if onnx:
            try:
                row["ONNX"] = f"{export_onnx(Outputs(model), inputs, Path(folder) / 'model.onnx'):.0e}"
            except Exception as error:  # any: the exporter is not ours
                row["ONNX"] = " ".join(str(error).split())[:120]
    row["keeps its width"] = "; ".join(note.removeprefix("uniform: ") for note in plan.notes)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--macs", type=float, default=0.75, help="what is left of the multiply-adds")
    parser.add_argument("--families", type=lambda text: text.split(","), default=list(FAMILIES))
    parser.add_argument("--onnx", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rows = []
    for name in options.families:
        rows.append(measure(name, options.macs, options.onnx))
        print(rows[-1], flush=True)
        gc.collect()
    columns = list(dict.fromkeys(column for row in rows for column in row))
    print("\n" + markdown_table(columns, [[row.get(column, "") for column in columns] for row in rows]))
    print(", ".join(f"{each} {version(each)}" for each in ("torch", "transformers", "onnxruntime")))


if __name__ == "__main__":
    main()
