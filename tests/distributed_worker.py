"""What every rank of ``tests/test_distributed.py`` runs: ``torchrun distributed_worker.py FOLDER STAGE``.

A stage is a list of scenarios. Their results go to ``FOLDER/STAGE-RANK.pt``; the tests compare them with each other and
with runs in one process. Models, data and the training loop are here, so that both sides use the same.
"""

from __future__ import annotations

import faulthandler
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from pruning_core import Pruning, checkpoint
from pruning_core.sharding import local

torch.set_num_threads(1)
STEPS = 7


class Zoo(nn.Module):
    """Every kind of layer, with sizes whose borders between 2 or 3 ranks cut through units."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 12, 3)
        self.grouped = nn.Conv2d(12, 24, 3, groups=3)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.up = nn.ConvTranspose2d(24, 18, 2)
        self.up_grouped = nn.ConvTranspose2d(18, 12, 1, groups=3)
        self.linear = nn.Linear(12, 10)
        self.conv1d = Conv1D(12, 10)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.wide = nn.Linear(12, 16)
        self.narrow = Conv1D(5, 16)
        self.head = nn.Linear(5, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.tanh(self.conv(images))
        x = torch.tanh(self.depthwise(self.grouped(x)))
        x = torch.tanh(self.up_grouped(self.up(x))).flatten(2).transpose(1, 2)
        x = torch.tanh(self.conv1d(self.linear(x)))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(torch.tanh(self.narrow(self.wide(x)))).mean(1)


def small() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 2))


def tiny_rows() -> nn.Sequential:
    """With three ranks: one row each, a rank without rows, two ranks without rows."""
    return nn.Sequential(nn.Linear(8, 3), nn.Tanh(), nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1))


def halved() -> Zoo:
    """Half of the weights are zero already."""
    model = Zoo()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter[parameter.abs() < parameter.abs().median()] = 0
    return model


@dataclass(frozen=True)
class Case:
    """One run: the pruner's options, the model, and whether the four hooks are called explicitly."""

    options: dict[str, Any]
    model: Callable[[], nn.Module] = Zoo
    explicit: bool = False
    steps: int = STEPS
    on_divergence: str = "error"


def progressive(order: str) -> dict[str, Any]:
    return {"progressive_type": order, "progressive_steps": 2}


def _cases() -> Iterator[tuple[str, Case]]:
    for pattern in ("1x1", "4x1", "2x3", "2:4", "1xchannel", "channelx1"):
        plan = {"pattern": pattern, "start_step": 1, "end_step": 5, "pruning_frequency": 2}
        plan["target_sparsity"] = 0.5 if pattern == "2:4" else 0.6
        for criterion in ("magnitude", "snip_momentum"):
            for scope in ("global", "local"):
                options = {**plan, "pruning_type": criterion, "pruning_scope": scope}
                yield f"{pattern} {criterion} {scope}", Case(options, explicit=scope == "local")
                options["pruning_type"] += "_progressive"
                for order in ("scores", "linear"):
                    yield f"{pattern} {criterion} {scope} {order}", Case({**options, **progressive(order)})
        for reduce in ("sum", "max"):
            options = {**plan, "pruning_type": "snip", "criterion_reduce_type": reduce}
            yield f"{pattern} snip global {reduce}", Case(options)
        yield f"{pattern} lock", Case({"pattern": pattern, "pruning_type": "pattern_lock"}, model=halved) if pattern != '2:4' else Case({**options})


CASES = dict(_cases())
"""Run on 2 ranks under ``fully_shard``, and in one process."""

CASES_ON_3 = {name: case for name, case in CASES.items() if "snip_momentum" in name and "2:4" not in name}
CASES_ON_3 |= {f"tiny {name}": Case(case.options, model=tiny_rows) for name, case in CASES.items() if "snip" in name and "2:4" not in name}


def inputs(step: int, rank: int = 0, shape: tuple[int, ...] = (4, 6, 6)) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + step)
    return torch.randn(3, *shape, generator=generator)


@dataclass
class Training:
    """A model with its optimizer and pruner, and the loop. ``data``: the rank whose data it sees."""

    case: Case
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model
    data: int = 0
    weight_of_loss: float = 1.0
    pruner: Pruning = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.bare = self.case.model()
        self.model = self.wrap(self.bare)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        self.pruner = Pruning({**self.case.options}, on_divergence=self.case.on_divergence)
        self.pruner.model = self.model

    def begin(self) -> Training:
        if self.case.explicit:
            self.pruner.optimizer = self.optimizer
            self.pruner.on_train_begin()
        else:
            self.pruner.attach(self.model, self.optimizer)
        return self

    def loss(self, step: int) -> Tensor:
        first = next(iter(self.bare.children()))
        shape = (4, 6, 6) if isinstance(first, nn.Conv2d) else (first.in_features,)
        return (self.model(inputs(step, self.data, shape)) - 1).square().mean() * self.weight_of_loss

    def step(self, step: int, after_backward: Callable[[], None] = lambda: None) -> None:
        self.optimizer.zero_grad()
        if self.case.explicit:
            self.pruner.on_step_begin()
        self.loss(step).backward()
        after_backward()
        if self.case.explicit:
            self.pruner.on_before_optimizer_step()
        self.optimizer.step()
        if self.case.explicit:
            self.pruner.on_after_optimizer_step()

    def run(self, steps: Iterable[int] | None = None) -> Training:
        for step in range(self.case.steps) if steps is None else steps:
            self.step(step)
        return self

    def result(self) -> dict[str, Any]:
        """What is here of the masks and parameters, and the report of the whole."""
        parameters = {name: local(p.detach()).clone() for name, p in self.bare.named_parameters()}
        return {
            "masks": self.pruner.masks(),
            "parameters": parameters,
            "report": self.pruner.report().to_dict(),
            "step": self.pruner.step,
        }


def result_of(case: Case, **how: Any) -> dict[str, Any]:
    return Training(case, **how).begin().run().result()


def shard(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    if isinstance(model, Zoo):
        fully_shard(model.attention, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def stage_two() -> Iterator[tuple[str, Any]]:
    for name, case in CASES.items():
        yield f"sharded {name}", result_of(case, wrap=shard)


def shard_summing(model: nn.Module) -> nn.Module:
    """Gradients are summed: with the loss of all ranks but one multiplied by 0 they are exactly those of one process."""
    shard(model)
    for module in model.modules():
        if hasattr(module, "set_gradient_divide_factor"):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    return model


def stage_three():
    for name, case in CASES_ON_3.items():
        yield f"sharded {name}", result_of(case, wrap=shard_summing, weight_of_loss=float(dist.get_rank() == 1))

STAGES = {"two": stage_two, "three": stage_three}


def main() -> None:
    faulthandler.dump_traceback_later(100, exit=True)
    folder, stage = Path(sys.argv[1]), sys.argv[2]
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    results = {}
    try:
        for name, result in STAGES[stage]():
            results[name] = result
    finally:
        checkpoint.save(results, folder / f"{stage}-{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
