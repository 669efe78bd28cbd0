"""Torch-Pruning 1.6.1 on one model of the zoo: ``python -m benchmarks.peer_torch_pruning '<case as JSON>'``.

Needs ``pip install torch-pruning==1.6.1``. It gets the same model in float32, a group importance, half of the channels
of every layer. In its favour: it is told to leave alone each layer of which ``ChannelGraph`` finds that no channel can
go; its trace runs the model with all arguments and sees only outputs that have a gradient. What it gives must run with
the same shapes.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo_check import SHARE, Case, batch_of_two, main, require, shapes, train_step
from benchmarks.zoo_models import randomise_
from pruning_core import ChannelGraph
from pruning_core.graph.inputs import leaves

LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


class PeerCheck:
    """The steps in their order; ``row`` gathers what they found."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.row: dict[str, Any] = {}
        self.notes: list[str] = []

    def steps(self) -> Iterator[Callable[[], None]]:
        yield from (self.build, self.find_kept, self.prune, self.forward, self.train_on)

    def build(self) -> None:
        entry = self.case.entry()
        self.model = entry.build()
        self.example = entry.example()
        randomise_(self.model, self.example)
        train_inputs = entry.train_example() if entry.train_example else self.example
        self.batch = batch_of_two(self.model, train_inputs)
        self.shapes_before = shapes(self.model, self.example, self.case.family)
        self.params_before = self._params()

    def _params(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def find_kept(self) -> None:
        graph = ChannelGraph.trace(self.model, self.example)
        free = {axis.tensor for group in graph.groups.values() for axis in group.axes if axis not in graph.consumers}
        layers = [(name, each) for name, each in self.model.named_modules() if isinstance(each, LAYERS)]
        self.kept = [each for name, each in layers if f"{name}.weight" not in free]

    def prune(self) -> None:
        import torch_pruning

        start = time.process_time()
        args, kwargs = self.example
        pruner = torch_pruning.pruner.BasePruner(
            self.model.eval(),
            args,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=SHARE,
            ignored_layers=self.kept,
            forward_fn=lambda model, _: model(*args, **kwargs),
            output_transform=_with_gradient,
        )
        pruner.step()
        self.row.update(seconds=time.process_time() - start, params_after=self._params())

    def forward(self) -> None:
        found = shapes(self.model, self.example, self.case.family)
        require(found == self.shapes_before, f"outputs had {self.shapes_before}, have {found}"[:300])
        require(self._params() < self.params_before, "nothing was removed")

    def train_on(self) -> None:
        trained = [each for each in self.model.parameters() if each.requires_grad]
        train_step(self.model, torch.optim.AdamW(trained, lr=1e-4, foreach=False), self.batch)


def _with_gradient(output: Any) -> list[Tensor]:
    return [leaf for leaf in leaves(output) if leaf.grad_fn is not None]


if __name__ == "__main__":
    main(PeerCheck(Case(**json.loads(sys.argv[1]))))
