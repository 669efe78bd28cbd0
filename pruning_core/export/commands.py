"""``export``, ``unpack``, ``verify`` of ``python -m pruning_core``, and what ``inspect`` says of a packed file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from pruning_core.checkpoint import CheckpointError
from pruning_core.export import container, huggingface, sparse_file
from pruning_core.export.bound import bound_bytes
from pruning_core.export.sparse_file import Choice

SUFFIX = ".safetensors"


# ---- what is at a path ----------------------------------------------------------------------------------------------


def is_packed(path: Path) -> bool:
    """A file of ``save_sparse``, or one that was until it was damaged: its table's name is in the header."""
    if path.suffix != SUFFIX or not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(container.LONGEST_HEADER) if path.stat().st_size < 2**20 else file.read(2**20)
    return f'"{container.OURS}"'.encode() in start


def read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return dict(safetensors.torch.load_file(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; check the path of the checkpoint") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file ({error})") from error


def packed_files(path: Path) -> list[Path]:
    """The packed file at the path, or those in a model's folder."""
    files = sorted(path.glob(f"model*{SUFFIX}")) if path.is_dir() else [path]
    if not files:
        raise CheckpointError(f"{path}: has no model{SUFFIX}; give a folder that save_pretrained_sparse wrote")
    return files


def check_free(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path}: is there already; give another name, or --overwrite")


# ---- commands -------------------------------------------------------------------------------------------------------


def export(source: Path, out: Path | None, choice: Choice, state: Mapping[str, Tensor] | None, overwrite: bool) -> str:
    """Packs a model's folder, or the state dict that was read from a file."""
    out = out or (
        source.with_name(f"{source.name}-sparse") if state is None else source.with_suffix(f".sparse{SUFFIX}")
    )
    check_free(out, overwrite)
    if state is None:
        huggingface.pack_folder(source, out, choice)
    else:
        sparse_file.write_state(state, out, choice)
    return verify(out)


def unpack(source: Path, out: Path | None, overwrite: bool) -> str:
    """Back to what every tool reads."""
    stem = source.name.removesuffix(SUFFIX).removesuffix("-sparse").removesuffix(".sparse")
    out = out or source.with_name(f"{stem}-dense{'' if source.is_dir() else SUFFIX}")
    check_free(out, overwrite)
    if source.is_dir():
        huggingface.unpack_folder(source, out)
    else:
        sparse_file.write_dense(source, out)
    return f"{out}: an ordinary {'folder' if source.is_dir() else 'safetensors file'} again"


def verify(path: Path) -> str:
    """Reads everything once more: digests, counts and zeros of every tensor are checked on the way."""
    total = Total()
    for file in packed_files(path):
        total += _verified(file)
    zeros = f"{total.zeros:,} of {total.weights:,} packed weights are zero"
    return (
        f"{path}: {total.packed} packed and {total.others} other tensors are as they were written\n"
        f"{zeros}; {_share(total.stored, total.dense)}"
    )


def _share(stored: int, dense: int) -> str:
    return f"{stored:,} bytes, {stored / max(dense, 1):.1%} of {dense:,}"


class Total(NamedTuple):
    packed: int = 0
    others: int = 0
    weights: int = 0
    zeros: int = 0
    stored: int = 0
    dense: int = 0

    def __add__(self, other: Any) -> Total:
        return Total(*(one + more for one, more in zip(self, other, strict=True)))


def _verified(path: Path) -> Total:
    total = Total()
    with sparse_file.opened(path) as (file, header):
        for name, entry in header.entries.items():
            tensor, head = sparse_file.read_tensor(file, header, name), sparse_file.head_of(entry)
            weights, zeros = (tensor.numel(), head.zeros) if head else (0, 0)
            total += Total(bool(head), not head, weights, zeros, 0, tensor.nbytes)
    return total + Total(stored=path.stat().st_size)


def table(path: Path) -> str:
    """Of every packed weight its shape, units, zeros and bytes, and how far these are above what must be said."""
    head = ("weight", "shape", "unit", "zeros", "bytes", "of dense", "of bound")
    rows: list[tuple[str, ...]] = [head]
    others, dense_bytes = 0, 0
    with sparse_file.opened(path) as (file, header):
        for name, entry in header.entries.items():
            packed = sparse_file.head_of(entry)
            weight = sparse_file.read_tensor(file, header, name)
            dense_bytes += weight.nbytes
            if packed is None:
                others += 1
                continue
            size = entry.end - entry.begin
            bound = bound_bytes(weight.to(packed.stored_dtype), packed.units, packed.values)
            shape, zeros = "x".join(map(str, packed.shape)), f"{packed.zeros / weight.numel():.2%}"
            share = f"{size / weight.nbytes:.2%}"
            rows.append(
                (name, shape, str(packed.units), zeros, f"{size:,}", share, f"{size / bound:.3f}" if bound else "")
            )
    size = path.stat().st_size
    lines = _aligned(rows) if len(rows) > 1 else []
    lines.append(f"{len(rows) - 1} packed, {others} other tensors: {_share(size, dense_bytes)}")
    return "\n".join(lines)


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pads = [str.ljust, str.ljust, str.ljust, *[str.rjust] * 4]
    return [
        "  ".join(pad(cell, width) for pad, cell, width in zip(pads, row, widths, strict=True)).rstrip() for row in rows
    ]
