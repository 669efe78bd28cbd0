"""Size, speed and memory of packed checkpoints, beside gzip, zstd, torch's CSR and the entropy bound.

    python -m benchmarks.export [--layers N] [--repeats N] [--cases 1x1/0.9,4x1/0.8] [--file model.safetensors]

The weights are those of N layers of BERT-base's encoder (28 MB each), Gaussian, pruned by magnitude per layer; with
``--file`` the tensors of a safetensors file as they are. Sizes are shares of the dense safetensors file. Times are CPU
seconds of one thread, medians; MB are those of the dense tensors. Memory is the highest level of resident memory above
what it was before, over the size of the largest tensor, in a process of its own; when unpacking, the tensor that comes
out is in it. The bars are limits that the project set itself: 1.03 of the bound, 200 MB/s, 2 tensors.

zstd needs ``pip install zstandard``; its column is empty without.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from benchmarks.measure import MEMORY_ENVIRONMENT, ONE_THREAD, STEADY_ENVIRONMENT, cpu_seconds, peak_mib
from pruning_core import export_onnx, load_sparse_into, save_sparse
from pruning_core.report import markdown_table
from pruning_core.sparse_format.bound import bound_bytes
from pruning_core.sparse_format.reader import opened

ROOT = Path(__file__).resolve().parent.parent
SHAPES = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
CASES = [f"{pattern}/{share}" for pattern in ("1x1", "4x1") for share in (0.5, 0.8, 0.9, 0.95)] + ["2:4/0.5"]
BAR_BOUND, BAR_SPEED, BAR_MEMORY = 1.03, 200, 2
ONNX = "onnx"
HEAD_KEYS = ("gzip", "zstd", "csr", "raw", "entropy", "bound")
State = dict[str, Tensor]


# ---- weights --------------------------------------------------------------------------------------------------------


def pruned(shape: tuple[int, int], pattern: str, share: float) -> Tensor:
    weight = torch.randn(shape) * 0.03
    if pattern == "2:4":
        groups = weight.unflatten(1, (-1, 4))
        return groups.scatter(2, groups.abs().topk(2, dim=2, largest=False).indices, 0.0).flatten(1)
    rows = int(pattern.partition("x")[0])
    scores = weight.unflatten(0, (-1, rows)).abs().sum(1)
    cut = scores.flatten().kthvalue(max(round(share * scores.numel()), 1)).values
    return torch.where((scores > cut).repeat_interleave(rows, 0), weight, 0.0)


def state_of(case: str, layers: int, file: str | None) -> State:
    if file:
        return dict(safetensors.torch.load_file(file))
    torch.manual_seed(0)
    pattern, _, share = case.partition("/")
    return {f"{i}.{j}": pruned(shape, pattern, float(share)) for i in range(layers) for j, shape in enumerate(SHAPES)}


def module_of(state: State) -> nn.Module:
    """Something that has these tensors, under names that attributes can have."""
    return nn.ParameterDict(
        {n.replace(".", "_"): nn.Parameter(v.clone(), requires_grad=False) for n, v in state.items()}
    )


# ---- measuring ------------------------------------------------------------------------------------------------------


def figures(state: State, repeats: int) -> dict[str, Any]:
    dense = safetensors.torch.save(state)
    result: dict[str, Any] = {"tensors": sum(value.nbytes for value in state.values()), "dense": len(dense)}
    result["gzip"] = len(gzip.compress(dense, 6))
    result["zstd"] = _zstd(dense)
    result["csr"] = _csr(state)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        model = module_of(state)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        for codec in ("raw", "entropy"):
            packing = [cpu_seconds(lambda codec=codec: save_sparse(model, path, codec=codec)) for _ in range(repeats)]
            unpacking = [cpu_seconds(lambda: load_sparse_into(model, path)) for _ in range(repeats)]
            result[codec] = path.stat().st_size
            result[f"{codec}_pack"], result[f"{codec}_unpack"] = median(packing), median(unpacking)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        result["bound"] = _bound(path)
    return result


def _bound(path: Path) -> float:
    """Of the packed weights their entropy; of all other tensors their bytes."""
    total = 0.0
    with opened(path) as reader:
        for name in reader:
            head, weight = reader.heads[name], reader.read(name)
            total += bound_bytes(weight, head.units, head.values) if head else weight.nbytes
    return total


def _zstd(dense: bytes) -> int | None:
    try:
        import zstandard
    except ModuleNotFoundError:
        return None
    return len(zstandard.ZstdCompressor(level=3).compress(dense))


def _csr(state: State) -> int:
    """``torch.save`` of ``to_sparse_csr``, its default of int64 indices."""
    sparse = {name: value.to_sparse_csr() if value.dim() == 2 else value for name, value in state.items()}
    file = io.BytesIO()
    torch.save(sparse, file)
    return file.getbuffer().nbytes


def memory(state: State, codec: str) -> dict[str, float]:
    """Peaks over the largest tensor."""
    model, largest = module_of(state), max(value.nbytes for value in state.values()) / 2**20
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        packing = peak_mib(lambda: save_sparse(model, path, codec=codec))
        unpacking = peak_mib(lambda: load_sparse_into(model, path))
    return {"pack": packing / largest, "unpack": unpacking / largest}


def onnx_runtime(share: float, repeats: int) -> dict[str, float]:
    """Two layers of BERT-base with random weights: bytes of its files, CPU seconds for 128 tokens, zeros or not."""
    import onnxruntime
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(BertConfig(num_hidden_layers=2, vocab_size=1000)).eval()
    ids = torch.randint(0, 1000, (1, 128))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    result, sessions = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("dense", "zeros", "sparse"):
            path = Path(folder) / f"{name}.onnx"
            if name == "zeros":
                for each in model.encoder.modules():
                    if isinstance(each, nn.Linear):
                        each.weight.data = pruned(tuple(each.weight.shape), "4x1", share)
            export_onnx(model, {"input_ids": ids}, path, sparse=name == "sparse")
            result[f"{name}_bytes"] = path.stat().st_size
            sessions.append((name, onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])))
    took: dict[str, list[float]] = {name: [] for name, _ in sessions}
    for _ in range(20 * repeats):  # in turns: what disturbs one disturbs all
        for name, session in sessions:
            took[name].append(cpu_seconds(lambda session=session: session.run(None, {"input_ids": ids.numpy()})))
    return result | {name: median(each) for name, each in took.items()}


# ---- running --------------------------------------------------------------------------------------------------------


def in_process(case: str, options: argparse.Namespace, *, codec: str | None) -> dict[str, Any]:
    """A fresh process of one thread: times, or with a codec its memory."""
    environment = {**os.environ, **ONE_THREAD, **(MEMORY_ENVIRONMENT if codec else STEADY_ENVIRONMENT)}
    task = {"case": case, "layers": options.layers, "repeats": options.repeats, "file": options.file, "codec": codec}
    command = [sys.executable, "-m", "benchmarks.export", "--task", json.dumps(task)]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(ran.stderr)
    return dict(json.loads(ran.stdout.splitlines()[-1]))


def task(text: str) -> None:
    given = json.loads(text)
    torch.set_num_threads(1)
    if given["case"] == ONNX:
        print(json.dumps(onnx_runtime(0.9, given["repeats"])))
        return
    state = state_of(given["case"], given["layers"], given["file"])
    print(json.dumps(memory(state, given["codec"]) if given["codec"] else figures(state, given["repeats"])))


HEAD = ("weights", "gzip -6", "zstd -3", "CSR", "raw", "entropy", "bound", "above bound")
SPEED = ("weights", "raw: pack", "unpack", "entropy: pack", "unpack", "memory to pack", "to unpack")


def size_row(case: str, found: dict[str, Any]) -> tuple[str, ...]:
    sizes = [found["dense"] / found[kind] if found[kind] else None for kind in HEAD_KEYS]
    return (case, *(f"{size:.2f}" if size else "" for size in sizes), f"{found['entropy'] / found['bound'] - 1:.1%}")


def speed_row(case: str, found: dict[str, Any], peaks: dict[str, float]) -> tuple[str, ...]:
    keys = ("raw_pack", "raw_unpack", "entropy_pack", "entropy_unpack")
    speeds = (f"{found['tensors'] / found[key] / 1e6:,.0f} MB/s" for key in keys)
    return (case, *speeds, f"{peaks['pack']:.1f} x", f"{peaks['unpack']:.1f} x")


def onnx_table(options: argparse.Namespace) -> str:
    found = in_process(ONNX, options, codec=None)
    kinds = {"zeros": "with its zeros", "sparse": "with sparse initializers"}
    ratios = {kind: (found[f"{kind}_bytes"] / found["dense_bytes"], found[kind] / found["dense"]) for kind in kinds}
    rows = [(kinds[kind], f"{size:.2f}", f"{time:.2f}") for kind, (size, time) in ratios.items()]
    return markdown_table(("file", "bytes", "CPU time"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--file", help="a safetensors file, in place of made-up weights")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        task(options.task)
        return
    python, sizes, speeds, missed = platform.python_version(), [], [], []
    for case in [Path(options.file).parent.name or options.file] if options.file else options.cases.split(","):
        found, peaks = in_process(case, options, codec=None), in_process(case, options, codec="entropy")
        sizes.append(size_row(case, found))
        speeds.append(speed_row(case, found, peaks))
        slowest = max(found[key] for key in found if key.endswith("pack"))
        if found["entropy"] > BAR_BOUND * found["bound"] and not options.file:
            missed.append(f"{case}: {found['entropy'] / found['bound']:.3f} of the bound")
        if found["tensors"] / slowest < BAR_SPEED * 1e6:
            missed.append(f"{case}: {found['tensors'] / slowest / 1e6:.0f} MB/s")
        if max(peaks.values()) > BAR_MEMORY:
            missed.append(f"{case}: {max(peaks.values()):.1f} times the largest tensor")
    print(f"{datetime.now(UTC):%Y-%m-%d}, torch {torch.__version__}, Python {python}, one thread, seed 0")
    print(f"\nTimes smaller than dense safetensors:\n\n{markdown_table(HEAD, sizes)}")
    print(f"\nSpeed in dense bytes, memory in largest tensors:\n\n{markdown_table(SPEED, speeds)}")
    if not options.file:
        print(f"\nTwo layers of BERT-base in ONNX Runtime, 4x1 at 90 %, over the dense file:\n\n{onnx_table(options)}")
    bars = f"{BAR_BOUND} of the bound, {BAR_SPEED} MB/s, {BAR_MEMORY} x memory"
    print(f"\nbars ({bars}): " + ("; ".join(missed) if missed else "all met"))


if __name__ == "__main__":
    main()
