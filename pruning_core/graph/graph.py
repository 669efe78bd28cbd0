"""The channels of a model: traced, coupled, and proved by a trial cut."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.jit import ScriptModule

from pruning_core.graph.couple.groups import Coupling, Removed
from pruning_core.graph.couple.trial import prove
from pruning_core.graph.cut.copies import TrialCuts
from pruning_core.graph.cut.difference import numbers_of
from pruning_core.graph.errors import GraphError
from pruning_core.graph.inputs import Inputs, as_inputs, leaves, without_collection
from pruning_core.graph.plan import Plan, digest
from pruning_core.graph.trace.activations import mean_activations
from pruning_core.graph.trace.labels import Axis, Labels
from pruning_core.graph.trace.modules import tie_modules
from pruning_core.graph.trace.recorder import Recorder
from pruning_core.graph.trace.replay import AskedForMode, smaller, trains_alike
from pruning_core.graph.trace.run import record
from pruning_core.graph.trace.shadows import StoredTensors
from pruning_core.graph.wrappers import refuse_unready, unwrapped


class ChannelGraph(Coupling):
    """The coupled channels of a model: which can be removed, and what goes with each.

    Made by ``ChannelGraph.trace(model, example_inputs)``. ``groups``: the removable channels, by name. ``frozen()``:
    what cannot be removed, and why. ``example``: what the model was traced with. ``small``: smaller inputs on which it
    does the same, where there are any, and that run. ``notes``: what a report should say.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Inputs,
        traces: list[Recorder],
        small: tuple[Inputs, Recorder],
        *,
        notes: list[str],
        outputs_may_shrink: bool = False,
    ) -> None:
        super().__init__(traces[0].labels, traces)
        self.model, self.example, self.stored = model, example, traces[0].stored
        self.notes, self.outputs_may_shrink = notes, outputs_may_shrink
        self.small = small
        self._cut = TrialCuts(model, *small)
        self.traced = digest(model)
        self.parameters = frozenset(name for name, _ in model.named_parameters())
        self.consumers = frozenset(axis for trace in traces for axis in trace.consumers)

    @classmethod
    @without_collection()
    def trace(
        cls,
        model: nn.Module,
        example_inputs: Any,
        train_inputs: Any = None,
        *,
        outputs_may_shrink: bool = False,
        narrow_heads: bool = False,
        trial: bool = True,
    ) -> ChannelGraph:
        """Runs the model and finds its channels; the model is left as it was.

        ``example_inputs``: a tensor, a tuple of arguments or a dict of keywords; ``train_inputs``: the same for the
        pass in training mode, where it takes something else. ``outputs_may_shrink``: channels of outputs are not
        frozen. ``narrow_heads``: attention keeps its heads and loses channels of each.

        Cost: a forward pass in evaluation mode, and, on smaller inputs where the model does the same on them, one in
        training mode where its code asks for the mode; then the trial on a copy that shares the model's memory but for
        what is cut, a masked and a cut pass in float64 and a cut pass that is compared in shapes alone; and one to
        three more for each size that the code keeps in its own way. ``trial=False`` spares the copy and its passes;
        then groups are listed that the code may not follow, and ``slim_`` finds out.
        """
        model = unwrapped(model)
        refuse_unready(model)
        scripted = next((name for name, each in model.named_modules() if isinstance(each, ScriptModule)), None)
        if scripted is not None:
            raise GraphError(
                f"{scripted or 'model'}: is TorchScript, whose operations cannot be seen; give the Python module that "
                "it was made from, and script it after the cut"
            )
        labels, example = Labels(narrow_heads), as_inputs(example_inputs)
        batch = next((each for each in leaves(example) if isinstance(each, Tensor) and each.dim()), None)
        if batch is not None and not batch.shape[0]:
            raise GraphError(f"example_inputs: holds no example, got shape {tuple(batch.shape)}; give at least one")
        stored = StoredTensors(labels, model)
        may = outputs_may_shrink
        asked, first = AskedForMode(), Recorder(labels, stored)
        traces = [record(first, model, example, training=False, outputs_may_shrink=may, inside=asked)]
        numbers_of(traces[0].output)
        small = (smaller(model, example, traces[0]) if trial else None) or (example, traces[0])
        notes: list[str] = []
        try:
            inputs = small[0] if train_inputs is None else as_inputs(train_inputs)
            if train_inputs is not None or (asked.names and not trains_alike(model, *small)):
                traces.append(record(Recorder(labels, stored), model, inputs, training=True, outputs_may_shrink=may))
        except GraphError as error:
            if train_inputs is not None:
                raise
            notes.append(f"traced in evaluation mode only: {error}")
        tie_modules(model, labels)
        graph = cls(model, example, traces, small, notes=notes, outputs_may_shrink=outputs_may_shrink)
        if trial:
            prove(graph, model, graph._attempt)
        return graph

    def _attempt(self, removed: Removed, numbers: bool = True) -> None:
        """Cuts a copy; GraphError where the cut cannot be followed, or computes something else."""
        self._cut(self.plan(self.restored(removed)), numbers)

    # ---- what there is ----------------------------------------------------------------------------------------------

    def frozen(self) -> list[tuple[Axis, int, str]]:
        """(axis, number of its channels that cannot be removed, reason), for every axis and reason."""
        found = []
        for axis, vector in self.labels.axes.items():
            units = self.components.of_label[vector.numpy()]
            why = Counter(reason for unit in units if (reason := self.reason(int(unit))))
            found += [(axis, count, reason) for reason, count in why.items()]
        return found

    def reason(self, unit: int) -> str | None:
        """Why a unit stays; None for one that can go, or that nothing uses."""
        if unit in self.components.reasons or unit in self.where or self.components.fixed(unit):
            return self.components.reasons.get(unit)
        return "no other channel has the same axes, and one must stay"

    def untraced(self) -> list[str]:
        """Names of parameters that no operation used on these inputs."""
        return [
            name
            for name in self.stored.names
            if name in self.parameters
            and all(self._unused(Axis(name, dim)) for dim in range(self.stored.names[name].dim()))
        ]

    def _unused(self, axis: Axis) -> bool:
        units = self.components.of_label[self.labels.axes[axis].numpy()]
        return all(self.components.fixed(int(unit)) and int(unit) not in self.components.reasons for unit in units)

    def mean_activations(self, run: Callable[[nn.Module], Any]) -> np.ndarray:
        """float64 (labels,): ``mean |x|`` over what consumers read while ``run(model)`` runs."""
        return mean_activations(self.model, run, self.labels.narrow_heads)

    # ---- what is left when channels go ------------------------------------------------------------------------------

    def params(self, removed: Removed | None = None) -> int:
        """Number of parameters of the model, without the removed channels if given."""
        return self._sizes.total(self.dead(removed or {}))

    def macs(self, removed: Removed | None = None) -> int:
        """Multiply-adds of weighted layers and attention in one forward pass of the example (batch included)."""
        return self._costs.total(self.dead(removed or {}))

    @cached_property
    def _costs(self) -> Products:
        return Products([(cost.rows, cost.vectors) for cost in self.traces[0].costs])

    @cached_property
    def _sizes(self) -> Products:
        tensors = [(name, each) for name, each in self.model.named_parameters()]
        axes = self.labels.axes
        return Products(
            [
                (1, [axes[Axis(name, dim)] for dim in range(each.dim())]) if name in self.stored.names
                else (each.numel(), [])
                for name, each in tensors
            ]
        )  # fmt: skip

    def plan(self, removed: Removed) -> Plan:
        """The plan that removes ``{group name: channel numbers}``; GraphError where pieces would become unequal."""
        self.check()
        chosen = {name: tuple(sorted({int(i) for i in channels})) for name, channels in removed.items()}
        for name, channels in chosen.items():
            self._check(name, channels)
        if any(self.balances.off(self.units(chosen))):
            raise GraphError(
                "plan: the pieces of a chunk or split would differ in size; pass the channels through graph.restored()"
            )
        gone, axes = self.dead(chosen), self.removed_indices(chosen)
        products = [each for trace in self.traces for each in trace.products]
        return Plan(
            sizes={axis: len(self.labels.axes[axis]) for axis in axes},
            removed=axes,
            channels={name: channels for name, channels in chosen.items() if channels},
            consumers=self.consumers & axes.keys(),
            norms=self._norms(gone),
            model=self.traced,
            narrow_heads=self.labels.narrow_heads,
            outputs_may_shrink=self.outputs_may_shrink,
            multiplied=frozenset(where for where, vector in products if bool(gone[vector.numpy()].any())),
            example=self.example,
            recorded=self.traces[0],
        )

    def _norms(self, gone: np.ndarray) -> dict[str, int | None]:
        """The modules whose statistics lose channels."""
        found: dict[str, int | None] = {}
        for each in (each for trace in self.traces for each in trace.statistics):
            if bool(gone[each.labels.numpy()].any()):
                found[each.where] = each.dim if found.get(each.where, each.dim) == each.dim else None
        return found

    def check(self) -> None:
        """GraphError if the model is no longer what was traced."""
        now = dict(self.model.named_parameters())
        other = any(now.get(name) is not self.stored.names.get(name, now.get(name)) for name in self.parameters)
        if other or digest(self.model) != self.traced:
            raise GraphError("graph: the model has other parameters than when it was traced; trace it again")

    def _check(self, name: str, channels: tuple[int, ...]) -> None:
        if name not in self.groups:
            raise GraphError(f"plan: there is no such group, got {name!r}; see graph.groups")
        count = len(self.groups[name])
        if any(not 0 <= i < count for i in channels) or len(channels) >= count:
            raise GraphError(
                f"plan: {name} has {count} channels of which one must stay, got {list(channels)[:8]}; remove others"
            )


class Products:
    """A sum of products: a number times how many labels are left of each of some vectors."""

    def __init__(self, terms: Sequence[tuple[int, Sequence[Tensor]]]) -> None:
        vectors = [each for _, some in terms for each in some]
        self._factors = [factor for factor, _ in terms]
        self._counts = [len(some) for _, some in terms]
        self._labels = np.concatenate([np.zeros(0, dtype=np.int32), *(each.numpy() for each in vectors)])
        self._ends = np.cumsum([0, *(len(each) for each in vectors)])

    def total(self, dead: np.ndarray) -> int:
        """The sum without the dead labels."""
        alive = np.concatenate([[0], np.cumsum(~dead[self._labels])])[self._ends]
        left = iter(np.diff(alive).tolist())
        return sum(
            factor * math.prod(itertools.islice(left, count))
            for factor, count in zip(self._factors, self._counts, strict=True)
        )
