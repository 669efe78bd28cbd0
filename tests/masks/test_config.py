"""Every option, every way to give it, and every error."""

import copy
import itertools
import json
import pickle
import re
import subprocess
import sys
import warnings
from collections import OrderedDict
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pruning_core import Pruning, WeightPruningConfig
from pruning_core.criteria import CRITERIA as EVERY
from pruning_core.masks.config import ALIASES, DROPPED, reference
from pruning_core.masks.options import PrunerOptions
from pruning_core.schedules import SCHEDULES
from tests.support import ROOT

CRITERIA = [name for name in EVERY if not EVERY[name].needs]
PAGE = ROOT / "docs" / "configuration.md"

DEFAULTS = {
    "target_sparsity": 0.8,
    "pruning_type": "snip_momentum",
    "pattern": "4x1",
    "op_names": [],
    "excluded_op_names": [],
    "extra_excluded_op_names": [],
    "pruning_op_types": ["Conv", "Linear"],
    "start_step": 0,
    "end_step": 0,
    "pruning_frequency": 1,
    "sparsity_decay_type": "exp",
    "pruning_scope": "global",
    "min_sparsity_ratio_per_op": 0.0,
    "max_sparsity_ratio_per_op": 0.98,
    "limits": {},
    "criterion_reduce_type": "mean",
    "momentum_decay": 1.0,
    "momentum_gain": 0.9,
    "progressive_steps": 4,
    "progressive_type": "scores",
    "reg_type": None,
    "reg_coeff": 0.0,
}

SEED_001 = [
    {
        "target_sparsity": 0.9,
        "pruning_type": "snip_momentum",
        "pattern": "4x1",
        "op_names": ["layer1.*"],
        "excluded_op_names": ["layer3.*"],
        "start_step": 0,
        "end_step": 10,
        "pruning_scope": "global",
        "pruning_frequency": 1,
        "min_sparsity_ratio_per_op": 0.0,
        "max_sparsity_ratio_per_op": 0.98,
        "sparsity_decay_type": "exp",
        "pruning_op_types": ["Conv", "Linear"],
    },
    {"op_names": ["layer3.*"], "pruning_type": "snip_momentum_progressive"},
]


def only(*arguments, **options) -> PrunerOptions:
    (pruner,) = WeightPruningConfig(*arguments, **options).pruners
    return pruner


def message(*arguments, **options) -> str:
    with pytest.raises(ValueError) as caught:
        WeightPruningConfig(*arguments, **options)
    assert type(caught.value) is ValueError  # pydantic's pages do not get through
    return str(caught.value)


# ---- what is given ------------------------------------------------------------------------------------------------


def test_defaults():
    assert only().model_dump() == DEFAULTS


@pytest.mark.parametrize("empty", [None, {}, [{}], ({},), {"pruning_configs": [{}]}, WeightPruningConfig(), DEFAULTS])
def test_every_way_to_say_nothing(empty):
    assert only(empty).model_dump() == DEFAULTS


def test_the_configuration_of_seed_001():
    first, second = WeightPruningConfig(SEED_001).pruners
    assert first.model_dump() == {**DEFAULTS, **SEED_001[0]}
    assert second.model_dump() == {**DEFAULTS, **SEED_001[1]}
    assert second.target_sparsity == 0.8


def test_every_source_gives_the_same_object(tmp_path):
    expected = WeightPruningConfig([{"target_sparsity": 0.5, "pattern": "1x1"}])
    path = tmp_path / "c.yaml"
    path.write_text("target_sparsity: 0.5\npattern: 1x1\n")
    sources = [
        [{"target_sparsity": 0.5, "pattern": "1x1"}],
        ({"target_sparsity": 0.5, "pattern": "1x1"},),
        {"target_sparsity": 0.5, "pattern": "1x1"},
        OrderedDict(target_sparsity=0.5, pattern="1x1"),
        MappingProxyType({"target_sparsity": 0.5, "pattern": "1x1"}),
        {"pruning_configs": [{"target_sparsity": 0.5}], "pattern": "1x1"},
        str(path),
        path,
        expected,
        expected.pruners[0],
        list(expected.pruners),
        expected.to_dict(),
    ]
    for source in sources:
        assert WeightPruningConfig(source) == expected
        assert Pruning(source).config == expected
    assert WeightPruningConfig(target_sparsity=0.5, pattern="1x1") == expected
    assert WeightPruningConfig([{"target_sparsity": 0.5}], pattern="1x1") == expected
    assert WeightPruningConfig(pruning_configs=[{}], target_sparsity=0.5, pattern="1x1") == expected
    assert WeightPruningConfig(path, pruning_scope="global") == expected
    assert expected != WeightPruningConfig() and expected != "text"


def test_pruning_without_a_configuration_has_the_defaults():
    assert Pruning().config == WeightPruningConfig()


@pytest.mark.parametrize("source", [3, 1.5, b"c.yaml", {"a"}, object()])
def test_no_configuration_at_all(source):
    assert message(source) == (
        "config: must be a list of dicts, a dict, a YAML path or a WeightPruningConfig, got " + type(source).__name__
    )


