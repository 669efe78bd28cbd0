"""Runs a model under a recorder, without side effects."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import nn

from pruning_core.graph.errors import CannotRunError, OtherOperationsError
from pruning_core.graph.inputs import Inputs, untouched
from pruning_core.graph.trace.recorder import ModulePath, Recorder
from pruning_core.graph.trace.rules import rule_of

R = TypeVar("R", bound=Recorder)


def record(
    trace: R,
    model: nn.Module,
    example: Inputs,
    *,
    training: bool,
    outputs_may_shrink: bool = False,
    inside: AbstractContextManager[Any] | None = None,
) -> R:
    """One forward pass under the recorder, and ``inside`` another context."""
    args, kwargs = example
    path = ModulePath(model, trace.entered if trace.watches else None)
    trace.begin(rule_of, path)
    try:
        trace.given(example)
        with untouched(model, training), torch.inference_mode(), trace, inside or nullcontext():
            output = model(*args, **kwargs)
        trace.end(output, outputs_may_shrink)
    except OtherOperationsError:
        raise
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
