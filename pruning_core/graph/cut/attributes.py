"""Sizes stored as module attributes: where they are, their new values, and a log of changes."""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from pruning_core.graph.cut.widths import widths
from pruning_core.graph.inputs import untouched

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


class Attributes:
    """A log of attribute changes, in order; plain numbers, so that they can be saved and replayed."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self._log: list[tuple[str, str, Any]] = []

    @property
    def changed(self) -> dict[str, dict[str, Any]]:
        """Changed attributes and their values, by module."""
        found: dict[str, dict[str, Any]] = {}
        for path, name, _ in self._log:
            found.setdefault(path, {})[name] = getattr(self.modules[path], name)
        return found

    def set(self, path: str, name: str, value: Any) -> None:
        """Changes an attribute and remembers its value."""
        self._log.append((path, name, getattr(self.modules[path], name)))
        setattr(self.modules[path], name, value)

    def mark(self) -> int:
        """A position in the log, for ``back_to``."""
        return len(self._log)

    def back_to(self, mark: int) -> None:
        """Undoes the changes since ``mark``."""
        while len(self._log) > mark:
            path, name, before = self._log.pop()
            setattr(self.modules[path], name, before)

    def follow_parameters(self) -> None:
        """Updates the width attributes of PyTorch's own modules from their parameters."""
        with untouched(self.modules[""]):  # a weight under a parametrization is computed when it is read
            found = [(path, name, value) for path, each in self.modules.items() for name, value in widths(each).items()]
        for path, name, value in found:
            if getattr(self.modules[path], name) != value:
                self.set(path, name, value)

    def holders(self, where: str, old: int, upwards: bool) -> Iterator[tuple[str, str]]:
        """Attributes equal to this number, in the module, then in those around it, then in its children."""
        for path in [*upwards_from(where), *self._inside(where)] if upwards else [where]:
            names = [name for name in vars(self.modules[path]) if self.hold(path, name, old)]
            for name in sorted(names, key=_unlikely):
                yield path, name

    def _inside(self, path: str) -> Iterator[str]:
        """A module's children, and those in its lists."""
        for name, child in self.modules[path].named_children():
            below = f"{path}.{name}".lstrip(".")
            yield below
            if isinstance(child, CONTAINERS):
                yield from self._inside(below)

    def hold(self, path: str, name: str, old: int) -> bool:
        """Whether an attribute equals the number, or is a sequence that has it."""
        value = vars(self.modules[path]).get(name)
        if isinstance(value, (tuple, list)):
            return bool(value) and all(_is_number(each) for each in value) and old in value
        return _is_number(value) and value == old

    def candidates(self, path: str, name: str, old: int, changes: Mapping[int, int]) -> list[Any]:
        """New values to try for an attribute; of a sequence, all numbers that change or this one alone."""
        value = getattr(self.modules[path], name)
        if not isinstance(value, (tuple, list)):
            return [changes[old]]
        several = (changes, {old: changes[old]})
        return [like(value, [each.get(int(number), int(number)) for number in value]) for each in several]

    def apply_to(self, model: nn.Module) -> None:
        """Replays the changes on a copy of the model."""
        modules = dict(model.named_modules())
        for path, values in self.changed.items():
            for name, value in values.items():
                setattr(modules[path], name, value)


def like(value: Any, several: list[int]) -> Any:
    """``items`` as the type of ``value``: tuple, named tuple or list."""
    return getattr(type(value), "_make", type(value))(several)


def _is_number(value: Any) -> bool:
    """Of numpy as well."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def upwards_from(path: str) -> Iterator[str]:
    """A module path and those of the modules around it, the model itself last."""
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


def _unlikely(name: str) -> bool:
    """Attributes that seldom say how many channels there are come last."""
    seldom = ("window", "shift", "kernel", "stride", "padding", "dilation", "patch", "layer", "depth", "dropout")
    return len(name) == 1 or any(word in name for word in seldom)