@pytest.mark.parametrize(
    "source, expected",
    [
        ([], "pruning_configs: must be a list with at least one pruner, got []; write [{}] for defaults"),
        ({"pruning_configs": []}, "pruning_configs: must be a list with at least one pruner, got []"),
        ({"pruning_configs": None}, "pruning_configs: must be a list with at least one pruner, got None"),
        ({"pruning_configs": {"pattern": "1x1"}}, "pruning_configs: must be a list with at least one pruner, got {"),
        ({"pruning_configs": "abc"}, "pruning_configs: must be a list with at least one pruner, got 'abc'"),
        ([{}, "abc"], "pruning_configs[1]: must be a dict of options, got 'abc'"),
        ([{}, None], "pruning_configs[1]: must be a dict of options, got None"),
        ([[{}]], "pruning_configs[0]: must be a dict of options, got [{}]"),
        ([{"pruning_configs": []}], "pruning_configs[0].pruning_configs: unknown option, got []; did you mean"),
        ({"pruning": 5}, "pruning: must be a mapping of options, got 5; see docs/configuration.md"),
        ({"pruning": {}}, "pruning.approach: must be a mapping of options, got None"),
        ({"pruning": {"approach": []}}, "pruning.approach: must be a mapping of options, got []"),
        ({"pruning": {"aproach": {}}}, "pruning.aproach: unknown section, got {}; did you mean 'approach'?"),
        ({"pruning": {}, "prunning": {}}, "prunning: unknown section, got {}; did you mean 'pruning'?"),
        (
            {"pruning": {"approach": {"weight_compression_pytorch": {"pruners": []}}}},
            "pruning.approach.weight_compression_pytorch.pruners: must be a list with at least one pruner, got []",
        ),
        (
            {"pruning": {"approach": {"weight_compression_pytorch": {"pruners": [{"patern": "1x1"}]}}}},
            "pruning.approach.weight_compression_pytorch.pruners[0].patern: unknown option, got '1x1'; did you mean",
        ),
        (
            {"pruning": {"approach": {"weight_compression_pytorch": {"start_stop": 1}}}},
            "pruning.approach.weight_compression_pytorch.start_stop: unknown option, got 1; did you mean 'start_step'?",
        ),
    ],
)
def test_malformed_layout(source, expected):
    assert message(source).startswith(expected)


# ---- names --------------------------------------------------------------------------------------------------------


def test_unknown_option_in_a_pruner():
    expected = "pruning_configs[1].target_sparsty: unknown option, got 0.5; did you mean 'target_sparsity'?"
    assert message([{}, {"target_sparsty": 0.5}]) == expected


@pytest.mark.parametrize(
    "arguments, options, expected",
    [
        ([], {"target_sparsty": 0.5}, "target_sparsty: unknown option, got 0.5; did you mean 'target_sparsity'?"),
        ([{"patern": "1x1"}], {}, "patern: unknown option, got '1x1'; did you mean 'pattern'?"),
        ([[{}]], {"end_stp": 5}, "end_stp: unknown option, got 5; did you mean 'end_step'?"),
        ([{"pruning_configs": [{}], "strat_step": 5}], {}, "strat_step: unknown option, got 5; did you mean 'start_"),
        ([{1: 2}], {}, "1: unknown option, got 2; known: target_sparsity, pruning_type, pattern, op_names, "),
        ([{None: 2}], {}, "None: unknown option, got 2; known: "),
        ([{"zzz": 2}], {}, "zzz: unknown option, got 2; known: "),
        ([{"parameters": {"reg_coef": 1}}], {}, "parameters.reg_coef: unknown option, got 1; did you mean 'reg_coeff'"),
    ],
)
def test_unknown_option_anywhere(arguments, options, expected):
    assert message(*arguments, **options).startswith(expected)


VALUES = {
    "op_names": ["a"],
    "excluded_op_names": ["a"],
    "extra_excluded_op_names": ["a"],
    "pruning_op_types": ["Conv2d"],
    "pruning_scope": "local",
    "pruning_type": "magnitude",
    "pruning_frequency": 7,
    "max_sparsity_ratio_per_op": 0.9,
    "min_sparsity_ratio_per_op": 0.1,
}

BOTH_GENERATIONS = {
    "not_to_prune_names": "excluded_op_names",
    "exclude_names": "extra_excluded_op_names",
    "prune_layer_type": "pruning_op_types",
    "prune_domain": "pruning_scope",
    "prune_type": "pruning_type",
    "update_frequency_on_step": "pruning_frequency",
    "update_frequency": "pruning_frequency",
    "max_sparsity_ratio_per_layer": "max_sparsity_ratio_per_op",
    "min_sparsity_ratio_per_layer": "min_sparsity_ratio_per_op",
    "names": "op_names",
    "excluded_names": "excluded_op_names",
    "extra_excluded_names": "extra_excluded_op_names",
    "criterion_type": "pruning_type",
}


def test_the_alias_table_is_the_one_tested_here():
    assert ALIASES == BOTH_GENERATIONS
    assert not ALIASES.keys() & PrunerOptions.model_fields.keys()


@pytest.mark.parametrize("alias, name", BOTH_GENERATIONS.items())
def test_alias(alias, name):
    expected = {**DEFAULTS, name: VALUES[name]}
    assert expected != DEFAULTS
    assert only({alias: VALUES[name]}).model_dump() == expected
    assert only([{}], **{alias: VALUES[name]}).model_dump() == expected
    assert only().model_dump() == DEFAULTS


@pytest.mark.parametrize("alias, name", BOTH_GENERATIONS.items())
def test_both_spellings(alias, name):
    expected = f"pruning_configs[0].{alias}: is the same option as {name}, got both; keep one"
    assert message([{name: VALUES[name], alias: VALUES[name]}]) == expected


def test_two_aliases_of_one_option():
    expected = "excluded_names: is the same option as not_to_prune_names, got both; keep one"
    assert message({"not_to_prune_names": [], "excluded_names": []}) == expected


