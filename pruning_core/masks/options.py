"""The options of one pruner: each declared once, with its type, range, default and meaning."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from pruning_core.criteria import CRITERIA, Criterion
from pruning_core.limits import Limits, LimitsOption, read_limits
from pruning_core.options import Names, Options, Patterns, Positive, Ratio, Step, shown
from pruning_core.patterns import Pattern, parse_pattern
from pruning_core.registry import did_you_mean
from pruning_core.schedules import SCHEDULES, Timetable

PROGRESSIVE = "_progressive"
LOCK = "pattern_lock"


class PrunerOptions(Options):
    """The options of one pruner: a group of layers that is ranked together."""

    target_sparsity: Annotated[Ratio, Field(description="share of zeros at `end_step`; for N:M patterns 1 - N/M")] = 0.8
    pruning_type: Annotated[
        str, Field(description="a criterion, a criterion + `_progressive`, or `pattern_lock` (today's zeros stay)")
    ] = "snip_momentum"
    pattern: Annotated[
        str, Field(description="`NxM` blocks (N output by M input channels), `1xchannel`, `channelx1`, or `N:M`")
    ] = "4x1"
    op_names: Annotated[Patterns, Field(description="regular expressions (`re.search`); empty: all layers")] = []
    excluded_op_names: Annotated[Patterns, Field(description="regular expressions of layers that stay dense")] = []
    extra_excluded_op_names: Annotated[
        Patterns, Field(description="excluded as well, on top of `excluded_op_names`")
    ] = []
    pruning_op_types: Annotated[
        Names, Field(description="`Conv` (every convolution), `Linear`, or exact class names", min_length=1)
    ] = ["Conv", "Linear"]
    start_step: Annotated[Step, Field(description="optimizer step of the first mask change")] = 0
    end_step: Annotated[Step, Field(description="step at which the target is reached; `start_step`: one-shot")] = 0
    pruning_frequency: Annotated[Positive, Field(description="steps between two mask changes")] = 1
    sparsity_decay_type: Annotated[str, Field(description="the schedule between the two steps")] = "exp"
    pruning_scope: Annotated[
        Literal["global", "local"], Field(description="rank all layers together, or each by itself")
    ] = "global"
    min_sparsity_ratio_per_op: Annotated[Ratio, Field(description="each layer reaches at least this (global)")] = 0.0
    max_sparsity_ratio_per_op: Annotated[Ratio, Field(description="no layer exceeds this")] = 0.98
    limits: Annotated[
        LimitsOption, Field(description="other limits for some layers: regular expression -> most, or [least, most]")
    ] = {}
    criterion_reduce_type: Annotated[
        Literal["mean", "sum", "max"], Field(description="how the scores of a unit become one score")
    ] = "mean"
    momentum_decay: Annotated[float, Field(gt=0, le=1, description="a in `S = a S + b |w g|` (snip_momentum)")] = 1.0
    momentum_gain: Annotated[float, Field(gt=0, allow_inf_nan=False, description="b in `S = a S + b |w g|`")] = 0.9
    progressive_steps: Annotated[Positive, Field(description="portions between two mask changes (progressive)")] = 4
    progressive_type: Annotated[
        Literal["scores", "linear"], Field(description="order inside doomed units: lowest score first, or by position")
    ] = "scores"
    reg_type: Annotated[Literal["group_lasso"] | None, Field(description="shrinks whole units while pruning")] = None
    reg_coeff: Annotated[float, Field(ge=0, allow_inf_nan=False, description="its strength")] = 0.0

    @field_validator("pattern")
    @classmethod
    def _parse(cls, value: str) -> str:
        return str(parse_pattern(value))

    @field_validator("pruning_type")
    @classmethod
    def _known_type(cls, value: str) -> str:
        if value != LOCK and value.removesuffix(PROGRESSIVE) not in CRITERIA:
            names = [name for name in CRITERIA if not CRITERIA[name].needs]
            known = [*names, *(name + PROGRESSIVE for name in names), LOCK]
            raise ValueError(f"unknown pruning type, got {shown(value)}; {did_you_mean(value, known)}")
        needs = "" if value == LOCK else CRITERIA[value.removesuffix(PROGRESSIVE)].needs
        if needs:
            raise ValueError(f"ranks channels only: it needs {needs}, got {shown(value)}; use pc.slim, or another one")
        return value

    @field_validator("limits")
    @classmethod
    def _limits_by_name(cls, value: object) -> object:
        if not isinstance(value, dict):
            raise ValueError(
                f"must be a mapping of layers, got {shown(value)}; one for all is max_sparsity_ratio_per_op"
            )
        return value

    @field_validator("sparsity_decay_type")
    @classmethod
    def _known_schedule(cls, value: str) -> str:
        SCHEDULES[value]
        return value

    @model_validator(mode="after")
    def _pairs(self) -> Self:
        wrong = self._impossible()
        if wrong:
            raise ValueError("\n".join(f"{option}: {problem}" for option, problem in wrong))
        return self

    def _impossible(self) -> list[tuple[str, str]]:
        """(option, what is wrong) for every pair of options that cannot both hold."""
        wrong = []
        if self.start_step > self.end_step:
            wrong.append(("end_step", f"must not lie before start_step {self.start_step}, got {self.end_step}"))
        if self.min_sparsity_ratio_per_op > self.max_sparsity_ratio_per_op:
            low = self.min_sparsity_ratio_per_op
            wrong.append(
                ("max_sparsity_ratio_per_op", f"below the minimum {low}, got {self.max_sparsity_ratio_per_op}")
            )
        if self.kind == LOCK:
            if self.start_step != self.end_step:
                problem = f"pattern_lock has no schedule, got {self.end_step}; set it to start_step {self.start_step}"
                wrong.append(("end_step", problem))
            return wrong
        highest = self.parsed_pattern.max_sparsity
        if self.target_sparsity > highest + 1e-9:
            problem = f"pattern {self.pattern} allows at most {highest:g}, got {self.target_sparsity}"
            wrong.append(("target_sparsity", problem + "; lower it or change the pattern"))
        if self.target_sparsity > self.max_sparsity_ratio_per_op:
            problem = f"above max_sparsity_ratio_per_op {self.max_sparsity_ratio_per_op}, got {self.target_sparsity}"
            wrong.append(("target_sparsity", problem + "; raise the maximum or lower the target"))
        elif self.target_sparsity < self.min_sparsity_ratio_per_op <= self.max_sparsity_ratio_per_op:
            problem = f"below min_sparsity_ratio_per_op {self.min_sparsity_ratio_per_op}, got {self.target_sparsity}"
            wrong.append(("target_sparsity", problem + "; lower the minimum or raise the target"))
        wrong += [
            (
                "limits",
                f"{name} must lose at least {least}, got target_sparsity {self.target_sparsity}; lower the least",
            )
            for name, (least, _) in self.layer_limits.layers
            if least > self.target_sparsity
        ]
        if self.reg_type is None and self.reg_coeff:
            wrong.append(
                ("reg_coeff", f"does nothing without reg_type, got {self.reg_coeff}; add reg_type: group_lasso")
            )
        if self.reg_type and not self.reg_coeff:
            wrong.append(("reg_type", "does nothing with reg_coeff 0, got 'group_lasso'; set reg_coeff above 0"))
        if self.reg_type and not self.parsed_pattern.folds_linearly:
            wrong.append(("reg_type", f"group_lasso needs blocks or channels, got pattern {self.pattern}; use NxM"))
        return wrong

    @property
    def kind(self) -> str:
        """One of "basic", "progressive", "pattern_lock"."""
        if self.pruning_type == LOCK:
            return LOCK
        return "progressive" if self.pruning_type.endswith(PROGRESSIVE) else "basic"

    @cached_property
    def criterion(self) -> Criterion:
        """The criterion of ``pruning_type``; for ``pattern_lock`` one that reads no gradient."""
        name = "magnitude" if self.kind == LOCK else self.pruning_type.removesuffix(PROGRESSIVE)
        return CRITERIA[name]()

    @cached_property
    def layer_limits(self) -> Limits:
        """``limits`` with the minimum and maximum per layer as defaults."""
        return read_limits(self.limits, self.min_sparsity_ratio_per_op, self.max_sparsity_ratio_per_op)

    @cached_property
    def parsed_pattern(self) -> Pattern:
        """The pattern object of ``pattern``."""
        return parse_pattern(self.pattern)

    @cached_property
    def timetable(self) -> Timetable:
        """When masks change, and to which sparsity."""
        schedule = SCHEDULES[self.sparsity_decay_type]()
        return Timetable(self.start_step, self.end_step, self.pruning_frequency, self.target_sparsity, schedule)
