"""Checked options: types, and one line for each wrong value. Used by masks, channels and apps."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from pruning_core.registry import did_you_mean


def shown(value: object) -> str:
    """``repr`` on one line, shortened."""
    text = repr(value)
    text = " ".join(text.split()) if "\n" in text else text
    return text if len(text) <= 120 else text[:100] + " ... " + text[-15:]


def _whole(value: object) -> object:
    """Integers of any library, never 2.5 and never True."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    raise ValueError(f"must be a whole number, got {shown(value)}")


def _names(value: object) -> object:
    if isinstance(value, str):
        raise ValueError(f"must be a list of names, got {shown(value)}; write [{shown(value)}]")
    if not isinstance(value, list | tuple):  # a set has no order, a generator runs dry
        raise ValueError(f"must be a list of names, got {shown(value)}")
    return list(value)


def _regular_expressions(value: list[str]) -> list[str]:
    for pattern in value:
        regular_expression(pattern)
    return value


def regular_expression(pattern: str) -> str:
    """The pattern itself; ValueError where ``re`` cannot read it."""
    try:
        re.compile(pattern)
    except re.error as error:
        hint = "escape it with re.escape"
        raise ValueError(f"not a regular expression ({error}), got {shown(pattern)}; {hint}") from None
    return pattern


Step = Annotated[int, BeforeValidator(_whole), Field(ge=0)]
Positive = Annotated[int, BeforeValidator(_whole), Field(ge=1)]
Ratio = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Names = Annotated[list[str], BeforeValidator(_names)]
Patterns = Annotated[Names, AfterValidator(_regular_expressions)]


class Options(BaseModel):
    """Strict and frozen: unknown names, other types and values out of range are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @classmethod
    def read(cls, given: Mapping[str, Any], spell: Callable[[str], str] = str) -> Self:
        """The options, or ValueError with one line for each problem. ``spell`` gives an option's name as it was given.

        ``<option>: <what is wrong>, got <value>; <what is allowed>``
        """
        for name, value in given.items():
            if name not in cls.model_fields:
                hint = did_you_mean(name, cls.model_fields)
                raise ValueError(f"{spell(name)}: unknown option, got {shown(value)}; {hint}")
        try:
            return cls(**given)
        except ValidationError as error:
            raise ValueError("\n".join(_lines(each, spell) for each in error.errors())) from None


def _lines(error: Any, spell: Callable[[str], str]) -> str:
    """pydantic's error as one line per problem."""
    message, value = error["msg"], error["input"]
    if error["type"] == "value_error":
        message = message.removeprefix("Value error, ")
        if not error["loc"]:  # pairs of options: each line begins with the option
            pairs = [line.partition(": ") for line in message.splitlines()]
            return "\n".join(f"{spell(name)}: {rest}" for name, _, rest in pairs)
    else:
        allowed = message.removeprefix("Input ").replace("should be", "must be")
        if error["type"] == "too_short":
            allowed = "must have at least one entry"
        message = f"{'out of range' if 'than' in allowed else 'wrong value'}, got {shown(value)}; it {allowed}"
    name, *inner = error["loc"]
    suffix = "".join(f"[{i}]" for i in inner if isinstance(i, int))
    return f"{spell(name)}{suffix}: {message}"