def test_an_error_speaks_of_the_spelling_that_was_used():
    assert message([{"update_frequency_on_step": 0}]).startswith("pruning_configs[0].update_frequency_on_step: out of")
    assert message([{}], prune_domain="galaxy").startswith("prune_domain: wrong value, got 'galaxy'; it must be 'gl")
    assert message([{"max_sparsity_ratio_per_layer": 0.5}]).startswith("pruning_configs[0].target_sparsity: above max")


@pytest.mark.parametrize(
    "option",
    [
        *("low_memory_usage", "resume_from_pruned_checkpoint", "backend", "progressive", "initial_sparsity"),
        *("start_epoch", "end_epoch"),
    ],
)
def test_dropped_option(option):
    expected = f"pruning_configs[0].{option}: has no meaning here, got True; {DROPPED[option]}"
    assert message([{option: True}]) == expected
    assert message(**{option: True}) == expected.removeprefix("pruning_configs[0].")


def test_every_dropped_option_is_tested():
    dropped = next(m for m in test_dropped_option.pytestmark if m.name == "parametrize").args[1]
    assert set(dropped) == set(DROPPED)


def test_parameters_hold_the_strength_of_group_lasso():
    given = {"reg_type": "group_lasso", "parameters": {"reg_coeff": 0.1}}
    assert only(given).model_dump() == {**DEFAULTS, "reg_type": "group_lasso", "reg_coeff": 0.1}
    assert only([given]) == only(reg_type="group_lasso", reg_coeff=0.1)
    assert only({"parameters": {"reg_coeff": 0.0}}).model_dump() == DEFAULTS
    assert message({**given, "reg_coeff": 0.2}).startswith("parameters.reg_coeff: is the same option as reg_coeff")
    assert message({"parameters": 0.1}) == "parameters: must be a mapping, got 0.1; write reg_coeff itself"
    assert message([{"parameters": None}]).startswith("pruning_configs[0].parameters: must be a mapping, got None")
    wrong = message({"reg_type": "group_lasso", "parameters": {"reg_coeff": -1}})
    assert wrong == "parameters.reg_coeff: out of range, got -1; it must be greater than or equal to 0"


# ---- values -------------------------------------------------------------------------------------------------------

RATIOS = ["target_sparsity", "min_sparsity_ratio_per_op", "max_sparsity_ratio_per_op"]
STEPS = ["start_step", "end_step"]
COUNTS = ["pruning_frequency", "progressive_steps"]
NAMES = ["op_names", "excluded_op_names", "extra_excluded_op_names", "pruning_op_types"]
WORDS = ["pruning_type", "pattern", "sparsity_decay_type", "pruning_scope", "criterion_reduce_type", "progressive_type"]
REALS = ["momentum_decay", "momentum_gain", "reg_coeff"]
NOT_A_NUMBER = ["0.8", True, None, [0.8], 1j, torch.ones(2, 2)]


def test_every_option_is_in_one_of_the_tables():
    assert {*RATIOS, *STEPS, *COUNTS, *NAMES, *WORDS, *REALS, "reg_type", "limits"} == PrunerOptions.model_fields.keys()


@pytest.mark.parametrize("option", RATIOS + REALS)
@pytest.mark.parametrize("value", NOT_A_NUMBER, ids=repr)
def test_not_a_number(option, value):
    assert message([{option: value}]).startswith(f"pruning_configs[0].{option}: wrong value, got ")


@pytest.mark.parametrize("option", RATIOS + REALS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -0.1], ids=repr)
def test_a_number_that_no_option_takes(option, value):
    assert re.match(rf"{option}: (wrong value|out of range), got {value}; it must be ", message(**{option: value}))


@pytest.mark.parametrize("option", RATIOS)
@pytest.mark.parametrize("value", [1, 1.0, 80])
def test_a_ratio_is_below_one(option, value):
    assert message(**{option: value}) == f"{option}: out of range, got {value}; it must be less than 1"


def test_ranges_of_the_momentum():
    assert "momentum_decay: out of range, got 1.1; it must be less than or equal to 1" in message(momentum_decay=1.1)
    assert "momentum_decay: out of range, got 0; it must be greater than 0" in message(momentum_decay=0)
    assert "momentum_gain: out of range, got 0; it must be greater than 0" in message(momentum_gain=0)
    assert only(momentum_decay=0.9, momentum_gain=2.5).model_dump(include={"momentum_decay", "momentum_gain"}) == {
        "momentum_decay": 0.9,
        "momentum_gain": 2.5,
    }


@pytest.mark.parametrize("option", STEPS + COUNTS)
@pytest.mark.parametrize("value", [2.5, 2.0, "2", True, None, [2], float("nan"), np.float64(2), np.array([[2]])])
def test_not_a_whole_number(option, value):
    assert message([{option: value}]).startswith(f"pruning_configs[0].{option}: must be a whole number, got ")


@pytest.mark.parametrize("option, least", [*((option, 0) for option in STEPS), *((option, 1) for option in COUNTS)])
def test_a_count_is_not_too_small(option, least):
    expected = f"{option}: out of range, got {least - 1}; it must be greater than or equal to {least}"
    assert message(**{option: least - 1}) == expected
    assert getattr(only(**{option: least, "end_step" if option != "end_step" else "start_step": 0}), option) == least


@pytest.mark.parametrize("kind", [int, np.int8, np.int32, np.int64, np.uint8, np.uint64])
def test_whole_numbers_of_any_library(kind):
    options = only(start_step=kind(2), end_step=kind(9), pruning_frequency=kind(3), progressive_steps=kind(5))
    for option, value in {"start_step": 2, "end_step": 9, "pruning_frequency": 3, "progressive_steps": 5}.items():
        assert getattr(options, option) == value
        assert type(getattr(options, option)) is int


