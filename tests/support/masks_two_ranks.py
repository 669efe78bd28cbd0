"""What every rank of ``tests/masks/test_distributed.py`` runs: ``torchrun distributed_worker.py FOLDER STAGE``.

A stage is a list of scenarios; what they leave goes to ``FOLDER/STAGE-RANK.pt``, where the tests compare it. Before the
ranks meet, each runs its part of the same cases alone, unsharded: these are the references.

Both sides see the same bits: ``MKL_CBWR`` (set by the tests) makes products independent of the alignment of memory,
and on 2 ranks the average of two equal gradients is exact.
"""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from pruning_core import Pruning, checkpoint
from pruning_core.masks.sharding import local

torch.set_num_threads(1)

Results = Iterator[tuple[str, Any]]


# ---- models and cases ------------------------------------------------------------------------------------------------


class Attend(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0].clone()


class Zoo(nn.Module):
    """Every kind of layer, with sizes for which the borders between ranks cut through units."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 12, 3)
        self.grouped = nn.Conv2d(12, 24, 3, groups=3)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.up = nn.ConvTranspose2d(24, 18, 2)
        self.up_grouped = nn.ConvTranspose2d(18, 12, 1, groups=3)
        self.linear = nn.Linear(12, 10)
        self.conv1d = Conv1D(12, 10)
        self.attend = Attend(12)
        self.wide = nn.Linear(12, 16)
        self.narrow = Conv1D(5, 16)
        self.head = nn.Linear(5, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.tanh(self.conv(images))
        x = torch.tanh(self.depthwise(self.grouped(x)))
        x = torch.tanh(self.up_grouped(self.up(x))).flatten(2).transpose(1, 2)
        x = torch.tanh(self.conv1d(self.linear(x)))
        x = x + self.attend(x)
        return self.head(torch.tanh(self.narrow(self.wide(x)))).mean(1)


def halved() -> nn.Module:
    """Half of the weights are zero already."""
    model = Zoo()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter[parameter.abs() < parameter.abs().median()] = 0
    return model


def tied() -> nn.Module:
    """Few different weights, powers of 2: most units tie, exactly."""
    model = Zoo()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.125 * parameter.sign())
            parameter[: len(parameter) // 4] = 0.25
    return model


def layers(*sizes: int) -> nn.Sequential:
    """Layers 0, 1 ... of these sizes: ``layers(8, 3, 2)`` is Linear(8, 3), tanh, Linear(3, 2)."""
    modules: list[nn.Module] = []
    for i, (into, out) in enumerate(pairwise(sizes)):
        modules += [nn.Tanh()] * (i > 0) + [nn.Linear(into, out)]
    return nn.Sequential(*modules)


small = partial(layers, 16, 12, 10, 2)
few_rows = partial(layers, 8, 5, 3, 2, 1)  # on 3 ranks: units over all ranks, ranks with one row or none


def lopsided() -> nn.Module:
    """With 4x1, the lowest: 6 of the 8 units of layer 0, its 8 edge units of one weight each, layer 4."""
    model = few_rows()
    with torch.no_grad():
        model[0].weight[:4, :6] *= 0.001
        model[0].weight[4] *= 0.01
        model[4].weight *= 0.001
    return model


@dataclass(frozen=True)
class Case:
    """One run: the pruner's options, the model, and whether the four hooks are called explicitly."""

    options: dict[str, Any]
    model: Callable[[], nn.Module] = Zoo
    explicit: bool = False
    steps: int = 5
    on_divergence: str = "error"

    def but(self, **options: Any) -> Case:
        return Case({**self.options, **options}, self.model, self.explicit, self.steps, self.on_divergence)


PLAN = {"start_step": 1, "end_step": 5, "pruning_frequency": 2, "target_sparsity": 0.6}


