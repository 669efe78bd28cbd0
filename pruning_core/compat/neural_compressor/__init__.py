"""Neural Compressor's pruner (1.x ``pytorch_pruner``, 2.x ``compression.pruner``): the same names and hooks.

Import lines are all that changes; docs/coming-from-neural-compressor.md lists every name.
"""

from pruning_core.compat.neural_compressor.auto_slim import model_slim, parse_auto_slim_config
from pruning_core.compat.neural_compressor.prepare import (
    CompressionManager,
    Config,
    prepare_compression,
    prepare_pruning,
)
from pruning_core.compat.neural_compressor.pruning import (
    Pruning,
    WeightPruningConfig,
    get_sparsity_ratio,
    parse_to_prune,
)

__all__ = [
    "CompressionManager",
    "Config",
    "Pruning",
    "WeightPruningConfig",
    "get_sparsity_ratio",
    "model_slim",
    "parse_auto_slim_config",
    "parse_to_prune",
    "prepare_compression",
    "prepare_pruning",
]
