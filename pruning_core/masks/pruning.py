"""``Pruning``: builds the groups of masked weights, keeps the clock and calls the groups at the right moments."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pruning_core.masks.agreement import compare_ranks, non_finite
from pruning_core.masks.build import build_groups, who_steps
from pruning_core.masks.clock import Clock, OptimizerHooks, unwrap_optimizer
from pruning_core.masks.config import WeightPruningConfig
from pruning_core.masks.groups import MaskGroup
from pruning_core.masks.lasso import ShrinkAtStep, shrink_
from pruning_core.masks.masked_model import MaskedModel
from pruning_core.masks.options import LOCK
from pruning_core.masks.sharding import reshard
from pruning_core.masks.state import load_state, state_of
from pruning_core.selection import unwrap


class Pruning(MaskedModel):
    """Zeroes weights while training goes on: masks change on a schedule and are applied after every optimizer step.

    Either the hooks of the training loop::

        pruner = Pruning(config)
        pruner.model = model
        pruner.on_train_begin()
        ...  # per step: on_step_begin, backward, on_before_optimizer_step, optimizer.step, on_after_optimizer_step
        pruner.on_train_end()

    or one line around any loop, driven by the optimizer's own hooks::

        with Pruning(config).attach(model, optimizer):
            ...

    - ``config``: a list of dicts, a dict, a YAML path or a ``WeightPruningConfig``.
    - ``on_divergence``: what to do when the masks of data-parallel ranks differ: "error", or "repair" from rank 0.

    Weights are masked in place; biases, modules and ``state_dict`` keys of the model do not change. A step is an
    optimizer step, not a micro-batch. ``train_func`` and ``eval_func`` are called by ``pruner()``.
    """

    def __init__(self, config: Any = None, *, on_divergence: Literal["error", "repair"] = "error") -> None:
        self.config = WeightPruningConfig(config)
        if on_divergence not in ("error", "repair"):
            raise ValueError(f"on_divergence: must be 'error' or 'repair', got {on_divergence!r}")
        self.on_divergence = on_divergence
        super().__init__()
        self.optimizer: Any = None
        """For group lasso under the explicit hooks: whose learning rate it reads; None: of the one that steps."""
        self.train_func: Callable[[nn.Module], Any] | None = None
        self.eval_func: Callable[[nn.Module], Any] | None = None
        self._began = False
        self._clocks: dict[Optimizer | None, Clock] = {}
        self._params: dict[Optimizer | None, set[int] | None] = {}
        self._hooks: OptimizerHooks | None = None
        self._skipped: bool | Tensor = False
        self._pending_state: dict[str, Any] | None = None
        self._looked = False  # before_step was called in the current step
        self._shrinking: ShrinkAtStep | None = None
        self._rate_known = False  # an optimizer was seen to step
        self._told_no_gradient = False

    # ---- set-up -------------------------------------------------------------------------------------------------

    def update_items_for_all_pruners(self, **options: Any) -> None:
        """Changes options of every pruner, checked like the rest; RuntimeError once training is under way."""
        changed = any(group.updated_at >= 0 and group.options.kind != LOCK for group in self._groups)
        if self._began and (self._hooks or self.step or changed):
            raise RuntimeError("update_items_for_all_pruners: training has begun; call it before on_train_begin")
        before, self.config = self.config, self.config.updated(**options)
        try:
            if self._began:
                self._begin([], None)
        except ValueError:
            self.config = before
            raise

    def on_train_begin(self, *, total_steps: int | None = None) -> None:
        """Selects the layers and builds their masks; warns when ``total_steps`` is too short for ``end_step``."""
        self._begin([], total_steps)

    def attach(self, model: nn.Module, *optimizers: Any, total_steps: int | None = None) -> Self:
        """Prunes by the optimizers' own step hooks, until ``detach`` or the end of the ``with`` block; returns itself.

        The explicit step hooks must not be called as well. ``total_steps``: as in ``on_train_begin``.
        """
        if not optimizers:
            raise ValueError("attach: needs at least one optimizer, got none; pass attach(model, optimizer)")
        inner = [unwrap_optimizer(optimizer) for optimizer in optimizers]
        self.model = model
        self._begin(inner, total_steps)
        self.detach()
        self._hooks = OptimizerHooks(self, inner)
        self._advance()
        return self

    def _begin(self, optimizers: list[Optimizer], total_steps: int | None) -> None:
        if self._began and any(clock.now for clock in self._clocks.values()):
            raise RuntimeError("on_train_begin: training has begun already; call on_train_end, or make a new Pruning")
        if self.model is None:
            raise RuntimeError("on_train_begin: no model to prune; set pruner.model = model first")
        reshard(self.model)
        self._groups = build_groups(self.config, unwrap(self.model))
        self._set_clocks(optimizers)
        self._began = True
        if total_steps is not None:
            self._warn_if_too_short(total_steps)
        if self._pending_state is not None:
            state, self._pending_state = self._pending_state, None
            self.load_state_dict(state)

    def _set_clocks(self, optimizers: list[Optimizer]) -> None:
        """One clock per optimizer that holds pruned weights; a step is over when each of them has made it."""
        if optimizers:
            held = who_steps(self._groups, optimizers)
            self._params = {optimizer: params or set() for optimizer, params in held.items()}
            self._clocks = {optimizer: Clock() for optimizer, params in held.items() if params}
            return
        self._params, self._clocks = {None: None}, {None: Clock()}

    def _warn_if_too_short(self, total_steps: int) -> None:
        for group in self._groups:
            if group.options.kind != LOCK and group.table.end > total_steps:
                warnings.warn(
                    f"{group.where}.end_step: {group.table.end} lies after the last of {total_steps} optimizer steps; "
                    f"the target {group.options.target_sparsity} will not be reached",
                    stacklevel=4,
                )

    # ---- the hooks ----------------------------------------------------------------------------------------------

    def on_step_begin(self, local_step: int | None = None) -> None:
        """Before the forward pass. ``local_step``, if given, is the clock; otherwise finished steps are counted."""
        self._check_began("on_step_begin")
        self._clocks[None].begin(local_step, settled=all(group.done for group in self._groups))
        self._advance()

    def on_before_optimizer_step(self) -> None:
        """After backward (and ``scaler.unscale_``), before ``optimizer.step``: reads gradients, applies group lasso."""
        self._check_began("on_before_optimizer_step")
        self.before_step(None)

    def on_after_optimizer_step(self) -> None:
        """After ``optimizer.step``: updates the masks when that is due, and masks the weights."""
        self._check_began("on_after_optimizer_step")
        if not self._looked and any(group.wants_gradients(self._step_at_most) for group in self._groups):
            raise RuntimeError(
                "on_after_optimizer_step: on_before_optimizer_step was not called in this step; gradients are read "
                "there, call it after backward"
            )
        if self._shrinking is not None:
            self._shrinking.end(known=self._rate_known)
            self._shrinking, self._rate_known = None, True
        self.after_step(None)

    def on_train_end(self) -> None:
        """Ends the run; warns about every pruner that has not reached its target."""
        if not self._began:
            raise RuntimeError("on_train_end: training has not begun; call on_train_begin first")
        self._began, self._shrinking = False, None
        for group in self._groups:
            if not group.done:
                reached = group.table.sparsity(group.updated_at) if group.updated_at >= 0 else 0.0
                warnings.warn(
                    f"{group.where}: stopped at step {self.step} of end_step {group.table.end}, at sparsity "
                    f"{reached:.3f} of {group.options.target_sparsity}; steps are optimizer steps, not "
                    "batches",
                    stacklevel=2,
                )

    def on_epoch_begin(self, epoch: int | None = None) -> None:
        """Does nothing; for loops written for Neural Compressor."""

    def on_epoch_end(self) -> None:
        """Does nothing; for loops written for Neural Compressor."""

    def on_step_end(self) -> None:
        """Does nothing; for loops written for Neural Compressor."""

    def _check_began(self, hook: str) -> None:
        if not self._began:
            raise RuntimeError(f"{hook}: training has not begun; set pruner.model and call on_train_begin first")
        if self._hooks is not None:
            raise RuntimeError(f"{hook}: the pruner is attached to the optimizer already; remove this call or attach")

    # ---- what the hooks do --------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """The number of the next optimizer step; with several optimizers, of the one that is least far."""
        return min((clock.now for clock in self._clocks.values()), default=0)

    @property
    def _step_at_most(self) -> int:
        return min(clock.at_most for clock in self._clocks.values())

    @torch.no_grad()
    def before_step(self, optimizer: Optimizer | None) -> None:
        """Before an optimizer changes the weights (None: explicit hooks): reads gradients, applies group lasso."""
        assert self.model is not None
        reshard(self.model)
        now, params, self._looked = self._step_at_most, self._params[optimizer], True
        scoring = [group for group in self._groups if group.wants_gradients(now)]
        found_inf = getattr(optimizer, "found_inf", None)
        bad: bool | Tensor = False
        if found_inf is not None:
            bad = _known(found_inf.reshape(()) != 0)
        elif scoring or (optimizer is None and not all(group.done for group in self._groups)):
            bad = _known(non_finite(self._gradients(optimizer), self._groups))
        self._skipped = bad if optimizer is None or found_inf is not None else False
        if bad is True:
            return
        grad_scale = getattr(optimizer, "grad_scale", None)
        rate = 1.0 if grad_scale is None else grad_scale.reshape(()).float().reciprocal()
        seen = [group.observe(params, rate, bad if isinstance(bad, Tensor) else None) for group in scoring]
        if not all(seen):
            self._tell_no_gradient()
        self._catch_up(bad)
        shrinking = [g for g in self._groups if g.options.reg_type and g.table.start <= now <= g.table.end]
        rated = optimizer or self.optimizer
        if shrinking and rated is None:
            self._shrinking = ShrinkAtStep(shrinking, bad)
            return
        for group in shrinking:
            shrink_(group, params, unwrap_optimizer(rated), bad)

    def _gradients(self, optimizer: Optimizer | None) -> list[Tensor]:
        if optimizer is None:
            assert self.model is not None
            params = list(self.model.parameters())
        else:
            params = [p for param_group in optimizer.param_groups for p in param_group["params"]]
        return [p.grad for p in params if p.grad is not None]

    def _tell_no_gradient(self) -> None:
        if not self._told_no_gradient:
            self._told_no_gradient = True
            warnings.warn(
                "no pruned weight has a gradient; call on_before_optimizer_step after backward and before zero_grad",
                stacklevel=3,
            )

    def _catch_up(self, bad: bool | Tensor) -> None:
        """A gradient criterion whose cut was due before the first gradient cuts now."""
        late = [g for g in self._groups if g.scored and not g.changed and g.is_due(self._step_at_most)]
        if late and not bool(bad):
            self._update(late, self.step)

    @torch.no_grad()
    def after_step(self, optimizer: Optimizer | None) -> None:
        """After an optimizer changed the weights: advances the clock, updates masks that are due, masks the weights."""
        if optimizer in self._clocks:
            before = self._step_at_most
            self._clocks[optimizer].finish(self._skipped)
            if self._step_at_most > before:
                for group in self._groups:
                    group.changed = False
                self._advance()
        self._skipped = self._looked = False
        for group in self._groups:
            group.apply_(self._params[optimizer])

    @torch.no_grad()
    def _advance(self) -> None:
        """Carries out what is due now, at most once between two optimizer steps."""
        waiting = [group for group in self._groups if not group.changed and not group.done]
        if not any(group.is_due(self._step_at_most) for group in waiting):
            return
        now = self.step
        self._update([group for group in waiting if group.is_due(now) and group.ready(now)], now)

    def _update(self, groups: list[MaskGroup], now: int) -> None:
        self._check_model()
        assert self.model is not None
        reshard(self.model)
        for group in groups:
            group.update(now)
        if groups:
            compare_ranks(groups, now, repair=self.on_divergence == "repair")
        for group in groups:
            group.apply_()

    # ---- the rest -----------------------------------------------------------------------------------------------

    def __call__(self) -> nn.Module:
        """Runs ``train_func(model)`` with the pruner begun, ``eval_func(model)`` around it; returns the model."""
        if self.train_func is None:
            raise RuntimeError("train_func: not set; set pruner.train_func = f, where f(model) trains one model")
        if self.model is None:
            raise RuntimeError("model: not set; set pruner.model = model first")
        self.metrics = {}
        if self.eval_func is not None:
            self.metrics["before"] = self.eval_func(self.model)
        self.on_train_begin()
        self.train_func(self.model)
        if self._began:
            self.on_train_end()
        if self.eval_func is not None:
            self.metrics["after"] = self.eval_func(self.model)
        print(self.report())
        return self.model

    def detach(self) -> None:
        """Removes the optimizer hooks; masks stay available for ``report`` and ``mask_``."""
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None

    def __enter__(self) -> Self:
        if self._hooks is None:
            raise RuntimeError("with Pruning(...): nothing to drive it; write Pruning(...).attach(model, optimizer)")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()
        if kind is None and self._began:
            self.on_train_end()

    def state_dict(self) -> dict[str, Any]:
        """Masks (packed bits), scores, clocks and configuration: tensors and plain data."""
        self._check_built("state_dict")
        return state_of(self.config, list(self._clocks.values()), self._groups)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict`` returned and masks the weights; before training begins it is kept until then.

        ValueError for the state of another configuration, model or sharding, which changes nothing.
        """
        if not self._began:
            self._pending_state = state
            return
        assert self.model is not None
        reshard(self.model)
        load_state(state, self.config, list(self._clocks.values()), self._groups)
        for group in self._groups:
            group.apply_()


def _known(flag: Tensor) -> bool | Tensor:
    """A bool on the CPU, where reading is free; on a device the flag stays there, without a host sync."""
    return bool(flag) if flag.device.type == "cpu" else flag
