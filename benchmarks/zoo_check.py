"""One model of the zoo, from the trace to a reload: ``python -m benchmarks.zoo_check '<case as JSON>'``.

Runs in a process of its own (see ``benchmarks.zoo``). A line says which step begins; JSON on the last line says what
was found, or ``error`` with the step that failed. Seconds are CPU seconds of one thread, so that neighbours count less.
"""

from __future__ import annotations

import io
import json
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from benchmarks.zoo_models import SEED, Entry, Example, entries, randomise_
from pruning_core import ChannelGraph, apply_structure, plan_channels, slim_, structure
from pruning_core.graph.inputs import leaves
from pruning_core.graph.trace.labels import Axis

SHARE = 0.5
HUGE = 250_000_000
"""Models with more parameters run in float32, for their memory."""


@dataclass(frozen=True)
class Case:
    """``dtype`` is float64, float32, or empty: float64 where the model can."""

    name: str
    family: str
    dtype: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def entry(self) -> Entry:
        return entries([self.family])[self.name]


class StepError(Exception):
    """A check that did not hold."""


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise StepError(otherwise)


def to(dtype: torch.dtype, example: Any) -> Any:
    """Key points stay as they are: torchvision takes them in float32 alone."""

    def cast(path: tuple[Any, ...], value: Any) -> Any:
        fixed = not isinstance(value, Tensor) or not value.is_floating_point() or "keypoints" in pytree.keystr(path)
        return value if fixed else value.to(dtype)

    return pytree.tree_map_with_path(cast, example)


def run(model: nn.Module, example: Example) -> Any:
    """In eval mode, the same each time."""
    torch.manual_seed(SEED)
    with torch.inference_mode():
        return model.eval()(*example[0], **example[1])


def batch_of_two(model: nn.Module, example: Example) -> Example:
    """A norm cannot learn from one image that has shrunk to one pixel."""
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return example
    return tuple(_twice(each) for each in example[0]), example[1]


def _twice(value: Any) -> Any:
    if isinstance(value, list):
        return value * 2
    return torch.cat([value, value.flip(-1)]) if value.dim() == 4 and len(value) == 1 else value


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, example: Example) -> list[str]:
    """The loss is the sum of all outputs, or of a detector's losses. The names of parameters that have a gradient."""
    torch.manual_seed(SEED)
    output = model.train()(*example[0], **example[1])
    loss = torch.stack([leaf.sum() for leaf in leaves(output) if leaf.requires_grad]).sum()
    require(bool(loss.isfinite()), f"the loss is {loss.item()}")
    optimizer.zero_grad()
    loss.backward()
    moving = [name for name, each in model.named_parameters() if each.grad is not None and bool(each.grad.any())]
    require(bool(moving), "no parameter has a gradient")
    optimizer.step()
    optimizer.zero_grad()
    require(all(bool(each.isfinite().all()) for each in model.parameters()), "a parameter is not finite after a step")
    return moving


def shapes(model: nn.Module, example: Example, family: str) -> list[tuple[int, ...]]:
    """Of all outputs; how many objects a detector finds depends on its weights."""
    found = [tuple(leaf.shape) for leaf in leaves(run(model, example))]
    return [shape[1:] for shape in found] if family == "detection" else found


def effect(dense: list[Tensor], slim: list[Tensor]) -> float:
    """How far the outputs moved, relative to the largest; other shapes (other objects found) count as one."""
    found = 0.0
    for was, now in zip(dense, slim, strict=True):
        if was.is_floating_point() and was.numel() and was.shape == now.shape:
            found = max(found, float((was - now).abs().max() / was.abs().max().clamp_min(1e-30)))
        elif was.shape != now.shape:
            found = max(found, 1.0)
    return found