def _cases() -> Iterator[tuple[str, Case]]:
    for pattern in ("1x1", "4x1", "2x3", "2:4", "1xchannel", "channelx1"):
        plan = {**PLAN, "pattern": pattern, "target_sparsity": 0.5 if pattern == "2:4" else 0.6}
        for criterion in ("magnitude", "snip_momentum"):
            for scope in ("global", "local"):
                name, options = f"{pattern} {criterion} {scope}", {**plan, "pruning_scope": scope}
                yield name, Case({**options, "pruning_type": criterion}, explicit=scope == "local")
                options |= {"pruning_type": f"{criterion}_progressive", "progressive_steps": 2}
                options |= {"progressive_type": "scores" if scope == "global" else "linear"}
                yield f"{name} progressive {options['progressive_type']}", Case(options)
        for reduce in ("sum", "max"):
            yield f"{pattern} snip {reduce}", Case({**plan, "pruning_type": "snip", "criterion_reduce_type": reduce})
        yield f"{pattern} lock", Case({"pattern": pattern, "pruning_type": "pattern_lock"}, model=halved)


ON_2 = dict(_cases())
ON_3 = {f"3 ranks {name}": ON_2[name] for name in ON_2 if "snip_momentum local" in name and "2:4" not in name}
ON_3 |= {
    f"few rows {name}": Case(case.options, few_rows, case.explicit)
    for name, case in ON_2.items()
    if ("snip_momentum global" in name or "max" in name) and "2:4" not in name
}
ON_3 |= {
    f"few rows {pattern} at the limit": Case(
        {**PLAN, "pattern": pattern, "pruning_type": "magnitude", "max_sparsity_ratio_per_op": 0.6}, lopsided
    )
    for pattern in ("4x1", "2x3", "3x2")
}

ONCE = {"pruning_type": "magnitude", "criterion_reduce_type": "sum", "target_sparsity": 0.5}
TIES = {
    f"ties {pattern} {scope}": Case({**ONCE, "pattern": pattern, "pruning_scope": scope}, tied, steps=1)
    for pattern in ("1x1", "4x1", "2:4", "channelx1")
    for scope in ("global", "local")
}
ON_2 |= TIES
ON_3 |= {f"3 ranks {name}": case for name, case in TIES.items() if "2:4" not in name}

LASSO = Case({**PLAN, "pattern": "4x1", "reg_type": "group_lasso", "reg_coeff": 0.02})
LASSOS = {f"lasso {pattern}": LASSO.but(pattern=pattern) for pattern in ("4x1", "2x3", "1xchannel", "channelx1")}
HYBRID = ON_2["4x1 snip_momentum global"]
SPARED = Case({**PLAN, "op_names": ["^2$"], "pattern": "4x1"}, small)
EACH = HYBRID.but(pruning_op_types=["Linear", "Conv2d", "ConvTranspose2d", "Conv1D"])
LATE = Case({**PLAN, "pruning_type": "magnitude"}, explicit=True)
SKIPPING = Case({**PLAN, "pattern": "4x1"}, explicit=True, steps=7)
SKIPPED = 3

SMALL = Case({**PLAN, "pruning_type": "magnitude", "pattern": "1x1", "op_names": ["^0$", "^2$", "^4$"]}, model=small)
DDP = {
    "ddp attached": SMALL.but(pruning_type="snip_momentum"),
    "ddp hooks": Case({**SMALL.options, "pruning_type": "snip_momentum", "pattern": "4x1"}, small, explicit=True),
    "ddp progressive": SMALL.but(pruning_type="snip_momentum_progressive", pattern="2x3", progressive_steps=2),
}

LONG = {**PLAN, "end_step": 9, "pruning_frequency": 4}
RESUMED = {
    "basic": Case({**LONG, "pattern": "4x1"}, explicit=True, steps=11),
    "progressive": Case(
        {**LONG, "pattern": "4x1", "pruning_type": "snip_momentum_progressive", "progressive_steps": 4}, steps=11
    ),
}
RESUME_AT = 7  # the progressive run has cut 3 of the 4 portions of the update at step 5


def inputs(step: int, data: int, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * data + step)
    return torch.randn(4, *shape, generator=generator)


