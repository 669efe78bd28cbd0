"""``export``, ``unpack``, ``verify``, and what ``inspect`` says of a packed file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from pruning_core.checkpoint import CheckpointError
from pruning_core.integrations.transformers import folder as folders
from pruning_core.report import text_table
from pruning_core.sparse_format import container, sparse_file
from pruning_core.sparse_format.bound import bound_bytes
from pruning_core.sparse_format.reader import opened
from pruning_core.sparse_format.sparse_file import Packing

SUFFIX = ".safetensors"
START = 4096


# ---- what is at a path ----------------------------------------------------------------------------------------------


def is_packed(path: Path) -> bool:
    """A file of ``save_sparse``, whole or damaged: the name of its table is what the header begins with."""
    if path.suffix != SUFFIX or not path.is_file():
        return False
    with path.open("rb") as file:
        return f'"{container.OURS}":'.encode() in file.read(START)


def packed_files(path: Path) -> list[Path]:
    """The packed file at the path, or those in a model's folder."""
    return [path / name for name in folders.read_folder(path)[1]] if path.is_dir() else [path]


def _with_name(path: Path) -> Path:
    """``.`` and ``..`` have none that another could be made of."""
    return path if path.name not in ("", "..") else path.resolve()


def check_free(path: Path, overwrite: bool) -> None:
    """CheckpointError where something is at the path and may not be overwritten."""
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path}: is there already; give another name, or --overwrite")


# ---- commands -------------------------------------------------------------------------------------------------------


def export(
    source: Path, out: Path | None, packing: Packing, state: Mapping[str, Tensor] | None, overwrite: bool
) -> str:
    """Packs a model's folder, or the state dict that was read from a file."""
    source = _with_name(source)
    out = out or (
        source.with_name(f"{source.name}-sparse") if state is None else source.with_suffix(f".sparse{SUFFIX}")
    )
    check_free(out, overwrite)
    if state is None:
        folders.pack_folder(source, out, packing)
    else:
        sparse_file.write_state(state, out, packing)
    return verify(out)


def unpack(source: Path, out: Path | None, overwrite: bool) -> str:
    """Writes the dense file or folder that a packed one stands for."""
    source = _with_name(source)
    stem = source.name.removesuffix(SUFFIX).removesuffix("-sparse").removesuffix(".sparse")
    out = out or source.with_name(f"{stem}-dense{'' if source.is_dir() else SUFFIX}")
    check_free(out, overwrite)
    if source.is_dir():
        folders.unpack_folder(source, out)
    else:
        sparse_file.write_dense(source, out)
    return f"{out}: an ordinary {'folder' if source.is_dir() else 'safetensors file'} again"


def verify(path: Path) -> str:
    """Reads every tensor, which checks sums, counts and zeros, and says what there is."""
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
    """Counts of tensors, weights, zeros and bytes, summed over files."""

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
    with opened(path) as reader:
        for name in reader:
            tensor, head = reader.read(name), reader.heads[name]
            weights, zeros = (tensor.numel(), head.zeros) if head else (0, 0)
            total += Total(bool(head), not head, weights, zeros, 0, tensor.nbytes)
    return total + Total(stored=path.stat().st_size)


def packed_table(path: Path) -> str:
    """A row for each packed weight: shape, units, zeros, bytes, and these over the dense bytes and the entropy."""
    head = ("weight", "shape", "unit", "zeros", "bytes", "of dense", "of bound")
    rows: list[tuple[str, ...]] = []
    others, dense_bytes = 0, 0
    with opened(path) as reader:
        for name in reader:
            weight, packed = reader.read(name), reader.heads[name]
            dense_bytes += weight.nbytes
            if packed is None:
                others += 1
                continue
            size = reader.stored(name)
            bound = bound_bytes(weight.to(packed.stored_dtype), packed.units, packed.values)
            shape, zeros = "x".join(map(str, packed.shape)), f"{packed.zeros / max(weight.numel(), 1):.2%}"
            share = f"{size / max(weight.nbytes, 1):.2%}"
            above = f"{size / bound:.3f}" if bound else ""
            rows.append((name, shape, str(packed.units), zeros, f"{size:,}", share, above))
    lines = [text_table(head, rows, right=head[3:])] if rows else []
    lines.append(f"{len(rows)} packed, {others} other tensors: {_share(path.stat().st_size, dense_bytes)}")
    return "\n".join(lines)
