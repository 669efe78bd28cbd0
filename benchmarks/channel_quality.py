"""What a channel criterion is worth: accuracy after a one-shot cut and a short fine-tuning, beside Torch-Pruning.

    python -m benchmarks.channel_quality [--net mobilenet|resnet] [--criteria l2,taylor,...] [--seeds 3] [--csv FILE]

Digits of scikit-learn at 16 x 16 with noise, 1,200 to train and 597 to test. A net is trained, cut to half and to a
quarter of its multiply-adds in one step by each criterion, trained for three more epochs, and tested. Criteria with
data see the first 512 training images in batches of 64. ``--criteria tp:magnitude,tp:taylor`` and the like are
Torch-Pruning's (``pip install torch-pruning==1.6.1``): a group importance, global or with ``:local`` the same share of
each layer, the classifier ignored, cut until the multiply-adds are reached.
"""

from __future__ import annotations

import argparse
import copy
import csv
import platform
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torchvision
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from pruning_core import ChannelGraph, plan_channels, slim_
from pruning_core.report import markdown_table

TRAIN, SIZE, NOISE, BATCH = 1200, 16, 0.3, 64
DENSE_EPOCHS, EPOCHS, RATES = 10, 3, (1.5e-3, 5e-4)
SHARES = (0.5, 0.25)
CRITERIA = "default,default without data,random,magnitude,l2,bn_scale,geometric_median,activation,taylor,fisher"
Split = tuple[Tensor, Tensor]


def digits(seed: int) -> tuple[Split, Split]:
    """Training and test images with noise, the same for each seed."""
    found = load_digits()
    images, labels = torch.tensor(found.images).float() / 16 - 0.3, torch.tensor(found.target)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    images = functional.interpolate(images[order, None], size=(SIZE, SIZE), mode="bilinear")
    images = images + NOISE * torch.randn(images.shape, generator=generator)
    return (images[:TRAIN], labels[order][:TRAIN]), (images[TRAIN:], labels[order][TRAIN:])


def mobilenet() -> nn.Module:
    """MobileNetV2 for small images: inverted residuals with expansion 4."""
    setting = [[1, 16, 1, 1], [4, 24, 2, 2], [4, 32, 2, 2], [4, 64, 2, 1]]
    net = torchvision.models.MobileNetV2(10, inverted_residual_setting=setting, dropout=0.0)
    net.features[0][0] = nn.Conv2d(1, 32, 3, 1, 1, bias=False)
    return net


