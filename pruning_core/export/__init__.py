"""Hand-over to runtimes: ONNX files, and torch's kernels for 2:4 weights."""

from pruning_core.export.onnx_model import export_onnx as export_onnx
from pruning_core.export.semi_structured import check_semi_structured as check_semi_structured
from pruning_core.export.semi_structured import to_semi_structured_ as to_semi_structured_
