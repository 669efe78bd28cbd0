"""The table of rules, by the operation's name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pruning_core.graph.trace.recorder import Call, Recorder

Rule = Callable[[Recorder, Call], Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for operations, by name."""

    def register(function: Rule) -> Rule:
        for name in names:
            assert name not in RULES, name
            RULES[name] = function
        return function

    return register
