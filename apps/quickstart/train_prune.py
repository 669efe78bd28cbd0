"""The whole of sparse training on one page: train a small network, prune it while it trains on, look at what is zero.

    python apps/quickstart/train_prune.py
    python apps/quickstart/train_prune.py --target_sparsity 0.9 --pattern 2:4

Data is made on the spot; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from data.shapes import CLASSES, shapes
from pruning_core import Pruning, WeightPruningConfig, checkpoint

BATCH = 64


def network() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveMaxPool2d(3)),
        *(nn.Flatten(), nn.Linear(64 * 9, 64), nn.ReLU(), nn.Linear(64, len(CLASSES))),
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, epochs: int) -> None:
    """A plain loop: it knows nothing of pruning."""
    model.train()
    peak, steps = optimizer.param_groups[0]["lr"], epochs * -(-len(images) // BATCH)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(BATCH):
            loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    return (model(images).argmax(1) == labels).float().mean().item()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target_sparsity", type=float, default=None, help="share of zeros (0.8; N:M: 1 - N/M)")
    parser.add_argument("--pattern", default="4x1", help="NxM blocks, 1xchannel, channelx1 or N:M (4x1)")
    parser.add_argument("--pruning_type", default="snip_momentum", help="criterion, also with _progressive")
    parser.add_argument("--epochs", type=int, default=8, help="of dense training, then again of pruning (8)")
    parser.add_argument("--cooldown_epochs", type=int, default=4, help="with fixed masks, after pruning (4)")
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="folder for what is saved")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> int:
    options = arguments()
    torch.manual_seed(options.seed)
    torch.set_num_threads(min(2, torch.get_num_threads()))
    images, labels = shapes(4096, seed=options.seed)
    held_out = shapes(1024, seed=options.seed + 1)
    steps_per_epoch = -(-len(images) // BATCH)

    chosen = {"pattern": options.pattern, "pruning_type": options.pruning_type}
    if options.target_sparsity is not None:
        chosen["target_sparsity"] = options.target_sparsity
    try:
        config = WeightPruningConfig(
            {**chosen, "start_step": steps_per_epoch // 2, "end_step": options.epochs * steps_per_epoch}
            | {"pruning_frequency": max(1, steps_per_epoch // 4), "sparsity_decay_type": "cubic"}
        )
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2

    print(f"1. dense training: {options.epochs} epochs of {len(images)} images")
    began = time.time()
    model = network()
    train(model, torch.optim.AdamW(model.parameters(), lr=5e-3), images, labels, options.epochs)
    dense = accuracy(model, *held_out)
    print(f"   accuracy {dense:.3f}  ({time.time() - began:.0f} s)")

    print(f"2. pruning for {options.epochs} epochs, then {options.cooldown_epochs} with fixed masks")
    began = time.time()
    sparse = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=5e-3)
    with Pruning(config).attach(sparse, optimizer) as pruner:
        train(sparse, optimizer, images, labels, options.epochs + options.cooldown_epochs)
    pruner.metrics = {"dense accuracy": round(dense, 3), "sparse accuracy": round(accuracy(sparse, *held_out), 3)}
    print(f"   accuracy {pruner.metrics['sparse accuracy']:.3f}  ({time.time() - began:.0f} s)")

    print("3. what is zero now, counted from the weights")
    report = pruner.report()
    print(report)
    checkpoint.save({"model": sparse.state_dict(), "pruner": pruner.state_dict()}, options.output / "sparse.pt")
    report.save_json(options.output / "pruning_report.json")
    report.plot(options.output / "pruning_report.png")
    print(f"saved in {options.output}: sparse.pt, pruning_report.json, pruning_report.png")
    python = os.path.relpath(sys.executable)
    print(f"look again with: {python} -m pruning_core inspect {options.output}/sparse.pt")
    return 0


if __name__ == "__main__":
    sys.exit(main())