@dataclass
class Training:
    """A model with its optimizer and pruner, and the loop. ``data``: whose data it sees."""

    case: Case
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model
    data: int = 0
    part_of_loss: float = 1.0
    bare: nn.Module = field(init=False)
    pruner: Pruning = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.bare = self.case.model()
        self.model = self.wrap(self.bare)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
        self.pruner = Pruning({**self.case.options}, on_divergence=self.case.on_divergence)  # type: ignore[arg-type]

    def begin(self) -> Self:
        self.pruner.model, self.pruner.optimizer = self.model, self.optimizer
        if self.case.explicit:
            self.pruner.on_train_begin()
        else:
            self.pruner.attach(self.model, self.optimizer)
        return self

    def loss(self, step: int) -> Tensor:
        first = next(iter(self.bare.children()))
        shape = (first.in_features,) if isinstance(first, nn.Linear) else (4, 6, 6)
        return (self.model(inputs(step, self.data, shape)) - 1).square().mean() * self.part_of_loss

    def step(self, step: int, after_backward: Callable[[], object] | None = None, skip: bool = False) -> None:
        explicit = self.case.explicit
        self.optimizer.zero_grad()
        if explicit:
            self.pruner.on_step_begin()
        self.loss(step).backward()
        if after_backward is not None:
            after_backward()
        if explicit:
            self.pruner.on_before_optimizer_step()
        if not skip:
            self.optimizer.step()
        if explicit:
            self.pruner.on_after_optimizer_step()

    def run(self, steps: Iterable[int] | None = None) -> Self:
        for step in range(self.case.steps) if steps is None else steps:
            self.step(step)
        return self

    def result(self) -> dict[str, Any]:
        """What is here of the masks and parameters, and the report of the whole."""
        report = self.pruner.report().to_dict()
        parameters = {name: local(p.detach()).clone() for name, p in self.bare.named_parameters()}
        return {"masks": self.pruner.masks(), "parameters": parameters, "report": report, "step": self.pruner.step}


def result_of(case: Case, **how: Any) -> dict[str, Any]:
    return Training(case, **how).begin().run().result()


def reference(name: str) -> dict[str, Any]:
    """The same in one process, unsharded."""
    cases = {**ON_2, **ON_3, **LASSOS, "hybrid": HYBRID, "each": EACH, "spared": SPARED, "late": LATE, **DDP}
    if name == "skipping":
        return Training(SKIPPING).begin().run(step for step in range(SKIPPING.steps) if step != SKIPPED).result()
    return result_of(cases[name])


REFERENCES = {"two": [*ON_2, *LASSOS, "hybrid", "each", "spared", "late", "skipping", *DDP], "three": [*ON_3]}


# ---- scenarios -------------------------------------------------------------------------------------------------------


def shard(model: nn.Module, mesh_shape: tuple[int, ...] | None = None) -> nn.Module:
    """The whole model, and within it the attention by itself."""
    shape = mesh_shape or (dist.get_world_size(),)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    for module in model.children():
        if isinstance(module, Attend):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def shard_each(model: nn.Module) -> nn.Module:
    """Also every single layer, which gives it a class of its own."""
    for module in model.children():
        fully_shard(module)
    return fully_shard(model)


def shard_spared_by_columns(model: nn.Module) -> nn.Module:
    """Weights that are not pruned may be sharded in any way."""
    return fully_shard(model, shard_placement_fn=lambda p: Shard(1) if p.shape == (12, 16) else None)


def shard_summing(model: nn.Module) -> nn.Module:
    """Gradients are summed, not averaged: a third is not exact, but g + 0 + 0 is g."""
    for module in shard(model).modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    return model


def sharded() -> Results:
    for name, case in {**ON_2, **LASSOS}.items():
        yield name, result_of(case, wrap=shard)
    for shape in ((1, 2), (2, 1)):
        yield f"hybrid {shape}", result_of(HYBRID, wrap=partial(shard, mesh_shape=shape))
    yield "each", result_of(EACH, wrap=shard_each)
    yield "spared", result_of(SPARED, wrap=shard_spared_by_columns)


def sharded_on_three() -> Results:
    for name, case in ON_3.items():
        yield name, result_of(case, wrap=shard_summing, part_of_loss=float(dist.get_rank() == 1))


def evaluated_in_between() -> Results:
    """After a forward pass without a backward pass the weights of the outermost module stay gathered."""
    training = Training(LATE, wrap=shard)
    with torch.no_grad():
        training.loss(0)
    training.begin()
    for step in range(LATE.steps):
        training.step(step)
        with torch.no_grad():
            training.loss(step)
        training.pruner.report()
    yield "late", training.result()


def data_parallel() -> Results:
    for name, case in DDP.items():
        yield name, result_of(case, wrap=DistributedDataParallel, data=dist.get_rank())


def _spoil_gradient(training: Training) -> None:
    gradient = training.bare[2].weight.grad
    gradient.copy_(gradient.flip(0) * 100)


