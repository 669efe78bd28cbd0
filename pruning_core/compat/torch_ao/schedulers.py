"""Schedulers of ``sparsity_level``, as in ``torch.ao.pruning``; they work with its own sparsifiers too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


class BaseScheduler:
    """Sets ``sparsity_level`` of every group of a prepared sparsifier, once now and in each ``step()``.

    To override: ``get_sl()`` gives one level per group, from ``base_sl`` (those of the config) and ``last_epoch``.
    """

    def __init__(self, sparsifier: Any, last_epoch: int = -1, verbose: bool = False) -> None:
        groups = getattr(sparsifier, "groups", None)
        if not groups:
            raise TypeError(
                f"sparsifier: has no groups, got {type(sparsifier).__name__}; prepare(model, config) one first"
            )
        missing = [group["tensor_fqn"] for group in groups if "sparsity_level" not in group]
        if missing:
            raise ValueError(f"{missing[0]}: has no sparsity_level, got {sorted(groups[0])}; put one into its config")
        self.sparsifier, self.last_epoch, self.verbose = sparsifier, last_epoch, verbose
        self.base_sl = [group["sparsity_level"] for group in groups]
        self.step()

    def get_sl(self) -> list[float]:
        """One sparsity level per group, for ``last_epoch``."""
        raise NotImplementedError

    def get_last_sl(self) -> list[float]:
        """The levels that the last step set."""
        return list(self._last_sl)

    def step(self, epoch: int | None = None) -> None:
        """Advances ``last_epoch``, sets the levels, and lets the sparsifier update its masks again."""
        self.last_epoch += 1
        for i, (group, level) in enumerate(zip(self.sparsifier.groups, self.get_sl(), strict=True)):
            group["sparsity_level"] = level
            if self.verbose:
                print(f"sparsity level of group {i}: {level:.4e}")
        self._last_sl = [group["sparsity_level"] for group in self.sparsifier.groups]
        self.sparsifier.enable_mask_update = True

    def state_dict(self) -> dict[str, Any]:
        """Everything but the sparsifier and functions."""
        return {name: value for name, value in vars(self).items() if name not in ("sparsifier", "sl_lambdas")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what ``state_dict`` gave."""
        vars(self).update(state_dict)

    def _each(self, name: str, value: Any) -> list[Any]:
        """One value per group."""
        count = len(self.sparsifier.groups)
        if not isinstance(value, list | tuple):
            return [value] * count
        if len(value) != count:
            raise ValueError(f"{name}: needs one value, or {count}: one per group, got {len(value)}; give {count}")
        return list(value)


class LambdaSL(BaseScheduler):
    """``base_sl * sl_lambda(epoch)``; one function, or one per group."""

    def __init__(
        self,
        sparsifier: Any,
        sl_lambda: Callable[[int], float] | Sequence[Callable[[int], float]],
        last_epoch: int = -1,
        verbose: bool = False,
    ) -> None:
        self.sparsifier = sparsifier
        self.sl_lambdas = self._each("sl_lambda", sl_lambda)
        super().__init__(sparsifier, last_epoch, verbose)

    def get_sl(self) -> list[float]:
        return [base * at(self.last_epoch) for at, base in zip(self.sl_lambdas, self.base_sl, strict=True)]


class CubicSL(BaseScheduler):
    """``s_f + (s_0 - s_f) (1 - (t - t_0) / (n dt))^3`` (Zhu & Gupta 2017, arXiv:1710.01878).

    ``t_0 = init_t``, ``s_0 = init_sl``, ``n = total_t`` updates, ``dt = delta_t`` epochs apart.

    Before ``init_t`` the level is 0 (``initially_zero``) or ``init_sl``. Each argument is one value, or one per group.
    """

    def __init__(
        self,
        sparsifier: Any,
        init_sl: Any = 0.0,
        init_t: Any = 0,
        delta_t: Any = 10,
        total_t: Any = 100,
        initially_zero: Any = False,
        last_epoch: int = -1,
        verbose: bool = False,
    ) -> None:
        self.sparsifier = sparsifier
        given = {"init_sl": init_sl, "init_t": init_t, "delta_t": delta_t, "total_t": total_t}
        self.given = {name: self._each(name, value) for name, value in given.items()}
        self.initially_zero = self._each("initially_zero", initially_zero)
        super().__init__(sparsifier, last_epoch, verbose)

    def get_sl(self) -> list[float]:
        rows = zip(self.base_sl, *self.given.values(), self.initially_zero, strict=True)
        return [self._level(*row) for row in rows]

    def _level(self, last: float, first: float, start: int, every: int, count: int, zero: bool) -> float:
        if self.last_epoch < start:
            return 0.0 if zero else first
        left = 1 - (self.last_epoch - start) / (every * count)
        return last + (first - last) * min(max(left, 0.0), 1.0) ** 3
