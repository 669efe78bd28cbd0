"""Runs a model under a recorder, without side effects."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from pruning_core.graph.errors import CannotRunError
from pruning_core.graph.inputs import Inputs, leaves, untouched
from pruning_core.graph.trace.recorder import ModulePath, Recorder
from pruning_core.graph.trace.rules import rule_of

R = TypeVar("R", bound=Recorder)


def record(trace: R, model: nn.Module, example: Inputs, *, training: bool, outputs_may_shrink: bool = False) -> R:
    """One forward pass under the recorder.

    Outputs keep their shape, so all channels in them are frozen, unless ``outputs_may_shrink``.
    """
    args, kwargs = example
    path = ModulePath(model, trace.entered)
    trace.begin(rule_of, path)
    try:
        trace.given(example)
        with untouched(model, training), torch.inference_mode(), trace:
            trace.output = model(*args, **kwargs)
        _end(trace, outputs_may_shrink)
    except Exception as error:
        mode = "training" if training else "evaluation"
        first_line = f"{type(error).__name__}: {error}".partition("\n")[0][:300]
        raise CannotRunError(
            f"example_inputs: the model cannot run them in {mode} mode ({first_line}, in "
            f"{path.now or 'the model itself'}); give inputs that model(...) takes"
        ) from error
    finally:
        path.remove()
    return trace


def _end(trace: Recorder, outputs_may_shrink: bool) -> None:
    for leaf in leaves(trace.output):
        trace.end(leaf)
        shadow = trace.shadow_of(leaf)
        if outputs_may_shrink and isinstance(shadow, Tensor):  # a parameter as an output is always frozen
            trace.labels.mark_removable(shadow)
        else:
            trace.freeze(shadow, "is an output")
