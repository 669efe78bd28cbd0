"""The names of ``torch.ao.pruning``'s structured pruning. Nothing here needs ``torch.ao`` to exist."""

from pruning_core.channels.row_masks import FakeStructuredSparsity as FakeStructuredSparsity
from pruning_core.compat.torch_ao.pruners import FPGMPruner as FPGMPruner
from pruning_core.compat.torch_ao.pruners import LSTMSaliencyPruner as LSTMSaliencyPruner
from pruning_core.compat.torch_ao.pruners import SaliencyPruner as SaliencyPruner
from pruning_core.compat.torch_ao.schedulers import BaseScheduler as BaseScheduler
from pruning_core.compat.torch_ao.schedulers import CubicSL as CubicSL
from pruning_core.compat.torch_ao.schedulers import LambdaSL as LambdaSL
from pruning_core.compat.torch_ao.sparsifier import BaseStructuredSparsifier as BaseStructuredSparsifier
from pruning_core.compat.torch_ao.sparsifier import (
    _get_default_structured_pruning_patterns as _get_default_structured_pruning_patterns,
)
from pruning_core.compat.torch_ao.sparsifier import (
    default_structured_pruning_patterns as default_structured_pruning_patterns,
)
