"""Channels: scores them, plans which to remove, and reports what is left."""

from pruning_core.channels.planner import plan_channels as plan_channels
from pruning_core.channels.pruner import Pruner as Pruner
from pruning_core.channels.report import ChannelReport as ChannelReport
