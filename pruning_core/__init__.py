"""Sparse training for PyTorch: score, fold, rank, cut."""

from pruning_core.checkpoint import CheckpointError as CheckpointError
from pruning_core.config import WeightPruningConfig as WeightPruningConfig
from pruning_core.masks import Pruning as Pruning

__version__ = "0.1.0"
