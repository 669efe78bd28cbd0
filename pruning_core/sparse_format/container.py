"""Writes a ``.safetensors`` file as a stream, and checks every claim of one that is read.

Beside ``format: pt`` the metadata hold a table of all tensors with the CRC-32 of each, and the CRC-32 of the table.
The safetensors library reads these files. It can neither write a file whose sizes are not known in advance nor reject
duplicate names.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from pruning_core.checkpoint import Bytes, CheckpointError, write_atomically
from pruning_core.sparse_format.streams import Piece

VERSION = 1
OURS = "pruning_core"
CHECK = "pruning_core_crc32"
LONGEST_HEADER = 100_000_000
MOST_AXES = 64
LARGEST = 2**48
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: dtype, shape and bytes by the header, and its entry in the table (``note``)."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    note: dict[str, Any]


@dataclass(frozen=True)
class Header:
    """A checked header: the tensors, and ``start``, the position of the first byte of data."""

    entries: dict[str, Entry]
    about: dict[str, Any]
    """The JSON of the metadata without the table: ``version``, ``aliases``, ``metadata``."""
    start: int


# ---- writing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A tensor to be written. Its bytes are ``data``; None: they are in the scratch file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    crc32: int
    note: Mapping[str, Any]
    data: Piece | None


def dense_row(name: str, dtype: torch.dtype, shape: Sequence[int], data: Piece) -> Row:
    """A tensor that is stored as it is."""
    return Row(name, NAMES[dtype], tuple(shape), len(data), zlib.crc32(data), {}, data)


def scratch_row(name: str, pieces: Iterable[Piece], note: Mapping[str, Any], scratch: BinaryIO) -> Row:
    """A packed tensor. Its bytes go to the scratch file at once, so that only one tensor is in memory."""
    length, crc32 = 0, 0
    for piece in pieces:
        scratch.write(piece)
        length, crc32 = length + len(piece), zlib.crc32(piece, crc32)
    return Row(name, "U8", (length,), length, crc32, note, None)


def write(path: Path, about: Mapping[str, Any], rows: Sequence[Row], scratch: BinaryIO) -> None:
    """Writes header, dense tensors (wide dtypes first: all are aligned) and scratch file, atomically."""
    ordered = sorted(rows, key=lambda row: (row.data is None, -DTYPES[row.dtype].itemsize))
    header = _header(about, ordered)
    scratch.seek(0)

    def put(file: BinaryIO) -> None:
        file.write(header)
        for row in ordered:
            file.write(row.data or b"")
        shutil.copyfileobj(scratch, file, 1 << 20)

    write_atomically(path, put)


def _header(about: Mapping[str, Any], rows: Sequence[Row]) -> bytes:
    table = {row.name: {"dtype": row.dtype, "shape": row.shape, "crc32": row.crc32, **row.note} for row in rows}
    text = json.dumps({"version": VERSION, **about, "tensors": table}, separators=(",", ":"))
    metadata = {"format": "pt", OURS: text, CHECK: f"{zlib.crc32(text.encode()):08x}"}
    return _encoded(metadata, [(row.name, row.dtype, row.shape, row.nbytes) for row in rows])


def _encoded(metadata: Mapping[str, str], tensors: Iterable[tuple[str, str, Sequence[int], int]]) -> bytes:
    """The header of consecutive tensors, padded with spaces so that the first begins at a multiple of eight."""
    entries, position = {}, 0
    for name, dtype, shape, nbytes in tensors:
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + nbytes]}
        position += nbytes
    header = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    if len(header) > LONGEST_HEADER:
        raise CheckpointError(
            f"needs a header of {len(header):,} bytes, which safetensors cannot read; save it in parts"
        )
    return struct.pack("<Q", len(header)) + header


def write_plain(
    path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], read: Callable[[str], Piece]
) -> None:
    """Writes an ordinary safetensors file; ``read(name)`` returns the bytes of one tensor at a time."""
    ordered = sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name))
    sizes = (
        (n, NAMES[tensors[n][0]], tensors[n][1], math.prod(tensors[n][1]) * tensors[n][0].itemsize) for n in ordered
    )
    header = _encoded({"format": "pt"}, sizes)

    def put(file: BinaryIO) -> None:
        file.write(header)
        for name in ordered:
            file.write(read(name))

    write_atomically(path, put)


# ---- reading --------------------------------------------------------------------------------------------------------


def read_header(file: BinaryIO) -> Header:
    """The header; CheckpointError unless names, sizes, table and length of the file agree."""
    size = file.seek(0, 2)
    file.seek(0)
    raw = file.read(8)
    length = struct.unpack("<Q", raw)[0] if len(raw) == 8 else 0
    if not 0 < length <= min(size - 8, LONGEST_HEADER):
        raise CheckpointError(f"is not a whole safetensors file: {size:,} bytes, with a header of {length:,}")
    plain = _json(file.read(length))
    about = _table(plain.pop("__metadata__", None))
    table = about.pop("tensors")
    if list(table) != list(plain):
        raise CheckpointError(f"its table and its header name different tensors{_first_other(table, plain)}")
    entries = {name: _entry(name, plain[name], table[name]) for name in plain}
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            raise CheckpointError(
                f"{name}: begins at byte {entry.begin:,}, where {position:,} is next; tensors overlap or miss"
            )
        position = entry.end
    if 8 + length + position != size:
        raise CheckpointError(
            f"must be {8 + length + position:,} bytes long, got {size:,}; it is cut short or has more"
        )
    return Header(entries, about, 8 + length)


def _json(text: bytes) -> dict[str, Any]:
    try:
        plain = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"its header is not JSON ({error})") from None
    if not isinstance(plain, dict):
        raise CheckpointError(f"its header must be an object, got {type(plain).__name__}")
    return plain


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    plain = {}
    for name, value in pairs:
        if name in plain:
            raise ValueError(f"{name!r:.80} stands there twice")
        plain[name] = value
    return plain


def _table(metadata: Any) -> dict[str, Any]:
    match metadata:
        case {"format": "pt", "pruning_core": str(text), "pruning_core_crc32": str(check)}:
            pass
        case {"pruning_core": _}:
            raise CheckpointError("its metadata are damaged")
        case _:
            raise CheckpointError("has no table of pruning_core; an ordinary safetensors file is read by safetensors")
    raw = text.encode("utf-8", "surrogatepass")
    if check != f"{zlib.crc32(raw):08x}":
        raise CheckpointError("its table was changed since it was written (CRC-32 differs)")
    about = _json(raw)
    if about.get("version") != VERSION:
        raise CheckpointError(
            f"is of version {about.get('version')!r:.20}, this pruning_core reads {VERSION}; update it"
        )
    if not isinstance(about.get("tensors"), dict):
        raise CheckpointError("its table names no tensors")
    return about


def _entry(name: str, plain: Any, note: Any) -> Entry:
    with named(name):
        return _checked(plain, note)


@contextmanager
def named(name: str) -> Iterator[None]:
    """Puts the name of a file or tensor before the message of a CheckpointError."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from None


