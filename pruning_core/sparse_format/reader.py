"""Reads a packed file tensor by tensor; errors are CheckpointErrors that name file and tensor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from pruning_core.checkpoint import CheckpointError, readable
from pruning_core.sparse_format import container, packed
from pruning_core.sparse_format.container import Entry, Header, named
from pruning_core.sparse_format.packed import Head


class PackedReader:
    """An open packed file with a checked header. ``heads``: name -> head of a packed weight, None for other tensors."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.header: Header = container.read_header(file)
        self.aliases = _aliases(self.header)
        self.metadata = _metadata(self.header)
        self.heads = {name: _head(name, entry) for name, entry in self.header.entries.items()}
        self.check_size(0)

    def __iter__(self) -> Iterator[str]:
        return iter(self.heads)

    def check_size(self, more: int) -> None:
        """Bounds what all tensors and ``more`` bytes unpack to by what is stored (``check_expansion``)."""
        stored = sum(self.stored(name) for name in self)
        packed.check_expansion(sum(map(self.nbytes, self)) + more, stored)

    def stored(self, name: str) -> int:
        """Number of bytes of a tensor in the file."""
        entry = self.header.entries[name]
        return entry.end - entry.begin

    def nbytes(self, name: str) -> int:
        """Number of bytes of a tensor once it is unpacked."""
        head = self.heads[name]
        return head.nbytes if head else self.stored(name)

    def kind(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """The dtype and shape of a tensor once it is unpacked."""
        head, entry = self.heads[name], self.header.entries[name]
        return (packed.DTYPES[head.dtype], head.shape) if head else (container.DTYPES[entry.dtype], entry.shape)

    def check(self, name: str) -> None:
        """CheckpointError unless the bytes of a tensor have the CRC-32 in the table."""
        with named(name):
            container.read_bytes(self.file, self.header, name)

    def read(self, name: str) -> Tensor:
        """A tensor, unpacked, on the CPU."""
        with named(name):
            head = self.heads[name]
            if head is not None:
                return packed.unpack(container.read_bytes(self.file, self.header, name), head)
            dtype, shape = self.kind(name)
            data = container.read_bytes(self.file, self.header, name)
            return torch.from_numpy(data).view(dtype).reshape(shape) if len(data) else torch.empty(shape, dtype=dtype)


@contextmanager
def opened(path: str | Path) -> Iterator[PackedReader]:
    """``with opened(path) as reader``: the file is closed at the end."""
    try:
        with readable(path), Path(path).open("rb") as file, named(str(path)):
            yield PackedReader(file)
    except MemoryError:
        raise CheckpointError(f"{path}: needs more memory than there is") from None


def _aliases(header: Header) -> dict[str, str]:
    aliases = header.about.get("aliases")
    match aliases:
        case dict() if all(isinstance(first, str) and first in header.entries for first in aliases.values()):
            if not set(aliases) & (header.entries.keys() | {"__metadata__"}):
                return aliases
    raise CheckpointError("its table ties weights that are not there")


def _metadata(header: Header) -> dict[str, str]:
    metadata = header.about.get("metadata")
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError("its table has no metadata")
    return metadata


def _head(name: str, entry: Entry) -> Head | None:
    note = entry.note.get("packed")
    if note is None:
        return None
    with named(name):
        if entry.dtype != "U8" or len(entry.shape) != 1:
            raise CheckpointError(f"is packed in {entry.dtype} of {len(entry.shape)} axes, where only bytes can be")
        return packed.read_head(note)
