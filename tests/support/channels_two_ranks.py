"""What each rank of ``tests/channels/test_pruner.py`` runs: ``torchrun channels_two_ranks.py FOLDER``."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from pruning_core.channels import Pruner
from pruning_core.graph import ChannelGraph, GraphError, slim_, structure

torch.set_num_threads(1)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 2))


def cut_by_hand(inside: bool, rank: int) -> dict:
    """``slim_`` on the wrapper or on its module; then training goes on: gradients, each beside this rank's alone."""
    wrapper = DistributedDataParallel(net())
    model = wrapper.module if inside else wrapper
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(rank)
    pairs = []
    for step in range(4):
        x, y = torch.randn(8, 6, generator=generator), torch.randn(8, 2, generator=generator)
        if step == 1:
            plan = ChannelGraph.trace(model, torch.ones(1, 6)).plan({"0.weight:0": [1, 2, 3], "2.weight:0": [7]})
            slim_(model, plan, optimizer=optimizer)
        optimizer.zero_grad()
        mse_loss(wrapper(x), y).backward()
        alone = torch.autograd.grad(mse_loss(wrapper.module(x), y), list(wrapper.module.parameters()))
        pairs += [(each.grad.clone(), one) for each, one in zip(wrapper.module.parameters(), alone, strict=True)]
        optimizer.step()
    return {"state": wrapper.module.state_dict(), "pairs": pairs}


def refused(rank: int) -> list[str]:
    """Plans that differ between the ranks, a process group of its own, sharded weights: nothing is touched."""
    found = []
    for group, channels in ((None, [rank]), (dist.new_group([0, 1]), [0])):
        wrapper = DistributedDataParallel(net(), process_group=group)
        plan = ChannelGraph.trace(wrapper.module, torch.ones(1, 6)).plan({"0.weight:0": channels})
        try:
            slim_(wrapper, plan)
        except GraphError as error:
            found.append(str(error))
        assert all(torch.equal(a, b) for a, b in zip(wrapper.module.parameters(), net().parameters(), strict=True))
    sharded = net()
    fully_shard(sharded)
    try:
        ChannelGraph.trace(sharded, torch.ones(1, 6))
    except GraphError as error:
        found.append(str(error))
    return found


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    inner = net()
    model = DistributedDataParallel(inner)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pruner = Pruner(model, True)
    generator = torch.Generator().manual_seed(rank)
    grads = []
    for step in range(6):
        batch = torch.randn(8, 6, generator=generator), torch.randn(8, 2, generator=generator)
        if step in (2, 4):
            pruner.rebuild_model(batch, lambda model, batch: mse_loss(model(batch[0]), batch[1]), optimizer, 7)
            continue
        optimizer.zero_grad()
        loss = mse_loss(model(batch[0]), batch[1])
        loss.backward()
        alone = torch.autograd.grad(mse_loss(inner(batch[0]), batch[1]), list(inner.parameters()))
        grads.append([parameter.grad.clone() for parameter in inner.parameters()])
        grads[-1] = list(zip(grads[-1], alone, strict=True))
        optimizer.step()
    by_hand = [cut_by_hand(inside, rank) for inside in (False, True)]
    torch.save(
        {
            "by_hand": by_hand,
            "refused": refused(rank),
            "state": inner.state_dict(),
            "structure": structure(inner),
            "grads": grads,
            "seen": float(loss),
        },
        folder / f"{rank}.pt",
    )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
