"""One weight as a self-describing row of bytes, and back, bit for bit.

Layout: ``"PCsp" | length of the head | CRC-32 of the head | head, JSON | streams, one after the other``.

The head: dtype and shape of the weight, its units, the number of stored values, the number of zeros, name, coding and
length of each stream, and the CRC-32 of all streams. Stream ``mask`` says where values are stored (see ``units``).
``values`` are these values, or ``exponents`` and ``rest`` the two halves of them (see ``streams``). ``signs`` are the
signs of the zeros that are not stored, where some are negative.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pruning_core.checkpoint import Bytes, CheckpointError, pack_bits, unpack_bits
from pruning_core.sparse_format import units as units_of
from pruning_core.sparse_format.container import read_shape
from pruning_core.sparse_format.streams import (
    BITS,
    HUFFMAN,
    PLAIN,
    Piece,
    Stream,
    coded,
    decoded,
    join,
    nonzero,
    split,
)

MAGIC = b"PCsp"
START = struct.Struct("<4sII")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
CODECS = ("raw", "entropy")
WORTH = 0.9
"""The largest share of the dense bytes that is worth packing."""
MAX_EXPANSION = 4096  # a bit may stand for a whole channel of zeros, but a model is not made of them
ALWAYS_FITS = 2**26
NOISE = 0.78
"""The share of its bits that a Huffman-coded value takes, about; only for the choice of units."""


@dataclass(frozen=True)
class Head:
    """The head of a packed weight; ``streams``: (name, coding, length in bytes) each."""

    dtype: str
    shape: tuple[int, ...]
    units: units_of.Units
    values: str
    stored: int
    zeros: int
    streams: tuple[tuple[str, str, int], ...]
    crc32: int

    def to_plain(self) -> dict[str, Any]:
        """The head as plain data, in the order in which it is written."""
        streams = [list(stream) for stream in self.streams]
        plain = {"dtype": self.dtype, "shape": list(self.shape), "units": units_of.to_plain(self.units)}
        return (
            plain
            | {k: getattr(self, k) for k in ("values", "stored", "zeros")}
            | {"streams": streams, "crc32": self.crc32}
        )

    @property
    def nbytes(self) -> int:
        """Number of bytes of the unpacked weight."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype of the stored values; at most as wide as that of the weight."""
        return DTYPES[self.values]

    @property
    def payload(self) -> int:
        """Number of bytes of all streams."""
        return sum(length for _, _, length in self.streams)


# ---- packing --------------------------------------------------------------------------------------------------------


def kept_of(weight: Tensor) -> NDArray[np.bool_] | None:
    """Bool: where the weight is not zero, by its bits, since torch may flush denormals.

    None for a weight that is not packed: not floating point, fewer than two axes, or more than ``WORTH`` is kept.
    """
    if weight.dtype not in NAMES or weight.dim() < 2 or not weight.numel():
        return None
    kept = nonzero(as_bits(weight))
    return kept if np.count_nonzero(kept) <= WORTH * kept.size else None


def pack(
    weight: Tensor, kept: NDArray[np.bool_], codec: str, values: str, units: units_of.Units | None = None
) -> tuple[Head, list[Piece]] | None:
    """The head, and the pieces to write one after the other; None where they exceed ``WORTH`` of the dense bytes."""
    bits = as_bits(weight.to(DTYPES[values]))
    if values != NAMES[weight.dtype]:
        kept = nonzero(bits)  # what is rounded may have become zero
    zeros = kept.size - int(np.count_nonzero(kept))
    shrink = codec == "entropy"
    units = units or units_of.find(kept, 8.0 * bits.itemsize * (NOISE if shrink else 1.0))
    stored = units.stored(kept)
    streams = {"mask": coded(units.encode(kept), shrink=shrink)}
    signs = _signs(bits, stored)
    found = bits[stored]
    del stored
    streams |= _value_streams(found, shrink=shrink)
    if signs is not None:
        streams["signs"] = coded(pack_bits(signs), shrink=shrink)
    described = tuple((name, stream.coding, len(stream.data)) for name, stream in streams.items())
    data = [stream.data for stream in streams.values()]
    head = Head(NAMES[weight.dtype], tuple(weight.shape), units, values, len(found), zeros, described, _crc32(data))
    pieces = [_start(head), *data]
    return (head, pieces) if sum(map(len, pieces)) <= WORTH * weight.nbytes else None


