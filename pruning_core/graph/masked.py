"""The reference: the dense model, computing what the cut one must compute.

Whatever reads removed channels reads zeros in their place, and norms take their statistics over the kept ones. So cut
and reference are equal for any activation, bias, norm, gate and padding in between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pruning_core.graph.labels import NONE, Labels, stored, varies, words
from pruning_core.graph.plan import Plan
from pruning_core.graph.recorder import Call, Recorder, Where
from pruning_core.graph.shadows import AxisLabels, Shadow, Stored
from pruning_core.graph.tracing import Inputs, record

READERS = frozenset(
    words(
        "linear addmm conv1d conv2d conv3d convolution _convolution conv_transpose1d conv_transpose2d "
        "conv_transpose3d matmul mm bmm mv dot baddbmm addbmm einsum _grouped_mm scaled_dot_product_attention lstm "
        "gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell mean sum norm linalg_vector_norm "
        "bilinear"
    )
)
LAST = frozenset(["layer_norm", "rms_norm"])


class MaskedRun(Recorder):
    """Runs the dense model as if some labels were gone."""

    def __init__(
        self, labels: Labels, stored: Stored, rule_of: Callable[[Call], Any], where: Where, dead: Tensor
    ) -> None:
        super().__init__(labels, stored, rule_of, where)
        self.dead = dead

    def execute(self, call: Call, args: Any, kwargs: Any) -> Any:
        if call.name in LAST and self._gone(call, "input", -1) is not None:
            return self._last(call)
        if call.name == "group_norm" and self._gone(call, "input", 1) is not None:
            return self._group_norm(call)
        if call.name not in READERS:
            return call.func(*args, **kwargs)
        masked = {id(each): self._masked(each, call.shadows.get(id(each))) for each in call.tensors()}
        args, kwargs = pytree.tree_map_only(Tensor, lambda each: masked.get(id(each), each), (args, kwargs))
        result = call.func(*args, **kwargs)
        return result * self._share(call) if call.name == "mean" else result

    def _masked(self, tensor: Tensor, shadow: Shadow) -> Tensor:
        if shadow is None or not tensor.is_floating_point():
            return tensor
        for labels in [shadow] if isinstance(shadow, Tensor) else [shadow.spread(dim) for dim in shadow.labelled()]:
            gone = self._dead(labels)
            if bool(stored(gone)[0].any()):
                tensor = tensor.masked_fill(gone, 0)
        return tensor

    def _dead(self, labels: Tensor) -> Tensor:
        core = stored(labels)[0]
        return self.dead[core.long()].expand(labels.shape)

    def _gone(self, call: Call, argument: str, dim: int) -> Tensor | None:
        """Which indices of a dimension are gone on all lines along it, if any: not those of one removed head."""
        shadow = call.shadow(argument)
        if isinstance(shadow, AxisLabels):
            lines = shadow.vector(dim % len(shadow.shape))[None]
        elif isinstance(shadow, Tensor) and varies(shadow, dim % shadow.dim()):
            lines = stored(shadow)[0].movedim(dim, -1).reshape(-1, shadow.shape[dim])
        else:
            return None
        gone = self.dead[lines.long()].all(0)
        return gone if bool(gone.any()) else None

    def _last(self, call: Call) -> Tensor:
        gone = self._gone(call, "input", -1)
        assert gone is not None
        kept = (~gone).nonzero()[:, 0]
        narrow = {name: call[name][..., kept] for name in ("input", "weight", "bias") if isinstance(call[name], Tensor)}
        part = call.func(**{**call.arguments, **narrow, "normalized_shape": [len(kept)]})
        return torch.zeros_like(call["input"]).index_copy(-1, kept, part)

    def _group_norm(self, call: Call) -> Tensor:
        gone = self._gone(call, "input", 1)
        assert gone is not None
        kept = (~gone).nonzero()[:, 0]
        groups = len(kept) if call["num_groups"] == len(gone) else call["num_groups"]
        narrow = {name: call[name][kept] for name in ("weight", "bias") if isinstance(call[name], Tensor)}
        part = call.func(**{**call.arguments, **narrow, "input": call["input"][:, kept], "num_groups": groups})
        return torch.zeros_like(call["input"]).index_copy(1, kept, part)

    def _share(self, call: Call) -> float:
        """A mean over channels is over the kept ones."""
        shadow = call.shadow("self")
        if not isinstance(shadow, Tensor):
            return 1.0
        dims = call["dim"] if isinstance(call["dim"], (list, tuple)) else [call["dim"]]
        share = 1.0
        for dim in dims if dims != [None] else []:
            gone = self._gone(call, "self", dim)
            share *= 1.0 if gone is None else len(gone) / int((~gone).sum())
        return share


def dead_labels(labels: Labels, plan: Plan) -> Tensor:
    dead = np.zeros(len(labels), dtype=bool)
    for axis, at in plan.removed.items():
        dead[labels.axes[axis].numpy()[list(at)]] = True
    dead[NONE] = False
    return torch.from_numpy(dead)


def masked_run(model: nn.Module, plan: Plan, example: Inputs) -> tuple[Any, MaskedRun]:
    """What the cut model must give on the example, and every step on the way."""
    labels = Labels(plan.narrow_heads)
    known = Stored(labels, model)
    dead = dead_labels(labels, plan)

    def made(labels: Labels, stored: Stored, rule_of: Callable[[Call], Any], where: Where) -> MaskedRun:
        return MaskedRun(labels, stored, rule_of, where, dead)

    trace = record(model, example, labels, known, False, made)
    assert isinstance(trace, MaskedRun)
    return trace.output, trace