@pytest.mark.parametrize("value", [0.5, np.float16(0.5), np.float32(0.5), np.float64(0.5), Fraction(1, 2)])
def test_numbers_of_any_library(value):
    options = only(target_sparsity=value, momentum_gain=value)
    assert (options.target_sparsity, options.momentum_gain) == (0.5, 0.5)
    assert type(options.target_sparsity) is float


def test_zero_is_a_target():
    assert only(target_sparsity=0).target_sparsity == 0


@pytest.mark.parametrize("option", NAMES)
@pytest.mark.parametrize(
    "value", ["layer1", None, 5, {"a": 1}, {"a"}, iter(["a"]), b"a"], ids=lambda v: type(v).__name__
)
def test_not_a_list_of_names(option, value):
    assert message([{option: value}]).startswith(f"pruning_configs[0].{option}: must be a list of names, got ")


@pytest.mark.parametrize("option", NAMES)
def test_a_text_for_a_list_is_answered_with_the_list(option):
    assert message(**{option: "fc"}) == f"{option}: must be a list of names, got 'fc'; write ['fc']"


@pytest.mark.parametrize("option", NAMES)
@pytest.mark.parametrize("value", [1, None, ["a"], True, b"a"])
def test_not_a_name(option, value):
    text = message([{option: ["a", value]}])
    assert text == f"pruning_configs[0].{option}[1]: wrong value, got {value!r}; it must be a valid string"


@pytest.mark.parametrize("option", NAMES[:3])
@pytest.mark.parametrize("wrong", ["(", "*.attention", "layer[1"])
def test_not_a_regular_expression(option, wrong):
    text = message(**{option: ["fine", wrong]})
    assert text.startswith(f"{option}: not a regular expression (")
    assert text.endswith(f"), got {wrong!r}; escape it with re.escape")


def test_a_tuple_of_names_is_a_list():
    assert only(op_names=("a", "b")).op_names == ["a", "b"]


def test_at_least_one_layer_type():
    assert message(pruning_op_types=[]) == "pruning_op_types: wrong value, got []; it must have at least one entry"


@pytest.mark.parametrize("option", [*WORDS, "reg_type"])
@pytest.mark.parametrize("value", [5, True, ["exp"], b"exp", 2.4], ids=repr)
def test_not_a_word(option, value):
    assert message([{option: value}]).startswith(f"pruning_configs[0].{option}: wrong value, got {value!r}; it must be")


@pytest.mark.parametrize("option", WORDS)
def test_none_is_not_a_word(option):
    assert message(**{option: None}).startswith(f"{option}: wrong value, got None; it must be")


@pytest.mark.parametrize(
    "option, value, expected",
    [
        ("pruning_type", "snip_momentm", "unknown pruning type, got 'snip_momentm'; did you mean 'snip_momentum'?"),
        ("pruning_type", "magnitude_progresive", "unknown pruning type, got 'magnitude_progresive'; did you mean 'mag"),
        ("pruning_type", "_progressive", "unknown pruning type, got '_progressive'; "),
        ("pruning_type", "pattern_lock_progressive", "unknown pruning type, got 'pattern_lock_progressive'; "),
        ("pruning_type", "retrain_free", "unknown pruning type, got 'retrain_free'; "),
        ("sparsity_decay_type", "expo", "unknown schedule, got 'expo'; did you mean 'exp'?"),
        ("sparsity_decay_type", "", "unknown schedule, got ''; known: linear, cos, exp, cube, cubic"),
        ("pruning_scope", "Global", "wrong value, got 'Global'; it must be 'global' or 'local'"),
        ("criterion_reduce_type", "median", "wrong value, got 'median'; it must be 'mean', 'sum' or 'max'"),
        ("progressive_type", "score", "wrong value, got 'score'; it must be 'scores' or 'linear'"),
        ("reg_type", "lasso", "wrong value, got 'lasso'; it must be 'group_lasso'"),
        ("pattern", "4y1", "unknown pattern, got '4y1'; use NxM blocks such as '4x1', '1x1' for single weights, "),
        ("pattern", "axb", "unknown pattern, got 'axb'; "),
        ("pattern", "", "unknown pattern, got ''; "),
        ("pattern", "4x1\n", "unknown pattern, got '4x1\\n'; "),
        ("pattern", "channelxchannel", "unknown pattern, got 'channelxchannel'; "),
        ("pattern", "0x1", "a block needs at least one row and one column, got '0x1'; use for example '4x1'"),
        ("pattern", "4:2", "N:M keeps N of M weights and needs 0 < N < M, got '4:2'; use for example '2:4'"),
        ("pattern", "0:4", "N:M keeps N of M weights and needs 0 < N < M, got '0:4'"),
        ("pattern", "4:4", "N:M keeps N of M weights and needs 0 < N < M, got '4:4'"),
    ],
)
def test_unknown_word(option, value, expected):
    assert message([{option: value}]).startswith(f"pruning_configs[0].{option}: {expected}")
    assert message(**{option: value}).startswith(f"{option}: {expected}")


@pytest.mark.parametrize(
    "text, pattern",
    [
        ("oc_pattern_4x1", "4x1"),
        ("tile_pattern_4x1", "4x1"),
        ("oc_pattern_1x1", "1x1"),
        ("tile_pattern_2:4", "2:4"),
        ("ic_pattern_1x16", "1x16"),
        ("1xchannel", "1xchannel"),
        ("tile_pattern_channelx1", "channelx1"),
    ],
)
def test_pattern_spellings(text, pattern):
    assert only(pattern=text).pattern == pattern