def output_axis(model: nn.Module, name: str) -> Axis:
    """Where a weight's output channels are: in the last axis of tables and of GPT-2's layers, and behind experts."""
    owner = model.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, nn.modules.conv._ConvNd):
        return Axis(name, int(isinstance(owner, nn.modules.conv._ConvTransposeNd)))
    dims = model.get_parameter(name).dim()
    tables = name.endswith(("token", "embedding", "embeddings", "pos_embed"))
    last = tables or isinstance(owner, nn.Embedding) or type(owner).__name__ == "Conv1D"
    return Axis(name, dims - 1 if last else dims - 2)


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Check:
    """The steps in their order; ``row`` gathers what they found."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.row: dict[str, Any] = {}
        self.notes: list[str] = []

    def steps(self) -> Iterator[Callable[[], None]]:
        yield from (self.build, self.trace, self.plan, self.train, self.slim, self.shapes, self.train_on, self.reload)

    def build(self) -> None:
        self.entry = self.case.entry()
        self.model = self.entry.build()
        randomise_(self.model, self.entry.example())
        count = sum(parameter.numel() for parameter in self.model.parameters())
        huge = count > HUGE and not self.case.dtype
        self._convert(getattr(torch, self.case.dtype or ("float32" if huge else "float64")))
        if huge:
            self.notes.append("float32 for its size")
        try:
            self.shapes_before = shapes(self.model, self.example, self.case.family)
        except RuntimeError as error:
            if self.case.dtype or huge:
                raise
            self._convert(torch.float32)
            self.shapes_before = shapes(self.model, self.example, self.case.family)
            self.notes.append(f"float32: {first_line(error)[:80]}")

    def _convert(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.row["dtype"] = str(dtype).removeprefix("torch.")
        self.model.to(dtype).eval()
        self.example = to(dtype, self.entry.example())
        self.train_inputs = to(dtype, self.entry.train_example()) if self.entry.train_example else None
        self.batch = batch_of_two(self.model, self.train_inputs or self.example)

    def trace(self) -> None:
        start = time.process_time()
        self.graph = ChannelGraph.trace(self.model, self.example, self.train_inputs)
        self.row["trace_s"] = time.process_time() - start
        self.notes += [note[:120] for note in self.graph.notes]
        weights = [name for name, each in self.model.named_parameters() if sum(size > 1 for size in each.shape) > 1]
        outputs = [output_axis(self.model, name) for name in weights]
        prunable = {axis for group in self.graph.groups.values() for axis in group.axes}
        self.row.update(weights=len(outputs), prunable=sum(axis in prunable for axis in outputs))

    def plan(self) -> None:
        start = time.process_time()
        budget = {"channels": SHARE}
        self.chosen = plan_channels(self.graph, budget, criterion="random", scope="local", seed=SEED)
        self.row["plan_s"] = time.process_time() - start
        removed = {name: list(channels) for name, channels in self.chosen.channels.items()}
        self.row.update(macs_before=self.graph.macs(), macs_after=self.graph.macs(removed))
        self.predicted = self.graph.params(removed)

    def train(self) -> None:
        trained = [each for each in self.model.parameters() if each.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, foreach=False)
        train_step(self.model, self.optimizer, self.batch)
        self.objects = dict(self.model.named_parameters())
        self.model.eval()

    def slim(self) -> None:
        dense = leaves(run(self.model, self.example))
        start = time.process_time()
        done = slim_(self.model, self.chosen, example_inputs=self.example, optimizer=self.optimizer)
        self.row["slim_s"] = time.process_time() - start
        self.row.update(params_before=done.params_before, params_after=done.params_after, difference=done.difference)
        require(done.params_after == self.predicted, f"{self.predicted} parameters were predicted")
        require(done.params_after < done.params_before, "nothing was removed")
        self.row["effect"] = effect(dense, leaves(run(self.model, self.example)))

    def shapes(self) -> None:
        found = shapes(self.model, self.example, self.case.family)
        require(found == self.shapes_before, f"outputs had {self.shapes_before}, have {found}"[:300])

    def train_on(self) -> None:
        now = dict(self.model.named_parameters())
        same = now.keys() == self.objects.keys() and all(now[name] is self.objects[name] for name in now)
        require(same, "the Parameter objects are not the same")
        before = {name: each.detach().clone() for name, each in now.items()}
        moving = train_step(self.model, self.optimizer, self.batch)
        still = [name for name in moving if torch.equal(now[name], before[name])]
        require(not still, f"parameters with a gradient do not move: {still[:3]}")

    def reload(self) -> None:
        file = io.BytesIO()
        torch.save(self.model.state_dict(), file)
        file.seek(0)
        fresh = self.entry.build().to(self.dtype)
        apply_structure(fresh, json.loads(json.dumps(structure(self.model))))
        fresh.load_state_dict(torch.load(file, weights_only=True))
        want, have = leaves(run(self.model, self.example)), leaves(run(fresh, self.example))
        equal = len(want) == len(have) and all(torch.equal(a, b) for a, b in zip(want, have, strict=True))
        require(equal, "the reloaded model gives other outputs")


def first_line(error: BaseException) -> str:
    text = str(error).partition("\n")[0]
    return text if isinstance(error, StepError) else f"{type(error).__name__}: {text}"


def main(check: Check | Any) -> None:
    """Runs the steps of a check until one fails."""
    warnings.simplefilter("ignore")
    row = check.row
    row["error"] = ""
    for step in check.steps():
        print(f"step {step.__name__}", flush=True)
        try:
            step()
        except Exception as error:
            row["error"] = f"{step.__name__}: {first_line(error)[:300]}"
            break
    print(json.dumps({**row, "peak_gib": peak_gib(), "notes": "; ".join(check.notes)}), flush=True)


if __name__ == "__main__":
    main(Check(Case(**json.loads(sys.argv[1]))))
