"""Reads options from YAML, dicts and keyword arguments, in this package's names or Neural Compressor's.

Local options win over global ones, and both over the defaults. Everything is checked when a configuration is built;
the caller's dicts are never changed.
"""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from pruning_core.masks.options import PrunerOptions
from pruning_core.masks.yaml_file import read_mapping
from pruning_core.options import shown
from pruning_core.patterns import parse_pattern
from pruning_core.registry import did_you_mean
from pruning_core.report import markdown_table

ALIASES = {
    "names": "op_names",
    "not_to_prune_names": "excluded_op_names",
    "excluded_names": "excluded_op_names",
    "exclude_names": "extra_excluded_op_names",
    "extra_excluded_names": "extra_excluded_op_names",
    "prune_layer_type": "pruning_op_types",
    "prune_domain": "pruning_scope",
    "prune_type": "pruning_type",
    "criterion_type": "pruning_type",
    "update_frequency_on_step": "pruning_frequency",
    "update_frequency": "pruning_frequency",
    "max_sparsity_ratio_per_layer": "max_sparsity_ratio_per_op",
    "min_sparsity_ratio_per_layer": "min_sparsity_ratio_per_op",
}
"""Neural Compressor's names of options (1.x and 2.x), in YAML and in dicts -> names here."""

DROPPED = {
    "low_memory_usage": "scores are stored per unit already; remove it",
    "resume_from_pruned_checkpoint": "use pruner.load_state_dict, or pruning_type: pattern_lock; remove it",
    "backend": "PyTorch is the only one; remove it",
    "initial_sparsity": "every schedule begins at 0; remove it",
    "progressive": "write pruning_type: snip_momentum_progressive instead",
    "start_epoch": "steps are counted, not epochs; write start_step",
    "end_epoch": "steps are counted, not epochs; write end_step",
}
"""Neural Compressor's options that have no counterpart, and what to do."""


WEIGHT_COMPRESSION = ("weight_compression_pytorch", "weight_compression_v2", "weight_compression")
"""Neural Compressor's names of the section that holds the options."""


class WeightPruningConfig:
    """The options of all pruners of a run, checked at construction.

    - ``pruning_configs``: a list with a dict per pruner; or one dict, a YAML path, another configuration.
    - ``options``: global options. Those of a pruner win over them, and both over the defaults.

    An unknown option, a value out of range or a contradiction is a ValueError that names the option. The dicts are not
    changed. ``pruners`` holds one ``PrunerOptions`` per pruner, where all options are listed.

    >>> config = WeightPruningConfig([{"pattern": "2:4"}, {"op_names": ["head"]}], target_sparsity=0.5, end_step=100)
    >>> [pruner.pattern for pruner in config.pruners]
    ['2:4', '4x1']
    """

    written_for_neural_compressor: ClassVar[bool] = False
    """Whether to read options as Neural Compressor does: N of N:M are pruned, and an unknown option is a warning."""

    def __init__(self, pruning_configs: Any = None, **options: Any) -> None:
        given = _read(pruning_configs)
        for each in given:
            each.layers.insert(-1, _Layer("", options))
            each.foreign |= self.written_for_neural_compressor
            each.lenient = self.written_for_neural_compressor
        self._settle(given)

    def _settle(self, given: list[_Given]) -> None:
        self.pruners = tuple(each.validated() for each in given)
        self._foreign = tuple(each.foreign for each in given)
        self._explicit: tuple[dict[str, Any], ...] = tuple(
            pruner.model_dump(include=set(each.spelled)) for pruner, each in zip(self.pruners, given, strict=True)
        )

    def updated(self, **options: Any) -> WeightPruningConfig:
        """A copy with some options changed for every pruner, checked again as a whole."""
        given = _read(self)
        for each in given:
            each.layers.append(_Layer("update_items_for_all_pruners.", options))
            each.lenient = self.written_for_neural_compressor
        changed = type(self)()
        changed._settle(given)
        return changed

    def to_dict(self) -> dict[str, Any]:
        """All options of all pruners as plain data; ``WeightPruningConfig(**d)`` reads it back."""
        return {"pruning_configs": [options.model_dump() for options in self.pruners]}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WeightPruningConfig) and self.pruners == other.pruners

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"WeightPruningConfig({list(self._explicit)!r})"