@pytest.mark.parametrize("name", [*CRITERIA, *(f"{name}_progressive" for name in CRITERIA), "pattern_lock"])
def test_every_pruning_type(name):
    options = only(pruning_type=name)
    assert options.pruning_type == name
    assert options.kind == ("pattern_lock" if name == "pattern_lock" else "progressive" if "_pro" in name else "basic")


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_every_schedule(name):
    assert type(only(sparsity_decay_type=name, end_step=5).timetable.schedule) is SCHEDULES[name]


# ---- pairs --------------------------------------------------------------------------------------------------------

PAIRS = [
    ({"start_step": 10, "end_step": 9}, "end_step: must not lie before start_step 10, got 9"),
    ({"start_step": 10}, "end_step: must not lie before start_step 10, got 0"),
    (
        {"min_sparsity_ratio_per_op": 0.6, "max_sparsity_ratio_per_op": 0.5, "target_sparsity": 0.5},
        "max_sparsity_ratio_per_op: below the minimum 0.6, got 0.5",
    ),
    (
        {"pruning_type": "pattern_lock", "start_step": 3, "end_step": 5},
        "end_step: pattern_lock has no schedule, got 5; set it to start_step 3",
    ),
    (
        {"pattern": "2:4", "target_sparsity": 0.8},
        "target_sparsity: pattern 2:4 allows at most 0.5, got 0.8; lower it or change the pattern",
    ),
    (
        {"pattern": "3:4", "target_sparsity": 0.3},
        "target_sparsity: pattern 3:4 allows at most 0.25, got 0.3; lower it or change the pattern",
    ),
    (
        {"target_sparsity": 0.99},
        "target_sparsity: above max_sparsity_ratio_per_op 0.98, got 0.99; raise the maximum or lower the target",
    ),
    (
        {"max_sparsity_ratio_per_op": 0.5},
        "target_sparsity: above max_sparsity_ratio_per_op 0.5, got 0.8; raise the maximum or lower the target",
    ),
    (
        {"min_sparsity_ratio_per_op": 0.9},
        "target_sparsity: below min_sparsity_ratio_per_op 0.9, got 0.8; lower the minimum or raise the target",
    ),
    ({"reg_coeff": 0.1}, "reg_coeff: does nothing without reg_type, got 0.1; add reg_type: group_lasso"),
    (
        {"reg_type": "group_lasso"},
        "reg_type: does nothing with reg_coeff 0, got 'group_lasso'; set reg_coeff above 0",
    ),
    (
        {"reg_type": "group_lasso", "reg_coeff": 0.1, "pattern": "2:4"},
        "reg_type: group_lasso needs blocks or channels, got pattern 2:4; use NxM",
    ),
]


@pytest.mark.parametrize("options, expected", PAIRS)
def test_impossible_pair(options, expected):
    where = f"pruning_configs[1].{expected}"
    assert message([{}, options]) == where
    given = expected.partition(":")[0] in options
    assert message([{}], **options) == (expected if given else f"pruning_configs[0].{expected}")


def test_possible_neighbours_of_the_impossible_pairs():
    only(start_step=10, end_step=10)
    only(target_sparsity=0.98)
    only(min_sparsity_ratio_per_op=0.8, max_sparsity_ratio_per_op=0.8)
    only(pattern="2:4", target_sparsity=0.5)
    only(pattern="2:4", target_sparsity=0.2)
    only(pruning_type="snip_momentum_progressive", momentum_gain=0.5)
    only(pruning_type="pattern_lock", start_step=3, end_step=3)
    only(pruning_type="pattern_lock", pattern="2:4", target_sparsity=0.9)


def test_a_global_option_may_concern_some_pruners_only():
    config = WeightPruningConfig([{}, {"pruning_type": "magnitude"}], momentum_gain=0.5, progressive_steps=2)
    assert [each.momentum_gain for each in config.pruners] == [0.5, 0.5]


def test_one_line_per_problem():
    lines = message([{"target_sparsity": 2, "pruning_frequency": 0, "pattern": "q", "op_names": "x"}]).splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "pruning_configs[0].target_sparsity",
        "pruning_configs[0].pattern",
        "pruning_configs[0].op_names",
        "pruning_configs[0].pruning_frequency",
    ]
    lines = message([{"start_step": 4, "target_sparsity": 0.99, "reg_coeff": 1.0}]).splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "pruning_configs[0].end_step",
        "pruning_configs[0].target_sparsity",
        "pruning_configs[0].reg_coeff",
    ]


@pytest.mark.parametrize("value", [torch.ones(9, 9), np.ones((40, 40)), "x" * 10_000, ["layer"] * 10_000, {"a": "\n"}])
@pytest.mark.parametrize("option", ["target_sparsity", "pruning_frequency", "pruning_type", "op_name", "backend"])
def test_a_message_is_one_line_of_bearable_length(option, value):
    text = message({option: value})
    assert "\n" not in text
    assert len(text) < 500


def test_errors_survive_python_without_asserts():
    script = """
import sys
assert False, "asserts are on"
from pruning_core import WeightPruningConfig
for wrong in [{"a": 1}, {"target_sparsity": 2}, {"start_step": 1}, {"pattern": "2:4", "target_sparsity": 0.8},
              {"op_names": "a"}, {"sparsity_decay_type": "x"}, {"pruning_type": "x"}, {"pattern": "4:2"}]:
    try:
        WeightPruningConfig([wrong])
    except ValueError:
        continue
    sys.exit(f"accepted: {wrong}")
print("all refused")
"""
    root = ROOT
    command = [sys.executable, "-O", "-c", script]
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "all refused\n", "")


