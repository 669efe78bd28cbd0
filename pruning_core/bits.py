"""Flags as bits, eight to a byte, the first flag lowest."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pruning_core.checkpoint import CheckpointError

Bytes = NDArray[np.uint8]


def pack_bits(flags: NDArray[np.bool_]) -> Bytes:
    """bool (any shape) -> uint8 (ceil(n / 8),)."""
    return np.packbits(flags.reshape(-1), bitorder="little")


def unpack_bits(data: Bytes, count: int) -> NDArray[np.bool_]:
    """``count`` flags; CheckpointError unless the bits that fill up the last byte are zero."""
    if count % 8 and data[-1] >> (count % 8):
        raise CheckpointError(f"has a bit set behind its {count:,} bits")
    return np.unpackbits(data, count=count, bitorder="little").view(np.bool_)
