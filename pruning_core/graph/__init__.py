"""Coupled channels: found by running the model, removed exactly."""

from pruning_core.graph.graph import ChannelGraph as ChannelGraph
from pruning_core.graph.groups import Group as Group
from pruning_core.graph.masking import Masked as Masked
from pruning_core.graph.masking import masked_ as masked_
from pruning_core.graph.plan import Plan as Plan
from pruning_core.graph.structure import apply_structure as apply_structure
from pruning_core.graph.structure import expanded as expanded
from pruning_core.graph.structure import structure as structure
from pruning_core.graph.surgery import Slimmed as Slimmed
from pruning_core.graph.surgery import slim_ as slim_
from pruning_core.graph.tracing import GraphError as GraphError