def _spoil_weight(training: Training) -> None:
    with torch.no_grad():
        training.bare[2].weight.copy_(training.bare[2].weight.flip(0))


def _spoil_mask(training: Training) -> None:
    weight = training.pruner._groups[0].weights[1]
    weight.keep.keep_only_(torch.zeros(weight.shape[1:], dtype=torch.bool))


SPOILED = {"gradient": _spoil_gradient, "weight": _spoil_weight, "mask": _spoil_mask}


def diverged() -> Results:
    """Rank 1 goes astray at step 3; masks change at steps 1, 3 and 5."""
    for kind in ("snip_momentum", "snip_momentum_progressive"):
        stopped = SMALL.but(pruning_type=kind)
        repaired = Case(stopped.options, small, steps=8, on_divergence="repair")
        yield f"no ddp, {kind}", _astray(stopped, wrap=lambda model: model)
        for what, spoil in SPOILED.items():
            yield f"{what}, {kind}", _astray(stopped, spoil)
            yield f"repaired {what}, {kind}", _astray(repaired, spoil)


def _astray(
    case: Case,
    spoil: Callable[[Training], None] = lambda training: None,
    wrap: Callable[[nn.Module], nn.Module] = DistributedDataParallel,
) -> dict[str, Any]:
    training, history = Training(case, wrap=wrap, data=dist.get_rank()).begin(), []
    try:
        for step in range(case.steps):
            astray = step == 3 and dist.get_rank() == 1
            training.step(step, partial(spoil, training) if astray else None)
            weight = training.bare[2].weight.detach().clone()
            history.append({"masks": training.pruner.masks(), "weight": weight})
    except RuntimeError as error:
        return {"error": str(error), "step": training.pruner.step}
    doomed = [getattr(group, "doomed", None) for group in training.pruner._groups]
    return {"error": None, "history": history, "doomed": doomed, **training.result()}


class Wire(TorchDispatchMode):
    """Counts the bytes handed to collectives, whoever calls them."""

    sent = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            self.sent += sum(x.numel() * x.element_size() for x in tree_leaves(args) if isinstance(x, Tensor))
        return func(*args, **(kwargs or {}))


def bytes_sent() -> Results:
    """The bytes of one mask update of three square layers. With 20 rows a row of units reaches over the border."""
    for pattern in ("1x1", "4x1"):
        for scope in ("global", "local"):
            options = {"pattern": pattern, "pruning_scope": scope, "start_step": 1, "end_step": 1}
            for width in (16, 64, 20):
                case = Case({**options, "pruning_type": "magnitude"}, partial(layers, *[width] * 4), explicit=True)
                training = Training(case, wrap=shard).begin()
                training.pruner.on_step_begin()
                training.loss(0).backward()
                training.pruner.on_before_optimizer_step()
                training.optimizer.step()
                with Wire() as wire:
                    training.pruner.on_after_optimizer_step()
                assert training.pruner._groups[0].done
                yield f"bytes {pattern} {scope} {width}", wire.sent


def non_finite() -> Results:
    """The gradient of a weight that rank 1 alone holds overflows; the loop skips the optimizer, as a scaler would."""
    training = Training(SKIPPING, wrap=shard).begin().run(range(SKIPPED))

    def overflow() -> None:
        if dist.get_rank() == 1:
            local(training.bare.linear.weight.grad)[0, 0] = torch.inf

    def state() -> dict[str, Any]:
        scores = {w.target.name: w.score.clone() for w in training.pruner._groups[0].weights}
        return {"scores": scores, "step": training.pruner.step}

    before = state()
    training.step(SKIPPED, overflow, skip=True)
    after = state()
    training.run(range(SKIPPED + 1, SKIPPING.steps))
    yield "skipping", {"before": before, "after": after, **training.result()}


