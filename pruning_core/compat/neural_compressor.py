"""Neural Compressor's pruner (1.x ``pytorch_pruner``, 2.x ``compression.pruner``): the same names and hooks."""

from pruning_core.masks.config import WeightPruningConfig
from pruning_core.masks.pruning import Pruning

__all__ = ["Pruning", "WeightPruningConfig"]