# ---- precedence ---------------------------------------------------------------------------------------------------


def test_local_wins_over_global_and_both_over_defaults():
    first, second = WeightPruningConfig([{"target_sparsity": 0.5}, {}], target_sparsity=0.9, pattern="1x1").pruners
    assert (first.target_sparsity, first.pattern, first.pruning_scope) == (0.5, "1x1", "global")
    assert (second.target_sparsity, second.pattern, second.pruning_scope) == (0.9, "1x1", "global")


@pytest.mark.parametrize("alias, name", BOTH_GENERATIONS.items())
def test_local_wins_whatever_the_spelling(alias, name):
    default = DEFAULTS[name]
    assert getattr(only([{alias: VALUES[name]}], **{name: default}), name) == VALUES[name]
    assert getattr(only([{name: VALUES[name]}], **{alias: default}), name) == VALUES[name]


def test_keywords_win_over_the_global_section_and_lose_to_a_pruner():
    source = {"pruning_configs": [{}, {"prune_type": "snip"}], "prune_type": "gradient"}
    first, second = WeightPruningConfig(source, pruning_type="magnitude").pruners
    assert (first.pruning_type, second.pruning_type) == ("magnitude", "snip")
    wrong = message({"pruning": {"approach": {"weight_compression_pytorch": {}}}}, pruning_type="x")
    assert wrong.startswith("pruning_type: unknown pruning type")


def test_a_local_default_wins_over_a_global_value():
    assert only([{"pattern": "4x1", "reg_type": None}], pattern="1x1").pattern == "4x1"


def test_a_wrong_global_value_is_no_error_where_every_pruner_overrides_it():
    assert only([{"target_sparsity": 0.5}], target_sparsity=7).target_sparsity == 0.5
    assert message([{"target_sparsity": 0.5}, {}], target_sparsity=7).startswith("target_sparsity: out of range, got 7")


def test_exclusions_add_up():
    """The global ``not_to_prune_names`` holds beside the local ``exclude_names`` (the sample file gives both)."""
    model = nn.Sequential(OrderedDict((name, nn.Linear(4, 4)) for name in ("one", "two", "three")))
    pruner = Pruning({"pruning_configs": [{"exclude_names": ["two"]}], "not_to_prune_names": ["one"]})
    pruner.model = model
    pruner.on_train_begin()
    assert list(pruner.masks()) == ["three.weight"]


# ---- defaults that depend -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern, target", [("2:4", 0.5), ("1:4", 0.75), ("3:4", 0.25), ("2:6", 1 - 2 / 6), ("4x1", 0.8)]
)
def test_an_n_in_m_pattern_has_its_own_target(pattern, target):
    assert only(pattern=pattern).target_sparsity == target
    assert only([{"pattern": pattern}], target_sparsity=0.1).target_sparsity == 0.1
    assert only([{}], pattern=pattern).target_sparsity == target


READ_THE_OTHER_WAY = r"read as Neural Compressor reads it, N of N:M weights are pruned, got '\w*1:4'; .* write 3:4"


@pytest.mark.parametrize(
    "spelling",
    [
        {"pattern": "tile_pattern_1:4"},
        {"pattern": "1:4", "prune_type": "magnitude"},
        {"pruning_configs": [{"pattern": "1:4"}], "prune_domain": "local"},
        {"pruning": {"approach": {"weight_compression_pytorch": {"pruners": [{"pattern": "1:4"}]}}}},
        {"pruning": {"approach": {"weight_compression_v2": {"pattern": "oc_pattern_1:4"}}}},
    ],
    ids=["prefix", "option", "global option", "file", "file, global"],
)
def test_n_of_n_in_m_are_pruned_in_neural_compressors_spelling(spelling):
    with pytest.warns(UserWarning, match=READ_THE_OTHER_WAY):
        config = WeightPruningConfig(spelling)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        again = WeightPruningConfig(config).updated(end_step=5)
        assert only(WeightPruningConfig(**again.to_dict())).pattern == "3:4"
    assert only(again).pattern == only(config).pattern == "3:4"
    assert only(config).target_sparsity == 0.25
    with pytest.warns(UserWarning, match=r"update_items_for_all_pruners\.pattern: .* write 3:8"):
        assert only(config.updated(pattern="5:8")).pattern == "3:8"


def test_n_of_n_in_m_are_kept_in_this_packages_spelling():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert only(pattern="1:4").target_sparsity == 0.75
        assert only({"prune_type": "magnitude", "pattern": "tile_pattern_2:4"}).pattern == "2:4"
        assert only({"prune_type": "magnitude", "pattern": "tile_pattern_4x1"}).pattern == "4x1"


@pytest.mark.parametrize("pattern", ["0:4", "4:4", "5:4"])
def test_n_in_m_that_prunes_nothing_or_all(pattern):
    with pytest.raises(ValueError, match="N:M keeps N of M weights and needs 0 < N < M"):
        WeightPruningConfig({"prune_type": "magnitude", "pattern": pattern})


def test_the_target_follows_the_pattern_until_it_is_given():
    config = WeightPruningConfig([{"pattern": "2:4"}])
    assert config.updated(pattern="1:4").pruners[0].target_sparsity == 0.75
    assert config.updated(pattern="1x1").pruners[0].target_sparsity == 0.8
    with pytest.raises(ValueError, match=r"^update_items_for_all_pruners.target_sparsity: pattern 2:4 allows at most"):
        config.updated(target_sparsity=0.6)


