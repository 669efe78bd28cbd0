"""What each operation does to labels. A rule is ``rule(trace, call) -> shadow of the result``."""

from __future__ import annotations

from typing import Any

import torch

from pruning_core.graph.trace.recorder import Call, Recorder
from pruning_core.graph.trace.rules import attention, elementwise, moves, norms, products, reductions, weighted
from pruning_core.graph.trace.rules.table import RULES, Rule

__all__ = ["attention", "elementwise", "moves", "norms", "products", "reductions", "rule_of", "weighted"]


def rule_of(call: Call) -> Rule:
    """The rule of an operation; pointwise ones are known by PyTorch's own tag, all others must be named."""
    if not any(shadow is not None for shadow in call.shadows.values()):
        return elementwise.nothing_known
    rule = RULES.get(call.name)
    if rule is not None:
        return rule
    return elementwise.pointwise if torch.Tag.pointwise in call.func.tags else unknown


def unknown(trace: Recorder, call: Call) -> Any:
    """Freezes the channels of an operation without a rule."""
    for shadow in call.shadows.values():
        trace.freeze(shadow, "an operation without a rule")
    return None