def _value_streams(found: NDArray[np.unsignedinteger], *, shrink: bool) -> dict[str, Stream]:
    if shrink:
        exponents, rest = split(found)
        return {"exponents": coded(exponents, shrink=True), "rest": Stream(PLAIN, rest.data)}
    return {"values": Stream(PLAIN, found.astype(found.dtype.newbyteorder("<"), copy=False).view(np.uint8).data)}


def _crc32(pieces: Iterable[Piece]) -> int:
    value = 0
    for piece in pieces:
        value = zlib.crc32(piece, value)
    return value


def _signs(bits: NDArray[Any], stored: NDArray[np.bool_]) -> NDArray[np.bool_] | None:
    """Which zeros that are not stored are -0.0, as ``weight * mask`` leaves them; None where there are none."""
    negative = np.array(1 << (8 * bits.itemsize - 1), dtype=bits.dtype)
    signs: NDArray[np.bool_] = bits == negative
    signs &= ~stored
    return signs[~stored] if signs.any() else None


def _start(head: Head) -> bytes:
    text = json.dumps(head.to_plain(), separators=(",", ":")).encode()
    return START.pack(MAGIC, len(text), zlib.crc32(text)) + text


def as_bits(weight: Tensor) -> NDArray[np.unsignedinteger]:
    """The weight as unsigned integers; a view where it is contiguous and on the CPU."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.itemsize]
    return weight.detach().cpu().contiguous().view(integer).numpy().view(BITS[weight.itemsize])


# ---- unpacking ------------------------------------------------------------------------------------------------------


def unpack(data: Bytes, expected: Head | None = None) -> Tensor:
    """The weight in ``data``; CheckpointError for damaged bytes, or a head that differs from ``expected``."""
    head, body = open_(data)
    if expected not in (None, head):
        raise CheckpointError("has a head that differs from what the table says of it")
    if zlib.crc32(body.data) != head.crc32:
        raise CheckpointError("its bytes were changed since they were written (CRC-32 differs)")
    pieces, position = {}, 0
    for name, coding, length in head.streams:
        pieces[name] = Stream(coding, body[position : position + length].data)
        position += length
    found = _values(head, pieces)
    stored = head.units.decode(_decoded(head, pieces, "mask"), head.shape)
    if np.count_nonzero(stored) != head.stored:
        raise CheckpointError(f"has {np.count_nonzero(stored):,} places for the {head.stored:,} values it stores")
    signs = _decoded(head, pieces, "signs") if "signs" in pieces else None
    del data, body, pieces  # as large as the values
    bits = np.zeros(head.shape, dtype=found.dtype)
    bits[stored] = found
    if signs is not None:
        negative = unpack_bits(signs, stored.size - head.stored).astype(found.dtype)
        bits[~stored] = negative << (8 * found.itemsize - 1)
    signed = torch.from_numpy(bits.view(np.dtype(f"i{found.itemsize}")))
    return signed.view(DTYPES[head.values]).to(DTYPES[head.dtype])


def _values(head: Head, pieces: dict[str, Stream]) -> NDArray[np.unsignedinteger]:
    size = DTYPES[head.values].itemsize
    if "values" in pieces:
        found = (
            _decoded(head, pieces, "values").view(np.dtype(BITS[size]).newbyteorder("<")).astype(BITS[size], copy=False)
        )
    else:
        found = join(_decoded(head, pieces, "exponents"), _decoded(head, pieces, "rest"), size)
    zeros = math.prod(head.shape) - int(np.count_nonzero(nonzero(found)))
    if zeros != head.zeros:
        raise CheckpointError(f"must hold {head.zeros:,} zeros, got {zeros:,}")
    return found


def _decoded(head: Head, pieces: dict[str, Stream], name: str) -> Bytes:
    try:
        return decoded(pieces[name], _length(head, name))
    except CheckpointError as error:
        raise CheckpointError(f"its {name} stream {error}") from None


def open_(data: Bytes) -> tuple[Head, Bytes]:
    """The checked head, and the bytes after it."""
    if len(data) < START.size:
        raise CheckpointError(f"is cut short, at {len(data)} bytes")
    magic, length, crc32 = START.unpack(data[: START.size].tobytes())
    text = data[START.size : START.size + length].tobytes()
    if magic != MAGIC or len(text) != length or zlib.crc32(text) != crc32:
        raise CheckpointError("does not begin with the head of a packed weight")
    head = read_head(_json(text))
    body = data[START.size + length :]
    if head.payload != len(body):
        raise CheckpointError(f"must hold {head.payload:,} bytes after its head, got {len(body):,}")
    return head, body


def _json(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"has a head that is not JSON ({error})") from None


def read_head(plain: Any) -> Head:
    """The head from parsed JSON; CheckpointError where a field is missing, unknown or contradicts another."""
    match plain:
        case {
            "dtype": str(dtype),
            "shape": [*shape],
            "units": {} as units,
            "values": str(values),
            "stored": int(stored),
            "zeros": int(zeros),
            "streams": [*streams],
            "crc32": int(crc32),
        } if len(plain) == 8 and dtype in DTYPES and values in DTYPES:
            sizes = read_shape(shape)
            head = Head(
                dtype,
                sizes,
                units_of.from_plain(units, sizes),
                values,
                stored,
                zeros,
                tuple(map(_stream, streams)),
                crc32,
            )
        case _:
            raise CheckpointError(f"has a head of another kind, got {plain!r:.200}")
    _check(head)
    return head


def _stream(plain: Any) -> tuple[str, str, int]:
    match plain:
        case [str(name), "plain" | "huffman" as coding, int(length)] if 0 <= length < 2**48:
            return name, coding, length
    raise CheckpointError(f"has a stream of another kind, got {plain!r:.80}")


def _check(head: Head) -> None:
    """Checks the head alone, before anything of the size that it claims is allocated."""
    count, names = math.prod(head.shape), [name for name, _, _ in head.streams]
    if names not in (
        ["mask", *form, *signs] for form in (["values"], ["exponents", "rest"]) for signs in ([], ["signs"])
    ):
        raise CheckpointError(f"has streams of another kind, got {names!r:.80}")
    if not (0 <= head.stored <= count and 0 <= count - head.stored <= head.zeros <= count):
        raise CheckpointError(f"has {count:,} weights, which cannot be {head.stored:,} stored and {head.zeros:,} zeros")
    if DTYPES[head.values].itemsize > DTYPES[head.dtype].itemsize:
        raise CheckpointError(f"stores {head.values} values of a {head.dtype} weight")
    for name, coding, length in head.streams:
        shortest = -(-_length(head, name) // 8) if coding == HUFFMAN else _length(head, name)
        if length < shortest or (coding == PLAIN and length > shortest):
            raise CheckpointError(f"has a {name} stream of {length:,} bytes, which must be {shortest:,}")
    check_expansion(head.nbytes, head.payload)


def check_expansion(nbytes: int, stored: int) -> None:
    """CheckpointError where ``stored`` bytes unpack to more than ``ALWAYS_FITS + MAX_EXPANSION * stored``."""
    if nbytes > ALWAYS_FITS + MAX_EXPANSION * stored:
        raise CheckpointError(f"would become {nbytes:,} bytes, got {stored:,} that are stored; no model is as empty")


def _length(head: Head, name: str) -> int:
    """Number of bytes of a stream when it is decoded."""
    size = DTYPES[head.values].itemsize
    count = math.prod(head.shape)
    return {
        "mask": head.units.length(head.shape),
        "values": head.stored * size,
        "exponents": head.stored,
        "rest": head.stored * (size - 1),
        "signs": -(-(count - head.stored) // 8),
    }[name]
