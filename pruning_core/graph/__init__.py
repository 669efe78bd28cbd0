"""Coupled channels: found by running the model, removed exactly.

``trace`` runs the model and labels its channels, ``couple`` finds which live and die together, ``cut`` removes them.
"""

from pruning_core.graph.couple.groups import ChannelGroup as ChannelGroup
from pruning_core.graph.cut.masked import Masked as Masked
from pruning_core.graph.cut.masked import masked_ as masked_
from pruning_core.graph.cut.structure import apply_structure as apply_structure
from pruning_core.graph.cut.structure import expanded as expanded
from pruning_core.graph.cut.structure import structure as structure
from pruning_core.graph.cut.surgery import Slimmed as Slimmed
from pruning_core.graph.cut.surgery import slim_ as slim_
from pruning_core.graph.errors import GraphError as GraphError
from pruning_core.graph.graph import ChannelGraph as ChannelGraph
from pruning_core.graph.plan import Plan as Plan
