"""What stands around a model: DDP, DataParallel, torch.compile, FSDP."""

from __future__ import annotations

import gc
import hashlib

import torch
from torch import distributed, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from pruning_core.graph.errors import GraphError


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of ``DistributedDataParallel``, ``DataParallel`` and ``torch.compile``."""
    while True:
        inner = model.module if isinstance(model, DistributedDataParallel | DataParallel) else None
        inner = getattr(model, "_orig_mod", None) if inner is None else inner
        if inner is None:
            return model
        model = inner


def refuse_unready(model: nn.Module) -> None:
    """GraphError for parameters without shape or numbers yet, and for those of which each rank has a part."""
    if not isinstance(model, nn.Module):
        raise GraphError(f"model: must be a torch.nn.Module, got {type(model).__name__}")
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise GraphError(f"{name}: has no shape yet, got a lazy module; run the model once first")
        if parameter.is_meta:
            raise GraphError(f"{name}: has no numbers, got the meta device; load the weights first")
        if type(parameter.data).__name__ == "DTensor" or name.rpartition(".")[2].startswith("_flat_param"):
            raise GraphError(
                f"{name}: is sharded over ranks (FSDP, tensor parallel), so that its channels cannot be removed; trace "
                "and cut the model before it is sharded"
            )


def replicas_of(model: nn.Module) -> list[DistributedDataParallel]:
    """The ``DistributedDataParallel`` around a model or a part of it; a module does not know what wraps it."""
    if not distributed.is_available() or not distributed.is_initialized():
        return []
    own = {id(each) for each in model.parameters()}
    found = [each for each in gc.get_objects() if issubclass(type(each), DistributedDataParallel)]
    found = [each for each in found if own & {id(parameter) for parameter in each.parameters()}]
    for each in found:
        if each.process_group is not distributed.distributed_c10d._get_default_group():
            raise GraphError("model: wrapped with a process group of its own, got one; wrap it again after the cut")
    return found


def agree(model: nn.Module, what: str, text: str) -> None:
    """GraphError on all ranks unless they have the same text."""
    number, device = int(hashlib.sha256(text.encode()).hexdigest()[:15], 16), next(model.parameters()).device
    both = torch.tensor([number, -number], device=device)
    distributed.all_reduce(both, distributed.ReduceOp.MAX)
    if both[0] != -both[1]:
        raise GraphError(
            f"{what}: differs between the ranks; make it on one rank and broadcast it, or from equal seeds"
        )


def renew(wrapper: DistributedDataParallel) -> None:
    """Makes the wrapper's gradient buckets anew, the way it does itself when it is unpickled."""
    wrapper.__setstate__(wrapper.__getstate__())
