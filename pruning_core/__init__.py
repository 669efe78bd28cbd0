"""Sparse training for PyTorch: score, fold, rank, cut.

``import pruning_core as pc``: every documented name is ``pc.<name>``, imported when it is first used. ``__init__.pyi``
says where each lives; this file reads it, so that the list stands once.
"""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

from pruning_core.integrations.when_imported import when_imported as _when_imported

__version__ = "0.1.0"

_HOMES = {
    name: home
    for home, name in re.findall(
        r"^from (\S+) import (\w+) as \w+$", Path(__file__).with_suffix(".pyi").read_text(), re.M
    )
}
__all__ = [*_HOMES, "__version__"]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pruning_core' has no attribute {name!r}")
    home = import_module(_HOMES[name]) if _HOMES[name] != __name__ else None
    found = import_module(f"{__name__}.{name}") if home is None else getattr(home, name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


def _teach_transformers() -> None:
    from pruning_core.integrations.transformers import loader  # noqa: F401


_when_imported("transformers.quantizers.auto", _teach_transformers)
