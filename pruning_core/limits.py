"""Limits: the least and the most sparsity of a layer or of a group of channels."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator

from pruning_core.options import regular_expression, shown
from pruning_core.registry import did_you_mean


@dataclass(frozen=True)
class Limits:
    """Sparsities, the share that is *gone*: between ``least`` and ``most``, and others for ``layers`` by name.

    ``layers`` maps regular expressions (``re.search``) to (least, most); the last that finds a name counts for it.
    """

    least: float = 0.0
    most: float = 1.0
    layers: tuple[tuple[str, tuple[float, float]], ...] = ()

    def of(self, names: Iterable[str]) -> tuple[float, float]:
        """(least, most) of what is tied across these layers: the narrowest of theirs."""
        found = {name: pair for name in names for pattern, pair in self.layers if re.search(pattern, name)}
        if not found:
            return self.least, self.most
        least, most = max(low for low, _ in found.values()), min(high for _, high in found.values())
        if least > most:
            raise ValueError(
                f"limits: nothing fits {', '.join(sorted(found))}, whose channels go together, "
                f"got at least {least:g} and at most {most:g}; widen one"
            )
        return least, most

    def check_names(self, where: str, names: Iterable[str]) -> None:
        """ValueError for a pattern that finds none of the names."""
        names = list(dict.fromkeys(names))
        for pattern, _ in self.layers:
            if not any(re.search(pattern, name) for name in names):
                hint = did_you_mean(pattern, names) if names else "the model has none"
                raise ValueError(f"{where}: matches no layer that takes part, got {pattern!r}; {hint}")


def read_limits(given: Any, least: float = 0.0, most: float = 1.0) -> Limits:
    """``0.5``: at most half of anything. ``{"stem": 0.5, "head": [0.2, 0.8]}``: of these layers, at most or between."""
    if isinstance(given, Limits):
        return given
    if not isinstance(given, Mapping):
        return Limits(*_pair("", given, least))
    layers = []
    for pattern, value in given.items():
        if not isinstance(pattern, str):
            raise ValueError(f"names must be strings, got {shown(pattern)}; write for example {{'stem': 0.5}}")
        layers.append((regular_expression(pattern), _pair(f"{pattern} ", value, 0.0)))
    return Limits(least, most, tuple(layers))


def _pair(what: str, value: Any, least: float) -> tuple[float, float]:
    pair = value if isinstance(value, Sequence) and not isinstance(value, str) else (least, value)
    if len(pair) != 2 or any(isinstance(x, bool) or not isinstance(x, int | float) for x in pair):
        raise ValueError(f"{what}must be the share that may go, or [at least, at most], got {shown(value)}; use 0.5")
    low, high = float(pair[0]), float(pair[1])
    if not 0 <= low <= high <= 1:
        raise ValueError(f"{what}must lie between 0 and 1, the least first, got {shown(value)}; for example 0.5")
    return low, high


def _check(value: Any) -> Any:
    read_limits(value)
    return (
        {name: list(each) if isinstance(each, tuple) else each for name, each in value.items()}
        if isinstance(value, Mapping)
        else value
    )


LimitsOption = Annotated[Any, BeforeValidator(_check)]