# ---- nothing is shared, nothing is changed ------------------------------------------------------------------------


def test_the_callers_objects_are_never_changed():
    local = {"exclude_names": ["a"], "parameters": {"reg_coeff": 0.1}, "reg_type": "group_lasso"}
    top = {"pruning_configs": [local, {}], "names": ["b"], "pattern": "oc_pattern_4x1"}
    tree = {"version": 1.0, "pruning": {"approach": {"weight_compression_pytorch": {"pruners": [local], "names": []}}}}
    for source in (
        local,
        [local, {}],
        top,
        tree,
        [{"target_sparsty": 1}],
        [{"pattern": "2:4", "target_sparsity": 0.9}],
    ):
        before = copy.deepcopy(source)
        try:
            config = WeightPruningConfig(source, end_step=9)
            config.updated(start_step=3)
            Pruning(source).update_items_for_all_pruners(start_step=0, end_step=3)
        except ValueError:
            assert "target" in str(before)
        assert source == before


def test_nothing_of_the_caller_is_kept():
    names = ["a"]
    source = [{"op_names": names}]
    config = WeightPruningConfig(source)
    names.append("b")
    source[0]["pattern"] = "1x1"
    source.append({})
    assert config == config.updated() == WeightPruningConfig(config) == WeightPruningConfig([{"op_names": ["a"]}])


def test_instances_share_no_state():
    """Neural Compressor writes into one default dict and one default list; here every object has its own."""
    first, second = WeightPruningConfig(), WeightPruningConfig()
    for option in ("op_names", "excluded_op_names", "extra_excluded_op_names", "pruning_op_types"):
        getattr(first.pruners[0], option).append("4")
    assert second.pruners[0].model_dump() == DEFAULTS
    assert WeightPruningConfig([{}]).pruners[0].model_dump() == DEFAULTS
    first.to_dict()["pruning_configs"].clear()
    assert len(first.pruners) == 1


def test_a_copy_shares_nothing_with_the_original():
    config = WeightPruningConfig([{"op_names": ["a"]}])
    pickled = pickle.loads(pickle.dumps(config))  # noqa: S301
    for same in (WeightPruningConfig(config), config.updated(), copy.deepcopy(config), pickled):
        assert same == config
        same.pruners[0].op_names.append("b")
        assert config.pruners[0].op_names == ["a"]


def test_a_failed_call_leaves_nothing_behind():
    """Neural Compressor: after one failing call every later call in the process failed as well."""
    message(end_step=-1)
    message([{}], start_step=4)
    assert WeightPruningConfig(target_sparsity=0.5, start_step=1, end_step=5).pruners[0].end_step == 5
    assert only().model_dump() == DEFAULTS


def test_two_models_in_one_process_do_not_meet():
    """Neural Compressor: the second model inherited the first one's exclusions and lost a layer."""
    config = WeightPruningConfig([{"pattern": "1x1", "pruning_type": "magnitude"}])
    for sizes in ((4, 4, 2), (4, 4, 4, 4, 2)):
        model = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))
        pruner = Pruning(config)
        pruner.model = model
        pruner.on_train_begin()
        assert list(pruner.masks()) == [f"{i}.weight" for i in range(len(sizes) - 1)]
    assert config.pruners[0].excluded_op_names == []


def test_options_cannot_be_assigned():
    with pytest.raises(ValueError, match="frozen"):
        only().target_sparsity = 0.5


# ---- round trips --------------------------------------------------------------------------------------------------


@st.composite
def valid_options(draw) -> dict[str, object]:
    """Any combination of options that goes together."""
    progressive = draw(st.booleans())
    criterion = draw(st.sampled_from(list(CRITERIA)))
    pattern = draw(st.sampled_from(["1x1", "4x1", "oc_pattern_4x1", "16x2", "1xchannel", "channelx1", "2:4", "1:8"]))
    highest = {"2:4": 0.5, "1:8": 0.875}.get(pattern, 0.98)
    target = draw(st.floats(0, highest))
    start = draw(st.integers(0, 10**6))
    names = st.lists(st.sampled_from(["a", "layer.1", "^x$", "é", "a|b"]), max_size=3)
    options = {
        "pruning_type": criterion + "_progressive" * progressive,
        "pattern": pattern,
        "target_sparsity": target,
        "start_step": start,
        "end_step": start + draw(st.integers(0, 10**6)),
        "pruning_frequency": draw(st.integers(1, 10**6)),
        "sparsity_decay_type": draw(st.sampled_from(list(SCHEDULES))),
        "pruning_scope": draw(st.sampled_from(["global", "local"])),
        "criterion_reduce_type": draw(st.sampled_from(["mean", "sum", "max"])),
        "op_names": draw(names),
        "excluded_op_names": draw(names),
        "extra_excluded_op_names": draw(names),
        "min_sparsity_ratio_per_op": draw(st.floats(0, target)),
        "max_sparsity_ratio_per_op": draw(st.floats(target, 1, exclude_max=True)),
    }
    if criterion == "snip_momentum":
        options["momentum_decay"] = draw(st.floats(0, 1, exclude_min=True))
    if ":" not in pattern and draw(st.booleans()):
        options |= {"reg_type": "group_lasso", "reg_coeff": draw(st.floats(0, 1, exclude_min=True))}
    kept = draw(st.sets(st.sampled_from(list(options))))
    paired = {"target_sparsity", "pattern", "pruning_type", "start_step", "end_step", "reg_type", "reg_coeff"}
    paired |= {"min_sparsity_ratio_per_op", "max_sparsity_ratio_per_op"}
    return {name: value for name, value in options.items() if name in kept | paired}