def _checked(plain: Any, note: Any) -> Entry:
    match plain, note:
        case (
            {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]},
            {"dtype": str(noted), "shape": [*noted_shape], "crc32": int()},
        ) if len(plain) == 3 and (dtype, shape) == (noted, noted_shape) and dtype in DTYPES:
            sizes = read_shape(shape)
            if 0 <= begin < LARGEST and end - begin == math.prod(sizes) * DTYPES[dtype].itemsize:
                return Entry(dtype, sizes, begin, end, note)
    raise CheckpointError(f"its entry in the header cannot be, got {plain!r:.200}")


def read_shape(shape: Sequence[Any]) -> tuple[int, ...]:
    """The shape; CheckpointError for one that numpy and torch cannot have, or of 2**48 elements or more."""
    size = 1
    for length in shape[: MOST_AXES + 1]:
        size *= max(length, 1) if type(length) is int and 0 <= length < LARGEST else LARGEST
        if size >= LARGEST:
            break
    if size >= LARGEST or len(shape) > MOST_AXES:
        raise CheckpointError(f"has a shape that cannot be, got {list(shape[:MOST_AXES])!r:.80}")
    return tuple(shape)


def _first_other(table: Mapping[str, Any], plain: Mapping[str, Any]) -> str:
    other = sorted(set(table) ^ set(plain))
    return f", got {other[0]!r:.80}" if other else ""


def read_bytes(file: BinaryIO, header: Header, name: str) -> Bytes:
    """The bytes of one tensor; CheckpointError where the file is cut short or their CRC-32 differs."""
    entry = header.entries[name]
    file.seek(header.start + entry.begin)
    data = np.empty(entry.end - entry.begin, dtype=np.uint8)
    got = file.readinto(data.data) if len(data) else 0  # type: ignore[attr-defined]
    if got != len(data):
        raise CheckpointError(f"is cut short, at {got:,} of {len(data):,} bytes")
    if zlib.crc32(data.data) != entry.note["crc32"]:
        raise CheckpointError("its bytes were changed since they were written (CRC-32 differs)")
    return data
