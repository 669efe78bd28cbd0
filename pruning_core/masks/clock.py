"""The clock of a pruning run, and the two public optimizer hooks that drive it.

A step is an *optimizer* step. A step that a GradScaler skips does not count: non-fused optimizers do not fire the
hooks for it, fused ones carry ``found_inf``, and the explicit hooks check the gradients. On an accelerator the flag
stays on the device; it is read only when a mask change may be due.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer


class Clock:
    """Counts finished optimizer steps, or follows the count that the caller gives.

    ``now`` is the number of the step that comes next. A given count that does not grow although a step has finished has
    restarted (at each epoch, as in ``enumerate(loader)``); the clock counts on from where it was.
    """

    def __init__(self) -> None:
        self._finished = 0
        self._skipped: Tensor | None = None  # number of skipped ones among them; on a device, not read yet
        self._given: int | None = None
        self._offset = 0
        self._warned = False

    @property
    def at_most(self) -> int:
        """An upper bound of ``now``, known without a host sync."""
        return self._finished

    @property
    def now(self) -> int:
        """The number of the step that comes next; may wait for the device."""
        if self._skipped is not None:
            self._finished -= int(self._skipped)
            self._skipped = None
        return self._finished

    def begin(self, step: int | None, settled: bool = False) -> None:
        """A (micro-)batch begins; ``step``, if given, is the optimizer step that it belongs to.

        ``settled``: gradients are no longer read, so a skipped step goes unnoticed; a repeated count is taken for one.
        """
        if step is None:
            return
        if isinstance(step, bool) or not hasattr(step, "__index__") or step.__index__() < 0:
            raise ValueError(f"on_step_begin: local_step must be a whole number from 0, got {step!r}")
        step = step.__index__()
        if self._given is not None:
            current = self._offset + self._given
            if step < self._given or (step == self._given and self.now > current and not settled):
                self._restart(step, current + 1)
        self._given, self._skipped = step, None
        self._finished = self._offset + step

    def _restart(self, step: int, following: int) -> None:
        self._offset = following - step
        if not self._warned:
            self._warned = True
            message = f"on_step_begin: the step went from {self._given} to {step}, as a count within an epoch does"
            warnings.warn(f"{message}; counting on from {following}. Give the count since training began", stacklevel=4)

    def finish(self, skipped: bool | Tensor) -> None:
        """An optimizer step is over; ``skipped`` may be a flag on the device."""
        if skipped is True:
            return
        if self._given is None:
            self._finished += 1
        else:
            self._finished, self._skipped = self._offset + self._given + 1, None
        if isinstance(skipped, Tensor):
            self._skipped = skipped.long() if self._skipped is None else self._skipped + skipped

    def state_dict(self) -> dict[str, int | None]:
        """The count as plain data; waits for the device."""
        return {"now": self.now, "given": self._given, "offset": self._offset}

    def load_state_dict(self, state: Mapping[str, int | None]) -> None:
        """Restores ``state_dict``."""
        self._finished, self._given, self._offset = state["now"] or 0, state["given"], state["offset"] or 0
        self._skipped = None


class Driver(Protocol):
    """What ``OptimizerHooks`` calls."""

    def before_step(self, optimizer: Optimizer) -> None:
        """Called before the optimizer changes the weights; gradients are there."""

    def after_step(self, optimizer: Optimizer) -> None:
        """Called after the optimizer has changed the weights."""


def unwrap_optimizer(optimizer: Any) -> Optimizer:
    """The torch optimizer inside a wrapper of Accelerate or Lightning: only its own hooks fire."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise ValueError(
            f"attach: needs torch optimizers, got {type(optimizer).__name__}; pass attach(model, optimizer)"
        )
    return optimizer


class OptimizerHooks:
    """Calls a driver from the public step hooks of optimizers, until ``remove``."""

    def __init__(self, driver: Driver, optimizers: list[Optimizer]) -> None:
        self._driver = driver
        self._handles = []
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._before))
            self._handles.append(optimizer.register_step_post_hook(self._after))

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._driver.before_step(optimizer)
            return None
        # The closure computes the gradients inside the step: read them when it first returns.
        wrapped = self._observing(closure, optimizer)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": wrapped}
        return (args[0], wrapped, *args[2:]), kwargs

    def _observing(self, closure: Callable[[], Any], optimizer: Optimizer) -> Callable[[], Any]:
        seen = False

        def wrapped() -> Any:
            nonlocal seen
            loss = closure()
            if not seen:
                seen = True
                self._driver.before_step(optimizer)
            return loss

        return wrapped

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._driver.after_step(optimizer)

    def remove(self) -> None:
        """Removes the hooks from all optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
