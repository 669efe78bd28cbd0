"""Sets of operation names: which consume channels, which take sizes, which create tensors."""

from __future__ import annotations

CONSUMERS = frozenset(
    (
        "linear addmm conv1d conv2d conv3d convolution _convolution conv_transpose1d conv_transpose2d "
        "conv_transpose3d matmul mm bmm mv dot baddbmm addbmm einsum _grouped_mm scaled_dot_product_attention lstm "
        "gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell mean sum norm linalg_vector_norm "
        "bilinear"
    ).split()
)
"""Sum over channels: a removed channel must read as zero there."""

LAST_DIM_NORMS = frozenset(["layer_norm", "rms_norm"])

SIZED = frozenset(
    (
        "view _unsafe_view reshape expand unflatten slice narrow split split_with_sizes select index repeat zeros "
        "ones empty full new_zeros new_ones new_empty new_full arange full_like tensor_split item _local_scalar_dense "
        "fill_ layer_norm group_norm as_strided"
    ).split()
)
"""Take sizes as numbers: these may change with a cut, by any amount."""

UNSTEADY = frozenset(["contiguous"])
"""Runs only where a tensor is not contiguous, which a cut may change."""

FRESH = frozenset(["lift_fresh", "lift_fresh_copy", "detach_"])
"""Makes a tensor of a number that the code computed."""
