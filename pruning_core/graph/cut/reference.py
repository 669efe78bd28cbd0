"""The reference: the dense model, masked, computing what the cut one must compute.

Consumers of removed channels read zeros; statistics (norms, means, a softmax) are those of the kept channels. So cut
model and reference are equal for any activation, bias, norm, gate and padding in between.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pruning_core.graph.errors import OtherOperationsError
from pruning_core.graph.inputs import Inputs, mapped
from pruning_core.graph.plan import Plan
from pruning_core.graph.trace import draws
from pruning_core.graph.trace.labels import NONE, Labels, unexpanded, varies
from pruning_core.graph.trace.operations import (
    CHANNELS_FIRST_NORMS,
    CONSUMERS,
    LAST_DIM_NORMS,
    SCANS,
    STATISTICS,
)
from pruning_core.graph.trace.recorder import Call, Recorder
from pruning_core.graph.trace.replay import Replay
from pruning_core.graph.trace.run import record
from pruning_core.graph.trace.shadows import AxisLabels, Shadow, StoredTensors
from pruning_core.graph.trace.upcast import WEIGHTED, Upcast


class MaskedRun(Replay):
    """Runs the dense model as if the labels in ``dead`` (bool per label) were gone; in float64 with an ``upcast``."""

    def __init__(
        self,
        labels: Labels,
        stored: StoredTensors,
        dead: Tensor,
        upcast: Upcast | None = None,
        recorded: Recorder | None = None,
    ) -> None:
        super().__init__(labels, stored, recorded)
        self.dead, self.upcast = dead, upcast

    def execute(self, call: Call, args: Any, kwargs: Any) -> Any:
        if call.name in LAST_DIM_NORMS and self._gone(call, "input", -1) is not None:
            return self._last(call)
        if call.name == "group_norm" and self._gone(call, "input", 1) is not None:
            return self._group_norm(call)
        if call.name in STATISTICS | SCANS and not isinstance(call["other"], Tensor):
            gone = {dim: gone for dim in self._reduced(call) if (gone := self._gone(call, "self", dim)) is not None}
            if gone:
                return self._of_kept(call, gone)
        if call.name in CHANNELS_FIRST_NORMS and isinstance(call.shadow("input"), AxisLabels):
            return self._weight_standardized(call)
        if call.name not in CONSUMERS:
            return self._run(call, args, kwargs)
        shadows = {id(each): call.shadows.get(id(each)) for each in call.tensors()}
        known = any(isinstance(each, Tensor) for each in shadows.values())
        zeros = known and call.name in WEIGHTED  # are what a weight multiplies: it can stay as it is
        masked = {
            id(each): self._masked(each, shadows[id(each)])
            for each in call.tensors()
            if not zeros or isinstance(shadows[id(each)], Tensor)
        }
        args, kwargs = mapped(lambda each: masked.get(id(each), each), (args, kwargs))
        return self._run(call, args, kwargs)

    def _run(self, call: Call, args: Any, kwargs: Any) -> Any:
        return self.upcast.run(call.func, args, kwargs) if self.upcast else draws.run(call.func, args, kwargs)

    def _masked(self, tensor: Tensor, shadow: Shadow) -> Tensor:
        if shadow is None or not (tensor.is_floating_point() or tensor.is_complex()):
            return tensor
        for labels in [shadow] if isinstance(shadow, Tensor) else [shadow.spread(dim) for dim in shadow.labelled()]:
            gone = self._dead(labels)
            if bool(unexpanded(gone)[0].any()):
                whole, tensor = tensor, tensor.masked_fill(gone, 0)
                if self.upcast:
                    self.upcast.stands_for(tensor, whole)
        return tensor

    def _dead(self, labels: Tensor) -> Tensor:
        core = unexpanded(labels)[0]
        return self.dead[core.long()].expand(labels.shape)

    def _gone(self, call: Call, argument: str, dim: int) -> Tensor | None:
        """Which indices of a dimension are gone on all lines along it, if any: not those of one removed head."""
        shadow = call.shadow(argument)
        if isinstance(shadow, AxisLabels):
            lines = shadow.vector(dim % len(shadow.shape))[None]
        elif isinstance(shadow, Tensor) and varies(shadow, dim % shadow.dim()):
            lines = unexpanded(shadow)[0].movedim(dim, -1).reshape(-1, shadow.shape[dim])
        else:
            return None
        gone = self.dead[lines.long()].all(0)
        return gone if bool(gone.any()) else None

    def _last(self, call: Call) -> Tensor:
        gone = self._gone(call, "input", -1)
        assert gone is not None
        kept = (~gone).nonzero()[:, 0]
        narrow = {name: call[name][..., kept] for name in ("input", "weight", "bias") if isinstance(call[name], Tensor)}
        part = self._run(call, (), {**call.arguments, **narrow, "normalized_shape": [len(kept)]})
        return part.new_zeros(call["input"].shape).index_copy(-1, kept, part)

    def _group_norm(self, call: Call) -> Tensor:
        gone = self._gone(call, "input", 1)
        assert gone is not None
        kept = (~gone).nonzero()[:, 0]
        groups = len(kept) if call["num_groups"] == len(gone) else call["num_groups"]
        narrow = {name: call[name][kept] for name in ("weight", "bias") if isinstance(call[name], Tensor)}
        narrow["input"] = call["input"][:, kept]
        part = self._run(call, (), {**call.arguments, **narrow, "num_groups": groups})
        return part.new_zeros(call["input"].shape).index_copy(1, kept, part)

    def _weight_standardized(self, call: Call) -> Any:
        """A batch norm of a weight, over the kept of what each output channel reads."""
        weight, kept = call["input"], []
        for dim in (0, *range(2, weight.dim())):
            gone = self._gone(call, "input", dim)
            kept.append((dim, torch.arange(weight.shape[dim]) if gone is None else (~gone).nonzero()[:, 0]))
        part = weight
        for dim, at in kept:
            part = part.index_select(dim, at)
        part = self._run(call, (), {**call.arguments, "input": part})
        for dim, at in reversed(kept):
            shape = [weight.shape[dim] if each == dim else size for each, size in enumerate(part.shape)]
            part = part.new_zeros(shape).index_copy(dim, at, part)
        return part

    @staticmethod
    def _reduced(call: Call) -> list[int]:
        dims = call["dim"] if isinstance(call["dim"], (list, tuple)) else [call["dim"]]
        count = call["self"].dim()
        return [dim % count for dim in dims] if count and dims and dims != [None] else list(range(count))

    def _of_kept(self, call: Call, gone: dict[int, Tensor]) -> Any:
        """A statistic of the kept channels; where each channel gets a number, the removed ones get zero."""
        part = call["self"]
        for dim, each in gone.items():
            part = part.index_select(dim, (~each).nonzero()[:, 0])
        if self.upcast:
            self.upcast.stands_for(part, call["self"])
        result = self._run(call, (), {**call.arguments, "self": part})
        if call.name not in SCANS:
            return result
        ((dim, each),) = gone.items()
        kept = (~each).nonzero()[:, 0]
        return pytree.tree_map_only(
            Tensor, lambda found: found.new_zeros(call["self"].shape).index_copy(dim, kept, found), result
        )


def dead_labels(labels: Labels, plan: Plan) -> Tensor:
    """Bool per label: whether the plan removes it."""
    dead = np.zeros(len(labels), dtype=bool)
    for axis, at in plan.removed.items():
        dead[labels.axes[axis].numpy()[list(at)]] = True
    dead[NONE] = False
    return torch.from_numpy(dead)


def recorded_run(recorded: Recorder, plan: Plan) -> MaskedRun:
    """A recorded run as the reference for shapes alone."""
    found = MaskedRun(recorded.labels, recorded.stored, dead_labels(recorded.labels, plan))
    found.operations = recorded.operations
    return found


def masked_run(
    model: nn.Module, plan: Plan, example: Inputs, upcast: Upcast | None = None, recorded: Recorder | None = None
) -> MaskedRun:
    """Runs the reference on the example; keeps its ``output`` and every operation."""
    if recorded is not None:
        dead = dead_labels(recorded.labels, plan)
        replayed = MaskedRun(recorded.labels, recorded.stored, dead, upcast, recorded)
        with contextlib.suppress(OtherOperationsError):  # code that looks at what it is given: it is recorded anew
            return record(replayed, model, example, training=False)
    labels = Labels(plan.narrow_heads)
    stored = StoredTensors(labels, model)
    return record(MaskedRun(labels, stored, dead_labels(labels, plan), upcast), model, example, training=False)
