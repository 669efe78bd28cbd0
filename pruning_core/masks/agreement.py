"""What data-parallel ranks must agree on: whether gradients are finite, and the masks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from pruning_core.masks.bits import parts
from pruning_core.masks.groups import MaskGroup
from pruning_core.masks.progressive import ProgressiveGroup
from pruning_core.masks.sharding import local
from pruning_core.masks.weight import MaskedWeight


def non_finite(gradients: Sequence[Tensor], groups: Sequence[MaskGroup]) -> Tensor:
    """Bool scalar on the gradients' device: whether any entry is inf or nan, on any rank that holds a shard.

    One read of the gradients: a sum is finite only if all its terms are. By parts, since half precision is copied.
    """
    sums = []
    for gradient in gradients:
        values = local(gradient.detach())
        values = values._values() if values.is_sparse else values
        wide = torch.promote_types(values.dtype, torch.float32)
        rows = values if values.dim() else values.unsqueeze(0)
        sums += [rows[part].sum(dtype=wide) for part in parts(rows.shape, rows.device)]
    ranks = next((group.ranks for group in groups if group.ranks is not None), None)
    device = sums[0].device if sums else groups[0].weights[0].keep.device
    flag = torch.tensor(False, device=device)
    if sums:
        flag = ~torch.stack([each.float().to(device) for each in sums]).isfinite().all()
    return flag if ranks is None else ranks.max_(flag.to(torch.int32)) != 0


def compare_ranks(groups: Sequence[MaskGroup], now: int, repair: bool) -> None:
    """Compares checksums of the masks of all data-parallel ranks; collective.

    Where they differ: a RuntimeError on every rank or, with ``repair``, a copy of rank 0's masks, scores and weights.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    weights = [weight for group in groups for weight in group.weights if weight.place.slice is None]
    if not weights:
        return
    device = weights[0].keep.device
    sums = torch.tensor([_checksum(weight) for weight in weights], dtype=torch.int64, device=device)
    rows = [torch.empty_like(sums) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, sums)
    differs = (torch.stack(rows) != rows[0]).any(0).tolist()
    wrong = [weight for weight, different in zip(weights, differs, strict=True) if different]
    if wrong and not repair:
        names = ", ".join(weight.target.name for weight in wrong[:3])
        raise RuntimeError(
            f"masks of {len(wrong)} weights differ between ranks at step {now}, first {names}; gradients or weights "
            "diverged. Wrap the model in DistributedDataParallel, load the pruner's state on every rank, or use "
            "Pruning(..., on_divergence='repair')"
        )
    for weight in wrong:
        _copy_from_first(weight)
    for group in groups:
        if wrong and isinstance(group, ProgressiveGroup):
            doomed = torch.tensor(group.doomed, device=device)
            dist.broadcast(doomed, 0)
            group.doomed = doomed.tolist()


def _checksum(weight: MaskedWeight) -> int:
    kept = weight.keep.checksum()
    return kept if weight.whole_units is weight.keep else kept << 31 ^ weight.whole_units.checksum()


def _copy_from_first(weight: MaskedWeight) -> None:
    for tensor in (weight.keep.packed, weight.whole_units.packed, weight.score, weight.weight()):
        if tensor is not None:
            whole = tensor.contiguous()
            dist.broadcast(whole, 0)
            tensor.copy_(whole)
