"""The widths that PyTorch's own modules keep as attributes, read from the shapes of their parameters."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


def widths(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that follow from the current shapes of its parameters."""
    if isinstance(module, _ConvNd):
        return _conv(module)
    if isinstance(module, nn.Linear):
        return {"in_features": module.weight.shape[1], "out_features": module.weight.shape[0]}
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return {"embedding_dim": module.weight.shape[1]}
    if isinstance(module, nn.LayerNorm | nn.RMSNorm) and module.weight is not None:
        return {"normalized_shape": tuple(module.weight.shape)}
    if isinstance(module, _NormBase):
        known = module.weight if module.weight is not None else module.running_mean
        return {} if known is None else {"num_features": known.shape[0]}
    if isinstance(module, nn.GroupNorm) and module.weight is not None:
        channels = module.weight.shape[0]
        alone = module.num_groups == module.num_channels
        return {"num_channels": channels, **({"num_groups": channels} if alone else {})}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": module.weight.numel()}
    if isinstance(module, nn.RNNBase):
        return _recurrent(module)
    if isinstance(module, nn.RNNCellBase):
        return {"input_size": module.weight_ih.shape[1], "hidden_size": module.weight_hh.shape[1]}
    if isinstance(module, nn.MultiheadAttention):
        return _attention(module)
    return {}


def _conv(module: _ConvNd) -> dict[str, Any]:
    """A depthwise convolution goes on having one group for each channel; other groups stay as many."""
    first, second = module.weight.shape[:2]
    depthwise = module.groups == module.in_channels and module.groups > 1
    groups = first if depthwise and isinstance(module, _ConvTransposeNd) else module.groups
    if depthwise and not isinstance(module, _ConvTransposeNd):
        groups = first // (module.out_channels // module.in_channels)
    if isinstance(module, _ConvTransposeNd):
        return {"in_channels": first, "out_channels": second * groups, "groups": groups}
    return {"in_channels": second * groups, "out_channels": first, "groups": groups}


def _recurrent(module: nn.RNNBase) -> dict[str, Any]:
    gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
    first, again = (dict(module.named_parameters())[name] for name in ("weight_ih_l0", "weight_hh_l0"))
    sizes = {"input_size": first.shape[1], "hidden_size": first.shape[0] // gates}
    return {**sizes, **({"proj_size": again.shape[1]} if module.proj_size else {})}


def _attention(module: nn.MultiheadAttention) -> dict[str, Any]:
    query = module.in_proj_weight if module.in_proj_weight is not None else module.q_proj_weight
    width = query.shape[1]
    key = width if module.in_proj_weight is not None else module.k_proj_weight.shape[1]
    value = width if module.in_proj_weight is not None else module.v_proj_weight.shape[1]
    return {"embed_dim": width, "num_heads": width // module.head_dim, "kdim": key, "vdim": value}
