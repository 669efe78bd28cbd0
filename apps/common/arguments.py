"""Command lines: an unknown option is answered with the nearest known one, and rank 0 alone speaks.

Nothing heavy is imported here, so that --help and typing mistakes are answered at once.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

EXIT_BAD_INPUT = 2
RANK_0_SPEAKS_WITHIN = 20.0  # seconds


class Parser(argparse.ArgumentParser):
    """No abbreviations: ``--epoch`` would silently be ``--epochs`` today and ambiguous tomorrow."""

    def __init__(self, *, description: str, epilog: str) -> None:
        style = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, epilog=epilog, formatter_class=style, allow_abbrev=False)
        self.gone: dict[str, str] = {}
        """Options of older programs -> what takes their place."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        options, unknown = self.parse_known_args(args, namespace)
        for word in unknown:
            self.error(self._unknown(word.partition("=")[0]))
        return options

    def _unknown(self, word: str) -> str:
        if not word.startswith("-"):
            return f"arguments: unexpected {word!r}; every value follows an --option"
        if word in self.gone:
            return f"{word}: is no option here; {self.gone[word]}"
        near = difflib.get_close_matches(word, self._option_string_actions, n=1)
        return f"{word}: unknown option; " + (f"did you mean {near[0]!r}?" if near else "see --help")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        near = difflib.get_close_matches(str(value), [str(choice) for choice in action.choices], n=1)
        message = f"must be one of {', '.join(map(str, action.choices))}, got {value!r}"
        raise argparse.ArgumentError(action, message + (f"; did you mean {near[0]!r}?" if near else ""))

    def given(self, args: Sequence[str] | None = None) -> dict[str, object]:
        """Only what stands on the command line, without the defaults."""
        defaults = {action.dest: action.default for action in self._actions}
        for action in self._actions:
            action.default = argparse.SUPPRESS
        try:
            return dict(vars(self.parse_args(args)))
        finally:
            for action in self._actions:
                action.default = defaults[action.dest]

    def error(self, message: str) -> NoReturn:
        leave(message.removeprefix("argument "))


def leave(message: str) -> NoReturn:
    """Prints one line on rank 0 and exits with code 2.

    torchrun ends every process as soon as one of them fails. The others wait, so that rank 0 can speak first.
    """
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr, flush=True)
    else:
        time.sleep(RANK_0_SPEAKS_WITHIN)
    sys.exit(EXIT_BAD_INPUT)


def count(least: int, most: int = 2**63 - 1) -> Callable[[str], int]:
    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        if value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, got {text}")
        return value

    return convert


def number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}") from None
    if not abs(value) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be finite, got {text}")
    return value


def positive(text: str) -> float:
    value = number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def not_negative(text: str) -> float:
    value = number(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {text}")
    return value


def plain(value: Any) -> Any:
    """An option as files hold it."""
    return str(value) if isinstance(value, Path) else value