class _Layer(NamedTuple):
    """Options with their prefix in error messages; ``settled``: of a configuration that was read before."""

    where: str
    options: Mapping[str, Any]
    settled: bool = False


class _Given:
    """What the user wrote for one pruner, in layers: a later one wins over an earlier one.

    ``spelled`` says where each option was given, and under which name. ``foreign``: in Neural Compressor's spelling, so
    N of N:M are pruned, and a group lasso that does nothing is a warning. ``lenient``: so is an unknown option.
    """

    def __init__(self, *layers: _Layer, foreign: bool = False) -> None:
        self.layers, self.foreign, self.lenient = list(layers), foreign, False
        self.spelled: dict[str, str] = {}

    @property
    def where(self) -> str:
        return self.layers[-1].where

    def merged(self) -> dict[str, Any]:
        """Native option names -> values."""
        self.foreign |= any(key in ALIASES or key == "parameters" for layer in self.layers for key in layer.options)
        options: dict[str, Any] = {}
        for layer in self.layers:
            native = self._native(layer.where, layer.options)
            if "pattern" in native and not layer.settled:
                native["pattern"] = self._pattern(native["pattern"])
            options.update(native)
        return options

    def _pattern(self, value: Any) -> Any:
        """``N:M`` with N kept. Neural Compressor's N are pruned: decided by the spelling of the configuration."""
        match = re.fullmatch(r"(\w*pattern_)?(\d+):(\d+)", value) if isinstance(value, str) else None
        self.foreign |= bool(match and match[1])
        if match is None or not self.foreign:
            return value
        pruned, of = int(match[2]), int(match[3])
        if not 0 < pruned < of or 2 * pruned == of:
            return value
        warnings.warn(
            f"{self.spelled['pattern']}: read as Neural Compressor reads it, N of N:M weights are pruned, got "
            f"{shown(value)}; here N are kept, write {of - pruned}:{of} (docs/coming-from-neural-compressor.md)",
            stacklevel=2,
        )
        return f"{of - pruned}:{of}"

    def _native(self, where: str, options: Mapping[str, Any]) -> dict[str, Any]:
        native: dict[str, Any] = {}
        seen: dict[str, str] = {}
        options = dict(options)
        parameters = options.pop("parameters", {})
        if not isinstance(parameters, Mapping):
            raise ValueError(f"{where}parameters: must be a mapping, got {shown(parameters)}; write reg_coeff itself")
        items = [(f"{where}{key}", key, value) for key, value in options.items()]
        items += [(f"{where}parameters.{key}", key, value) for key, value in parameters.items()]
        for spelled, key, value in items:
            if key == "initial_sparsity" and not isinstance(value, bool) and value == 0:
                continue
            if key in DROPPED:
                raise ValueError(f"{spelled}: has no meaning here, got {shown(value)}; {DROPPED[key]}")
            name = ALIASES.get(key, key)
            if name in seen:
                raise ValueError(f"{spelled}: is the same option as {seen[name]}, got both; keep one")
            if name not in PrunerOptions.model_fields:
                if self.lenient and not difflib.get_close_matches(key, [*PrunerOptions.model_fields, *ALIASES], n=1):
                    warnings.warn(f"{spelled}: unknown option, got {shown(value)}; it is ignored", stacklevel=2)
                    continue
                hint = did_you_mean(key, PrunerOptions.model_fields)
                raise ValueError(f"{spelled}: unknown option, got {shown(value)}; {hint}")
            seen[name] = key
            self.spelled[name] = spelled
            native[name] = value
        return native

    def validated(self) -> PrunerOptions:
        options = self.merged()
        if "target_sparsity" not in options and isinstance(options.get("pattern"), str):
            try:
                highest = parse_pattern(options["pattern"]).max_sparsity
            except ValueError:
                highest = 1.0  # the validator below reports the pattern
            if highest < 1:
                options["target_sparsity"] = highest
        if self.foreign:
            self._drop_half_a_lasso(options)
        return PrunerOptions.read(options, lambda name: self.spelled.get(name, self.where + name))

    def _drop_half_a_lasso(self, options: dict[str, Any]) -> None:
        """A type without a strength, or a strength without a type, does nothing there: a warning, no error."""
        kind, strength = options.get("reg_type"), options.get("reg_coeff", 0.0)
        known = isinstance(strength, int | float) and kind in (None, "group_lasso")
        if not known or (kind is None) == (strength == 0):
            return
        name, needs = ("reg_type", "reg_coeff above 0") if strength == 0 else ("reg_coeff", "reg_type: group_lasso")
        warnings.warn(
            f"{self.spelled[name]}: does nothing, got {shown(options.pop(name))}; it needs {needs} too", stacklevel=2
        )


