"""Going on with a run: the options it was begun with, and which of them may change."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Collection, Mapping
from typing import Any

from apps.common.arguments import plain
from apps.common.errors import BadInput


def saved_options(
    options: Namespace,
    given: Mapping[str, Any],
    saved: Mapping[str, Any],
    *,
    may_change: Collection[str],
    with_dashes: Collection[str] = (),
    without: str,
) -> Namespace:
    """The options the run was begun with. What is given anew must agree, or be free to change.

    ``with_dashes``: options that are spelled with dashes. ``without``: the option that a new run leaves out.
    """
    for name, value in given.items():
        if name not in may_change and plain(value) != saved.get(name):
            spelled = "--" + (name.replace("_", "-") if name in with_dashes else name)
            do = f"leave it out, or begin a new run without {without}"
            raise BadInput(f"{spelled}: this run was begun with {saved.get(name)!r}, got {plain(value)!r}; {do}")
    return Namespace(**{**vars(options), **saved, **{name: given[name] for name in may_change if name in given}})
