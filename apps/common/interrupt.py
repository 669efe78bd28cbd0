"""Ctrl-C and SIGTERM as a wish that the loop looks at, so that a run ends between two optimizer steps."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn, Self


def leave_with(run: Callable[[], int]) -> NoReturn:
    """Ends the process with the exit code of ``run()``; an interrupt before training is one line."""
    try:
        sys.exit(run())
    except KeyboardInterrupt:
        sys.exit("interrupted before training began; nothing was written")


class Interrupt:
    """Inside ``with Interrupt() as interrupt`` the first signal sets ``interrupt.signal``.

    A second Ctrl-C, more than a second later, stops at once. Not under torchrun: it sends its own signal on top.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = self.signal is not None and time.monotonic() - self._since > 1
        if again and number == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise KeyboardInterrupt
        if self.signal is None:
            self.signal, self._since = number, time.monotonic()

    @property
    def exit_code(self) -> int:
        """What a shell expects of a program that a signal ended."""
        return 128 + (self.signal or signal.SIGTERM)