def _read(source: Any) -> list[_Given]:
    """Any accepted source -> one ``_Given`` per pruner."""
    if source is None:
        return [_Given(_Layer("", {}))]
    if isinstance(source, WeightPruningConfig):
        layers = [_Layer(f"pruning_configs[{i}].", each, settled=True) for i, each in enumerate(source._explicit)]
        return [_Given(each, foreign=n) for each, n in zip(layers, source._foreign, strict=True)]
    if isinstance(source, str | Path):
        return _from_mapping(read_mapping(source))
    if isinstance(source, PrunerOptions):
        return [_Given(_Layer("", source.model_dump(exclude_unset=True), settled=True))]
    if isinstance(source, Mapping):
        return _from_mapping(source)
    if isinstance(source, Sequence) and not isinstance(source, bytes | bytearray):
        return _from_list("", {}, "pruning_configs", source)
    raise ValueError(
        f"config: must be a list of dicts, a dict, a YAML path or a WeightPruningConfig, got {type(source).__name__}"
    )


def _from_mapping(source: Mapping[str, Any]) -> list[_Given]:
    if "pruning" in source:
        return _from_neural_compressor(source)
    if "pruning_configs" in source:
        top = {key: value for key, value in source.items() if key != "pruning_configs"}
        return _from_list("", top, "pruning_configs", source["pruning_configs"])
    return [_Given(_Layer("", source))]


def _from_neural_compressor(source: Mapping[str, Any]) -> list[_Given]:
    """The layout of Neural Compressor 1.x files: pruning / approach / weight_compression_pytorch / pruners."""
    section: Any = source
    _only(source, "", ("version", "model", "pruning"))
    where = ""
    for names in (("pruning",), ("approach",), WEIGHT_COMPRESSION):
        name = next((name for name in names if name in section), names[0])
        if where:
            _only(section, where, names)
        where += f"{name}."
        section = section.get(name)
        if not isinstance(section, Mapping):
            raise ValueError(
                f"{where[:-1]}: must be a mapping of options, got {shown(section)}; see docs/configuration.md"
            )
    top = {key: value for key, value in section.items() if key != "pruners"}
    given = [_Given(_Layer(where, top))]
    if "pruners" in section:
        given = _from_list(where, top, f"{where}pruners", section["pruners"])
    for each in given:
        each.foreign = True
    return given


def _only(section: Mapping[str, Any], where: str, known: Sequence[str]) -> None:
    for key in section:
        if key not in known:
            raise ValueError(f"{where}{key}: unknown section, got {shown(section[key])}; {did_you_mean(key, known)}")


def _from_list(top_where: str, top: Mapping[str, Any], where: str, pruners: Any) -> list[_Given]:
    if not isinstance(pruners, Sequence) or isinstance(pruners, str) or not pruners:
        raise ValueError(
            f"{where}: must be a list with at least one pruner, got {shown(pruners)}; write [{{}}] for defaults"
        )
    given = []
    for i, local in enumerate(pruners):
        settled = isinstance(local, PrunerOptions)
        if isinstance(local, PrunerOptions):
            local = local.model_dump(exclude_unset=True)
        if not isinstance(local, Mapping):
            raise ValueError(f"{where}[{i}]: must be a dict of options, got {shown(local)}")
        given.append(_Given(_Layer(top_where, top), _Layer(f"{where}[{i}].", local, settled)))
    return given


def reference() -> str:
    """The Markdown table of all options, as docs/configuration.md holds it."""
    spellings: dict[str, list[str]] = {}
    for alias, name in ALIASES.items():
        spellings.setdefault(name, []).append(f"`{alias}`")
    rows = []
    for name, field in PrunerOptions.model_fields.items():
        rows.append((f"`{name}`", f"`{field.default}`", field.description or "", ", ".join(spellings.get(name, []))))
    return markdown_table(("option", "default", "meaning", "also read as"), rows) + "\n"
