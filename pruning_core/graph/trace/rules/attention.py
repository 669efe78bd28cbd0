"""Fused attention: removes whole heads or, with ``narrow_heads``, the same channels of every head."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from pruning_core.graph.trace.labels import compact, holds_any, varies
from pruning_core.graph.trace.recorder import Call, Recorder
from pruning_core.graph.trace.rules.table import rule
from pruning_core.graph.trace.shadows import as_activation


@rule("scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu")
def attention(trace: Recorder, call: Call) -> Any:
    """``scaled_dot_product_attention``: ties query, key and value by head, or channels across heads."""
    query, key, value = (trace.activation(call, name) for name in ("query", "key", "value"))
    one = query.dim() < 4
    if one:
        query, key, value = (each.unsqueeze(-3) for each in (query, key, value))
    if one or trace.labels.narrow_heads:
        _narrow(trace, call, query, key, value)
    else:
        _whole(trace, call, query, key, value)
    heads, kept = query.shape[-3], value.shape[-3]
    out = value if kept == heads else value.repeat_interleave(heads // kept, dim=-3)
    pairs = query.shape[-2] * key.shape[-2] * math.prod(query.shape[:-3])
    for labels in (query, out):
        trace.cost([labels.reshape(-1, *labels.shape[-3:])[0, :, 0, :].reshape(-1)], rows=pairs)
    given = out.narrow(-2, 0, 1)
    return compact((given.squeeze(-3) if one else given).expand(call.result.shape))


def _whole(trace: Recorder, call: Call, query: Tensor, key: Tensor, value: Tensor) -> None:
    """A head goes with its query, key and value; with grouped queries all that share a key."""
    firsts = [_head_labels(trace, each) for each in (query, key, value)]
    repeated = [each.repeat_interleave(query.shape[-3] // len(each)) for each in firsts]
    trace.labels.tie(repeated[0], repeated[1])
    trace.labels.tie(repeated[0], repeated[2])
    _mask(trace, call, repeated[0])


def _narrow(trace: Recorder, call: Call, query: Tensor, key: Tensor, value: Tensor) -> None:
    """All heads stay, and lose the same of their channels. The default scale comes from the query's, which stay."""
    widths = [each.movedim(-1, 0).reshape(each.shape[-1], -1) for each in (query, key, value)]
    query, key, _ = (trace.labels.tie_along(each, 1)[:, 0] for each in widths)
    if call["scale"] is None:
        trace.labels.freeze(query, "attention scales by its width")
        trace.labels.freeze(key, "attention scales by its width")
    else:
        trace.labels.tie(query, key)
        trace.products.append((trace.labels.place, query))
    trace.freeze(call.shadow("attn_mask"), "masks heads, which stay")


def _head_labels(trace: Recorder, labels: Tensor) -> Tensor:
    by_head = labels.movedim(-3, 0).reshape(labels.shape[-3], -1)
    return trace.labels.tie_along(by_head, 1)[:, 0]


def _mask(trace: Recorder, call: Call, heads: Tensor) -> None:
    """A mask of each head goes with it; one that is handed from layer to layer takes their heads along."""
    tensor, shadow = call["attn_mask"], call.shadow("attn_mask")
    if not isinstance(tensor, Tensor):
        return
    bare = shadow is None or (isinstance(shadow, Tensor) and not holds_any(shadow))
    if bare and tensor.dim() > 2 and tensor.shape[-3] == len(heads) > 1:
        trace.adopt(tensor, heads.view(-1, 1, 1).expand(tensor.shape))
    elif shadow is not None:
        mask = as_activation(trace.labels, shadow, tuple(tensor.shape), trace.activation(call, "query"))
        if mask.dim() > 2 and mask.shape[-3] == len(heads) and varies(mask, mask.dim() - 3):
            by_head = mask.movedim(-3, 0).reshape(len(heads), -1)
            trace.labels.tie(by_head, heads[:, None].expand(by_head.shape))
        else:
            trace.freeze(shadow, "masks all heads")
