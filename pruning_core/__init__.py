"""Sparse training for PyTorch: score, fold, rank, cut."""

from pruning_core.checkpoint import CheckpointError as CheckpointError
from pruning_core.config import WeightPruningConfig as WeightPruningConfig
from pruning_core.masks import Pruning as Pruning
from pruning_core.when_imported import when_imported as _when_imported

__version__ = "0.1.0"


def _teach_transformers() -> None:
    from pruning_core.export import transformers_loader  # noqa: F401


_when_imported("transformers.quantizers.auto", _teach_transformers)
