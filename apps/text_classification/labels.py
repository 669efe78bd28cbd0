"""The label column of a user's file: names, numbers or real numbers, as the model takes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from apps.common.errors import BadInput
from apps.text_classification.tasks import Task


def label_names(values: Sequence[Any], source: str) -> tuple[str, ...] | None:
    """The label names in order; None when they are real numbers."""
    _no_gaps(values, source)
    found = set(values)
    if all(isinstance(value, float) for value in found):
        return None
    if all(isinstance(value, int) for value in found) and found == set(range(len(found))):
        return tuple(f"LABEL_{i}" for i in range(len(found)))  # as Transformers calls them
    return tuple(str(value) for value in sorted(found, key=str if _mixed(found) else None))


def _mixed(found: set[Any]) -> bool:
    return len({type(value) for value in found}) > 1


def _no_gaps(values: Sequence[Any], source: str) -> None:
    for i, value in enumerate(values):
        if value is None or value != value:
            raise BadInput(f"{source}: row {i + 1} has no label, got {value}; fill or remove it")
        if not isinstance(value, str | int | float):
            raise BadInput(
                f"{source}: the label of row {i + 1} must be a name or a number, got {value!r}; mend the row"
            )


def label_numbers(task: Task, values: Sequence[Any], source: str) -> list[Any]:
    """Labels as the model takes them: numbers of the list, or for a regression themselves."""
    _no_gaps(values, source)
    if task.labels is None:
        return [_real(value, i, source) for i, value in enumerate(values)]
    place = {label: i for i, label in enumerate(task.labels)}
    numbered = task.name != "custom" or task.labels[0].startswith("LABEL_")
    chosen = []
    for i, value in enumerate(values):
        number = int(value) if numbered and isinstance(value, int) else place.get(str(value), -1)
        if not 0 <= number < len(task.labels):
            known = ", ".join(f"{i} {label}" for i, label in enumerate(task.labels))
            raise BadInput(
                f"{source}: the label of row {i + 1} is not in the list ({known}), got {value!r}; mend the row"
            )
        chosen.append(number)
    return chosen


def _real(value: Any, i: int, source: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise BadInput(f"{source}: the label of row {i + 1} must be a number, got {value!r}; mend the row")
    return number
