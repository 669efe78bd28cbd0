"""What each rank of ``tests/channels/test_pruner.py`` runs: ``torchrun channels_two_ranks.py FOLDER``."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from pruning_core.channels import Pruner
from pruning_core.graph import structure

torch.set_num_threads(1)


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 2))
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
    torch.save(
        {"state": inner.state_dict(), "structure": structure(inner), "grads": grads, "seen": float(loss)},
        folder / f"{rank}.pt",
    )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
