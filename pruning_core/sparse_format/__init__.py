"""Packed sparse safetensors: a bitmap over units, and the values that are kept. ``FORMAT.md`` specifies the bytes."""

from pruning_core.sparse_format.sparse_file import load_sparse as load_sparse
from pruning_core.sparse_format.sparse_file import load_sparse_into as load_sparse_into
from pruning_core.sparse_format.sparse_file import read_metadata as read_metadata
from pruning_core.sparse_format.sparse_file import save_sparse as save_sparse
