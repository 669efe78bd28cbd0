"""What a pruned model is shipped as: small files that load bit for bit, ONNX, 2:4 kernels."""

from pruning_core.export.huggingface import save_pretrained_sparse as save_pretrained_sparse
from pruning_core.export.onnx_model import export_onnx as export_onnx
from pruning_core.export.semi_structured import check_semi_structured as check_semi_structured
from pruning_core.export.semi_structured import to_semi_structured_ as to_semi_structured_
from pruning_core.export.sparse_file import load_sparse as load_sparse
from pruning_core.export.sparse_file import load_sparse_into as load_sparse_into
from pruning_core.export.sparse_file import read_metadata as read_metadata
from pruning_core.export.sparse_file import save_sparse as save_sparse