def resnet() -> nn.Module:
    """ResNet-18 with a quarter of its channels, for small images."""
    net = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [2, 2, 2, 2], 10)
    net.conv1, net.maxpool = nn.Conv2d(1, 64, 3, 1, 1, bias=False), nn.Identity()
    quarter = {}
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            sizes = (max(module.in_channels // 4, 1), module.out_channels // 4)
            quarter[name] = nn.Conv2d(*sizes, module.kernel_size, module.stride, module.padding, bias=False)
        elif isinstance(module, nn.BatchNorm2d):
            quarter[name] = nn.BatchNorm2d(module.num_features // 4)
    for name, module in quarter.items():
        net.set_submodule(name, module)
    net.fc = nn.Linear(128, 10)
    return net


NETS: dict[str, Callable[[], nn.Module]] = {"mobilenet": mobilenet, "resnet": resnet}


def train(net: nn.Module, split: Split, epochs: int, rate: float, seed: int) -> None:
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=1e-2)
    generator = torch.Generator().manual_seed(seed)
    net.train()
    for _ in range(epochs):
        for at in torch.randperm(len(split[0]), generator=generator).split(BATCH):
            optimizer.zero_grad()
            functional.cross_entropy(net(split[0][at]), split[1][at]).backward()
            optimizer.step()


def accuracy(net: nn.Module, split: Split) -> float:
    net.eval()
    with torch.inference_mode():
        return 100 * float((net(split[0]).argmax(1) == split[1]).double().mean())


def loss(net: nn.Module, batch: Split) -> Tensor:
    net.eval()
    return functional.cross_entropy(net(batch[0]), batch[1])


def batches(split: Split) -> list[Split]:
    return list(zip(split[0][:512].split(BATCH), split[1][:512].split(BATCH), strict=True))


def cut(net: nn.Module, criterion: str, share: float, split: Split) -> None:
    """In place, by a criterion of this project; ``default`` is what a user gets who gives batches and names none."""
    graph = ChannelGraph.trace(net, split[0][:1])
    chosen: dict[str, Any] = {} if criterion.startswith("default") else {"criterion": criterion}
    if criterion != "default without data":
        chosen.update(batches=batches(split), to_loss=loss)
    slim_(net, plan_channels(graph, {"macs": share}, **chosen))


def cut_by_torch_pruning(net: nn.Module, criterion: str, share: float, split: Split) -> None:
    import torch_pruning as tp

    name, _, scope = criterion.partition(":")
    importance = {
        "magnitude": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "taylor": tp.importance.GroupTaylorImportance,
        "bn_scale": tp.importance.BNScaleImportance,
    }[name]()
    example, last = split[0][:1], [each for each in net.modules() if isinstance(each, nn.Linear)]
    net.eval()
    whole = tp.utils.count_ops_and_params(net, example)[0]
    most: dict[str, Any] = {"pruning_ratio": 0.95, "max_pruning_ratio": 0.95, "iterative_steps": 200}
    pruner = tp.pruner.BasePruner(
        net, example, importance, global_pruning=scope != "local", ignored_layers=last, **most
    )
    while tp.utils.count_ops_and_params(net, example)[0] > share * whole:
        net.zero_grad()
        if name == "taylor":
            for batch in batches(split):
                loss(net, batch).backward()
        pruner.step()
    net.zero_grad()


def rows(net: str, criteria: list[str], seeds: int) -> Iterator[dict[str, Any]]:
    for seed in range(seeds):
        learn, test = digits(seed)
        torch.manual_seed(seed)
        dense = NETS[net]()
        train(dense, learn, DENSE_EPOCHS, RATES[0], seed)
        yield {"net": net, "criterion": "dense", "share": 1.0, "seed": seed, "after": accuracy(dense, test)}
        for criterion in criteria:
            for share in SHARES:
                small = copy.deepcopy(dense)
                peer = criterion.startswith("tp:")
                (cut_by_torch_pruning if peer else cut)(small, criterion.removeprefix("tp:"), share, learn)
                before = accuracy(small, test)
                train(small, learn, EPOCHS, RATES[1], seed + 100)
                found = {"net": net, "criterion": criterion, "share": share, "seed": seed}
                yield {**found, "before": before, "after": accuracy(small, test)}


def table(found: list[dict[str, Any]]) -> str:
    """Mean accuracy after fine-tuning, with its deviation over the seeds."""
    cells: dict[str, dict[float, list[float]]] = {}
    for row in found:
        cells.setdefault(row["criterion"], {}).setdefault(row["share"], []).append(row["after"])
    lines = []
    for name, each in cells.items():
        shown = [_shown(each.get(share, each.get(1.0, []))) for share in SHARES]
        lines.append([name, *shown])
    return markdown_table(["criterion", *(f"{share:.0%} of the MACs" for share in SHARES)], lines)


def _shown(values: list[float]) -> str:
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=list(NETS), default="mobilenet")
    parser.add_argument("--criteria", default=CRITERIA)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    for row in rows(options.net, options.criteria.split(","), options.seeds):
        found.append(row)
        print("  ".join(f"{key} {value:.1f}" if type(value) is float else str(value) for key, value in row.items()),
              flush=True)  # fmt: skip
    print(table(found))
    versions = f"torch {torch.__version__.partition('+')[0]}, torchvision {torchvision.__version__.partition('+')[0]}"
    print(f"# {datetime.now(UTC):%Y-%m-%d}, python {platform.python_version()}, {versions}")
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["net", "criterion", "share", "seed", "before", "after"])
            writer.writeheader()
            writer.writerows(found)


if __name__ == "__main__":
    main()
