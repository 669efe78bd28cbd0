"""Names of other pruning libraries, mapped to this package.

``pc.compat.neural_compressor``, ``pc.compat.torch_ao`` and ``pc.compat.sensetime`` are imported when first used.
"""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    if name not in ("neural_compressor", "sensetime", "torch_ao"):
        raise AttributeError(f"module 'pruning_core.compat' has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")
