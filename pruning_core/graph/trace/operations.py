"""Sets of operation names: which consume channels, which take sizes, which create tensors."""

from __future__ import annotations

CONSUMERS = frozenset(
    (
        "linear addmm conv1d conv2d conv3d convolution _convolution conv_transpose1d conv_transpose2d "
        "conv_transpose3d matmul mm bmm mv dot vdot baddbmm addbmm einsum _grouped_mm scaled_dot_product_attention "
        "lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell mean sum norm linalg_vector_norm "
        "bilinear _weight_norm _weight_norm_interface"
    ).split()
)
"""Sum over channels: a removed channel must read as zero there."""

CHANNELS_FIRST_NORMS = frozenset(["batch_norm", "instance_norm"])
LAST_DIM_NORMS = frozenset(["layer_norm", "rms_norm"])

STATISTICS = frozenset(
    (
        "mean sum amax amin max min var std var_mean std_mean norm linalg_vector_norm prod any all argmax argmin "
        "logsumexp median nanmedian mode kthvalue count_nonzero nansum nanmean aminmax"
    ).split()
)
"""Make one number of many: over channels, of the kept ones."""

SCANS = frozenset(
    "softmax _softmax log_softmax _log_softmax _safe_softmax cumsum cumprod logcumsumexp cummax cummin softmin".split()
)
"""Give each of many numbers one that depends on the others: over channels, on the kept ones."""

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