def scaled() -> Results:
    """A GradScaler skips step 3, where a gradient that rank 1 alone holds overflows."""
    for fused in (False, True):
        for explicit in (False, True):
            training = Training(Case({**PLAN, "pattern": "4x1"}, small, explicit), wrap=shard)
            training.optimizer = torch.optim.AdamW(training.model.parameters(), fused=fused)
            training.begin()
            scaler, steps = torch.amp.GradScaler("cpu", init_scale=64.0), []
            for step in range(6):
                training.optimizer.zero_grad()
                if explicit:
                    training.pruner.on_step_begin()
                scaler.scale(training.loss(step)).backward()
                if step == 3 and dist.get_rank() == 1:
                    local(training.bare[0].weight.grad)[0, 0] = torch.inf
                if explicit:
                    scaler.unscale_(training.optimizer)
                    training.pruner.on_before_optimizer_step()
                scaler.step(training.optimizer)
                scaler.update()
                if explicit:
                    training.pruner.on_after_optimizer_step()
                steps.append(training.pruner.step)
            yield f"scaler {fused=} {explicit=}", {"steps": steps, **training.result()}


def _resumable(name: str) -> tuple[Case, Callable[[nn.Module], nn.Module], int]:
    kind, run = name.split()
    return RESUMED[run], *((shard, 0) if kind == "fsdp" else (DistributedDataParallel, dist.get_rank()))


RESUMABLE = [f"{kind} {run}" for kind in ("ddp", "fsdp") for run in RESUMED]


def resumed(folder: Path) -> Results:
    """The uninterrupted run, and one that continues from the files with fresh objects."""
    for name in RESUMABLE:
        case, wrap, data = _resumable(name)
        path, rest = folder / f"{name}-{dist.get_rank()}.pt", range(RESUME_AT, case.steps)
        training = Training(case, wrap=wrap, data=data).begin().run(range(RESUME_AT))
        state = {"model": training.bare.state_dict(), "optimizer": training.optimizer.state_dict()}
        checkpoint.save({**state, "pruner": training.pruner.state_dict()}, path)
        yield f"uninterrupted {name}", training.run(rest).result()
        state = checkpoint.load(path)
        training = Training(case, wrap=wrap, data=data)
        training.bare.load_state_dict(state["model"])
        training.optimizer.load_state_dict(state["optimizer"])
        training.pruner.load_state_dict(state["pruner"])
        yield f"resumed {name}", training.begin().run(rest).result()


def error_of(action: Callable[[], object]) -> str:
    try:
        action()
    except ValueError as error:
        return str(error)
    return "no error"


def refused() -> Results:
    def by_columns(model: nn.Module) -> nn.Module:
        return fully_shard(model, shard_placement_fn=lambda p: Shard(p.dim() - 1))

    def in_part(model: nn.Sequential) -> nn.Sequential:
        fully_shard(model[0])
        return model

    def begin(case: Case, wrap: Callable[[nn.Module], nn.Module] = shard) -> Callable[[], object]:
        return lambda: Training(case, wrap=wrap).begin()

    conv1d = Case({"pattern": "2:4"}, model=lambda: nn.Sequential(Conv1D(4, 12)))
    narrow = Case({"pattern": "4x1"}, model=lambda: nn.Sequential(Attend(10)))
    yield "refused columns", error_of(begin(SMALL, by_columns))
    yield "refused in part", error_of(begin(SMALL, in_part))
    yield "refused N:M", error_of(begin(conv1d))
    yield "refused groups", error_of(begin(narrow))
    training = Training(SMALL, wrap=shard).begin()
    yield "refused copy", error_of(lambda: training.pruner.mask_(small()))


def loaded_on_three(folder: Path) -> Results:
    state = checkpoint.load(folder / f"fsdp basic-{min(dist.get_rank(), 1)}.pt")
    training = Training(RESUMED["basic"], wrap=shard).begin()
    yield "refused state", error_of(lambda: training.pruner.load_state_dict(state["pruner"]))


def stage(name: str, folder: Path) -> Results:
    if name == "two":
        for scenario in (
            sharded,
            evaluated_in_between,
            data_parallel,
            diverged,
            bytes_sent,
            non_finite,
            scaled,
            refused,
        ):
            yield from scenario()
        yield from resumed(folder)
    else:
        yield from sharded_on_three()
        yield from loaded_on_three(folder)


def main(folder: Path, name: str, rank: int, size: int) -> None:
    faulthandler.dump_traceback_later(110, exit=True)  # nothing hangs
    results: dict[str, Any] = {"reference": {}}
    for each in REFERENCES[name][rank::size]:
        results["reference"][each] = reference(each)
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    try:
        for key, result in stage(name, folder):
            results[key] = result
    finally:
        checkpoint.save(results, folder / f"{name}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
