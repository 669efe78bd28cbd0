"""Channels: which matter, which go."""

from pruning_core.channels import ckpt_helper as ckpt_helper
from pruning_core.channels.importance import IMPORTANCES as IMPORTANCES
from pruning_core.channels.planner import plan_channels as plan_channels
from pruning_core.channels.pruner import Pruner as Pruner
from pruning_core.channels.report import ChannelReport as ChannelReport
from pruning_core.channels.sparsifier import BaseStructuredSparsifier as BaseStructuredSparsifier
from pruning_core.channels.sparsifier import (
    _get_default_structured_pruning_patterns as _get_default_structured_pruning_patterns,
)
from pruning_core.channels.sparsifier import default_structured_pruning_patterns as default_structured_pruning_patterns
