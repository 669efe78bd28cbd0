"""A table of classes by name that suggests the right name for a wrong one."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


def did_you_mean(wrong: object, known: Iterable[str]) -> str:
    """``"did you mean 'x'?"`` for a close match, else the list of known names."""
    known = list(known)
    close = difflib.get_close_matches(str(wrong), known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    more = f", ... ({len(known)} in all)" if len(known) > 12 else ""
    return f"known: {', '.join(known[:12])}{more}"


class Registry(Generic[T]):
    """The classes of one concept by name: ``TABLE["name"]``; ValueError with a suggestion for an unknown name.

    A new kind is one class and one ``@TABLE.add("name")`` line.
    """

    def __init__(self, concept: str) -> None:
        self.concept = concept
        self._kinds: dict[str, type[T]] = {}

    def add(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator: registers the class under ``name``; ValueError when the name is taken."""

        def register(kind: type[T]) -> type[T]:
            if name in self._kinds:
                raise ValueError(f"{name}: this {self.concept} is registered already; choose another name")
            self._kinds[name] = kind
            return kind

        return register

    def remove(self, name: str) -> None:
        """Unregisters a name (for tests and plug-ins that unload)."""
        del self._kinds[name]

    def __getitem__(self, name: str) -> type[T]:
        if name not in self._kinds:
            raise ValueError(f"unknown {self.concept}, got {name!r}; {did_you_mean(name, self._kinds)}")
        return self._kinds[name]

    def __contains__(self, name: object) -> bool:
        return name in self._kinds

    def __iter__(self) -> Iterator[str]:
        return iter(self._kinds)
