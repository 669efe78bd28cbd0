"""Masks of the gates of a recurrent layer that keep different hidden units, in equal number."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from pruning_core.channels.row_masks import RowMask


def align_gates(masks: Sequence[RowMask], undo: ExitStack) -> None:
    """Moves rows within each gate so that all gates of a layer remove the same hidden units.

    Of every gate the kept rows stay, in their order, as with ``torch.ao``: row i of two gates may come from different
    hidden units. Nothing is moved where the masks agree or keep different numbers, or where one of the two weights of a
    layer has no mask.
    """
    layers: dict[tuple[int, str], list[RowMask]] = {}
    for mask in masks:
        if isinstance(mask.module, nn.RNNBase) and mask.name.startswith(("weight_ih_", "weight_hh_")):
            layers.setdefault((id(mask.module), mask.name.removeprefix("weight_")[3:]), []).append(mask)
    for found in layers.values():
        if len(found) < 2:
            continue
        gates = [gate for mask in found for gate in mask.mask.split(_units(mask))]
        wanted = max(found, key=lambda mask: mask.name.startswith("weight_hh")).mask.split(_units(found[0]))[-1]
        if all(torch.equal(gate, wanted) for gate in gates) or len({int(gate.sum()) for gate in gates}) > 1:
            continue
        for mask in found:
            _align(mask, wanted, undo)
        names = ", ".join(mask.fqn for mask in found)
        warnings.warn(
            f"prune: the gates of {names} keep different hidden units; their kept rows are moved together, so train on",
            stacklevel=5,
        )


def _units(mask: RowMask) -> int:
    return int(mask.module.hidden_size)  # type: ignore[arg-type]


def _align(mask: RowMask, wanted: Tensor, undo: ExitStack) -> None:
    """Rows of the weight and of its bias; of a hidden weight the columns of each gate as well."""
    units, parameters = _units(mask), mask.module._parameters
    order = torch.empty(len(mask.mask), dtype=torch.int64, device=mask.mask.device)
    blocks = []
    for i, gate in enumerate(mask.mask.split(units)):
        block = torch.empty(units, dtype=torch.int64, device=order.device)
        for kept in (True, False):
            block[wanted == kept] = (gate == kept).nonzero().flatten()
        order[i * units : (i + 1) * units] = block + i * units
        blocks.append(block)
    weight = parameters[mask.name]
    assert weight is not None
    moved = weight.data[order]
    if mask.name.startswith("weight_hh"):
        parts = moved.split(units)
        moved = torch.cat([part[:, block] for part, block in zip(parts, blocks, strict=True)])
    _put(weight, moved, undo)
    bias = parameters.get(mask.name.replace("weight", "bias"))
    if bias is not None:
        _put(bias, bias.data[order], undo)
    undo.callback(mask.mask.copy_, mask.mask.clone())
    mask.mask.copy_(wanted.repeat(len(blocks)))


def _put(tensor: Tensor, data: Tensor, undo: ExitStack) -> None:
    undo.callback(setattr, tensor, "data", tensor.data)
    tensor.data = data
