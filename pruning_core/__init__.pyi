"""Every public name and where it lives. ``__init__.py`` reads this file and imports a name when it is first used."""

from pruning_core import checkpoint as checkpoint
from pruning_core import compat as compat
from pruning_core.channels.files import load_slim as load_slim
from pruning_core.channels.files import save_slim as save_slim
from pruning_core.channels.options import ChannelOptions as ChannelOptions
from pruning_core.channels.planner import plan_channels as plan_channels
from pruning_core.channels.pruner import Pruner as Pruner
from pruning_core.channels.report import ChannelReport as ChannelReport
from pruning_core.channels.slim import Slim as Slim
from pruning_core.channels.slim import slim as slim
from pruning_core.checkpoint import CheckpointError as CheckpointError
from pruning_core.cli.inspection import inspect as inspect
from pruning_core.criteria import CRITERIA as CRITERIA
from pruning_core.criteria import Criterion as Criterion
from pruning_core.criteria import Slices as Slices
from pruning_core.distillation.detections import DetectionDistillation as DetectionDistillation
from pruning_core.distillation.detections import Detections as Detections
from pruning_core.distillation.divergences import DISTILLATIONS as DISTILLATIONS
from pruning_core.distillation.divergences import Distillation as Distillation
from pruning_core.distillation.outputs import LogitDistillation as LogitDistillation
from pruning_core.distillation.outputs import Outputs as Outputs
from pruning_core.export.onnx_model import export_onnx as export_onnx
from pruning_core.export.semi_structured import check_semi_structured as check_semi_structured
from pruning_core.export.semi_structured import to_semi_structured_ as to_semi_structured_
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
from pruning_core.integrations.transformers.callback import PruningCallback as PruningCallback
from pruning_core.integrations.transformers.folder import save_pretrained_sparse as save_pretrained_sparse
from pruning_core.latency import relative_latency as relative_latency
from pruning_core.masks.config import WeightPruningConfig as WeightPruningConfig
from pruning_core.masks.options import PrunerOptions as PrunerOptions
from pruning_core.masks.pruning import Pruning as Pruning
from pruning_core.masks.report import SparsityReport as SparsityReport
from pruning_core.patterns import PATTERNS as PATTERNS
from pruning_core.patterns import Pattern as Pattern
from pruning_core.patterns import parse_pattern as parse_pattern
from pruning_core.schedules import SCHEDULES as SCHEDULES
from pruning_core.schedules import Schedule as Schedule
from pruning_core.sparse_format.sparse_file import load_sparse as load_sparse
from pruning_core.sparse_format.sparse_file import load_sparse_into as load_sparse_into
from pruning_core.sparse_format.sparse_file import read_metadata as read_metadata
from pruning_core.sparse_format.sparse_file import save_sparse as save_sparse

__version__: str
__all__: list[str]