@settings(deadline=None, max_examples=150)
@given(st.lists(valid_options(), min_size=1, max_size=3), valid_options())
def test_round_trip(pruners, other):
    config = WeightPruningConfig(pruners)
    for options, pruner in zip(pruners, config.pruners, strict=True):
        plain = {**options, "pattern": str(options["pattern"]).removeprefix("oc_pattern_")}
        assert pruner.model_dump() == {**DEFAULTS, **plain}
    plain = config.to_dict()
    assert WeightPruningConfig(**plain) == WeightPruningConfig(plain) == config
    assert WeightPruningConfig(**json.loads(json.dumps(plain))) == config
    assert WeightPruningConfig(yaml.safe_load(yaml.safe_dump(plain))) == config
    assert eval(repr(config), {"WeightPruningConfig": WeightPruningConfig}) == config
    assert config.updated(**config.pruners[0].model_dump()).pruners == (config.pruners[0],) * len(pruners)
    full = WeightPruningConfig(other).to_dict()["pruning_configs"][0]
    assert config.updated(**full) == WeightPruningConfig([full] * len(pruners))


def test_repr_reads_back():
    config = WeightPruningConfig([{"start_step": np.int64(1), "end_step": 2, "reg_type": None}, {}])
    assert repr(config) == "WeightPruningConfig([{'start_step': 1, 'end_step': 2, 'reg_type': None}, {}])"


# ---- updates ------------------------------------------------------------------------------------------------------


def test_updated_changes_every_pruner_and_only_the_copy():
    config = WeightPruningConfig([{"pattern": "1x1"}, {"start_step": 1, "end_step": 2}])
    changed = config.updated(start_step=5, end_step=np.int64(50))
    assert [(p.pattern, p.start_step, p.end_step) for p in changed.pruners] == [("1x1", 5, 50), ("4x1", 5, 50)]
    assert [(p.pattern, p.start_step, p.end_step) for p in config.pruners] == [("1x1", 0, 0), ("4x1", 1, 2)]


def test_updated_reads_aliases():
    assert WeightPruningConfig().updated(prune_type="snip").pruners[0].pruning_type == "snip"


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"end_stp": 5}, "update_items_for_all_pruners.end_stp: unknown option, got 5; did you mean 'end_step'?"),
        ({"end_step": -5}, "update_items_for_all_pruners.end_step: out of range, got -5; it must be greater than"),
        ({"end_step": 2.5}, "update_items_for_all_pruners.end_step: must be a whole number, got 2.5"),
        ({"end_step": 3}, "update_items_for_all_pruners.end_step: must not lie before start_step 4, got 3"),
        ({"start_step": 9}, "pruning_configs[1].end_step: must not lie before start_step 9, got 8"),
        ({"pattern": "2:4"}, "pruning_configs[1].target_sparsity: pattern 2:4 allows at most 0.5, got 0.7"),
        ({"backend": "x"}, "update_items_for_all_pruners.backend: has no meaning here, got 'x'"),
        ({"names": [], "op_names": []}, "update_items_for_all_pruners.op_names: is the same option as names"),
        ({"update_frequency_on_step": 0}, "update_items_for_all_pruners.update_frequency_on_step: out of range, got 0"),
    ],
)
def test_updated_checks_everything_again(options, expected):
    config = WeightPruningConfig([{"end_step": 99}, {"start_step": 4, "end_step": 8, "target_sparsity": 0.7}])
    pruning = Pruning(config)
    with pytest.raises(ValueError) as caught:
        pruning.update_items_for_all_pruners(**options)
    assert str(caught.value).startswith(expected)
    assert pruning.config == config


# ---- the page -----------------------------------------------------------------------------------------------------


def test_the_page_holds_the_table_of_the_options():
    page = PAGE.read_text(encoding="utf-8")
    assert page.count("<!-- options -->") == page.count("<!-- /options -->") == 1
    table = page.partition("<!-- options -->\n")[2].partition("<!-- /options -->")[0]
    assert table == reference(), "write pruning_core.masks.config.reference() between the two markers"


def test_the_table_is_one():
    """A ``|`` in a cell would end it: every row has the four cells of the head."""
    rows = reference().splitlines()
    assert {len(re.split(r"(?<!\\)\|", row)) for row in rows} == {6}
    assert len(rows) == 2 + len(PrunerOptions.model_fields)
    for name, field in PrunerOptions.model_fields.items():
        assert field.description, f"{name} has no description"
    for name in [*DEFAULTS, *ALIASES]:
        assert f"`{name}`" in reference()


def test_the_page_names_every_word_that_options_take():
    text = PAGE.read_text(encoding="utf-8")
    for word in [*CRITERIA, *SCHEDULES, *DROPPED, "_progressive", "pattern_lock", "!Pruner", "optimizer step"]:
        assert word in text


def test_the_examples_of_the_page_are_read(tmp_path):
    page = PAGE.read_text(encoding="utf-8")
    files = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    assert len(files) >= 2
    for text in files:
        path = tmp_path / "c.yaml"
        path.write_text(text)
        assert len(WeightPruningConfig(path).pruners) == 2
    assert re.search(r"^- !Pruner|^ +- !Pruner", "".join(files), flags=re.MULTILINE)


def test_the_python_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = PAGE.read_text(encoding="utf-8")
    Path("prune.yaml").write_text(re.search(r"```yaml\n(.*?)```", page, flags=re.DOTALL)[1])
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, {})
