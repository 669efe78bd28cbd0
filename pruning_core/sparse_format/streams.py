"""Byte streams: Huffman codes by zlib, and the two halves of floating-point numbers.

The decoded length of a stream is known before it is read, so a hostile file cannot make more bytes.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pruning_core.checkpoint import Bytes, CheckpointError

Piece = memoryview | bytes
PLAIN, HUFFMAN = "plain", "huffman"
PART = 1 << 16
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Stream(NamedTuple):
    """Bytes and their coding, "plain" or "huffman"."""

    coding: str
    data: Piece


def coded(data: Bytes, *, shrink: bool) -> Stream:
    """Huffman codes of the bytes where they are shorter; no matches (LZ77), since weights have none."""
    if shrink:
        coder = zlib.compressobj(level=1, wbits=-15, memLevel=9, strategy=zlib.Z_HUFFMAN_ONLY)
        short = coder.compress(data.data) + coder.flush()
        if len(short) < len(data):
            return Stream(HUFFMAN, short)
    return Stream(PLAIN, data.data)


def decoded(stream: Stream, length: int) -> Bytes:
    """The ``length`` decoded bytes; CheckpointError where there are more or fewer."""
    if stream.coding == PLAIN:
        data = np.frombuffer(stream.data, dtype=np.uint8)
    else:
        decoder = zlib.decompressobj(wbits=-15)
        try:
            data = np.frombuffer(decoder.decompress(stream.data, length + 1), dtype=np.uint8)
        except zlib.error as error:
            raise CheckpointError(f"is not a Huffman stream ({error})") from None
        if not decoder.eof or decoder.unused_data:
            raise CheckpointError(f"holds more or less than {length:,} bytes")
    if len(data) != length:
        raise CheckpointError(f"must hold {length:,} bytes, got {len(data):,}")
    return data


def split(bits: NDArray[np.unsignedinteger]) -> tuple[Bytes, Bytes]:
    """``(exponents, rest)``: the top byte of each number rotated left by one bit, and its other bytes, little-endian.

    The top byte has the top eight bits below the sign: exponent bits (and three of the mantissa in F16), which are few
    and unequal in weights, hence short in Huffman codes. The rest, sign and mantissa, is noise.
    """
    size = bits.itemsize
    exponents = np.empty(len(bits), dtype=np.uint8)
    rest = np.empty((len(bits), size - 1), dtype=np.uint8)
    for part in _parts(len(bits)):
        turned = bits[part] << 1
        turned |= bits[part] >> (8 * size - 1)
        planes = turned.astype(turned.dtype.newbyteorder("<"), copy=False).view(np.uint8).reshape(-1, size)
        exponents[part], rest[part] = planes[:, -1], planes[:, :-1]
    return exponents, rest.reshape(-1)


def join(exponents: Bytes, rest: Bytes, size: int) -> NDArray[np.unsignedinteger]:
    """The inverse of ``split``, for numbers of ``size`` bytes."""
    rest = rest.reshape(-1, size - 1)
    bits = np.empty(len(exponents), dtype=BITS[size])
    for part in _parts(len(bits)):
        planes = np.empty((len(exponents[part]), size), dtype=np.uint8)
        planes[:, -1], planes[:, :-1] = exponents[part], rest[part]
        turned = planes.reshape(-1).view(np.dtype(BITS[size]).newbyteorder("<"))
        bits[part] = turned >> 1
        bits[part] |= turned.astype(BITS[size], copy=False) << (8 * size - 1)
    return bits


def nonzero(bits: NDArray[np.unsignedinteger]) -> NDArray[np.bool_]:
    """Bool: neither +0.0 nor -0.0, by the bits of floating-point numbers."""
    result = np.empty(bits.shape, dtype=np.bool_)
    flat, source = result.reshape(-1), bits.reshape(-1)
    magnitude = bits.dtype.type((1 << (8 * bits.itemsize - 1)) - 1)
    for part in _parts(len(source)):
        np.not_equal(source[part] & magnitude, 0, out=flat[part])
    return result


def _parts(length: int) -> Iterator[slice]:
    """Slices that fit into the processor's cache."""
    return (slice(first, first + PART) for first in range(0, length, PART))
