"""Errors of tracing, planning and cutting; one line each."""

from __future__ import annotations

from typing import Any


class GraphError(ValueError):
    """A model that cannot be traced or cut, or a plan that does not fit it; the message says what and where."""


class CannotRunError(GraphError):
    """The model cannot run the example."""


class CannotFollowError(GraphError):
    """The model's code does not follow a cut at this ``operation`` of its trace."""

    def __init__(self, operation: Any, message: str) -> None:
        super().__init__(message)
        self.operation = operation


class RoundedError(CannotRunError):
    """A run in float64 writes into tensors of lower precision."""


class OtherOperationsError(Exception):
    """A run is not the one that was recorded."""
