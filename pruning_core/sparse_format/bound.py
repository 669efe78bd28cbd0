"""A lower bound on the packed size of a weight: its entropy, with signs and mantissas as noise."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from pruning_core.sparse_format.packed import as_bits
from pruning_core.sparse_format.streams import nonzero
from pruning_core.sparse_format.units import Blocks, Units, entropy

EXPONENT_BITS = {"F64": 11, "F32": 8, "F16": 5, "BF16": 8}


def bound_bytes(weight: Tensor, units: Units, dtype: str) -> float:
    """``units * H(share) + stored * (sign and mantissa bits + H(exponents))``, in bytes.

    ``H(share)`` is the entropy of kept or not, per unit; for N:M it is ``log2 C(M, N)`` per group. Units and exponents
    are taken as independent.
    """
    bits = as_bits(weight)
    kept = nonzero(bits)
    if isinstance(units, Blocks):
        mask = units.mask_bits(units.alive(kept))
    else:
        mask = math.log2(units.combinations) * kept.size / units.m
    values = bits[units.stored(kept)]
    width, size = EXPONENT_BITS[dtype], 8 * bits.itemsize
    exponents = (values >> (size - 1 - width)) & ((1 << width) - 1)
    _, counts = np.unique(exponents, return_counts=True)
    return (mask + values.size * (size - width) + values.size * entropy(counts)) / 8
