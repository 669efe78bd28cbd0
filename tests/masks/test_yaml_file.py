"""YAML files: both generations of Neural Compressor, our own, and everything that is none of them."""

import contextlib
import os
import random
import threading
import time
from collections import OrderedDict
from pathlib import Path

import pytest
from torch import nn

from pruning_core import Pruning, WeightPruningConfig
from pruning_core.masks.yaml_file import MAX_BYTES, MAX_DEPTH, MAX_NODES, read_mapping
from tests.support.samples import NEURAL_COMPRESSOR_YAML

SECOND_GENERATION = """\
version: 1.0
pruning:
  approach:
    weight_compression_pytorch:
      start_step: 10
      end_step: 90
      excluded_names: ["head"]
      prune_layer_type: ["Conv2d", "Linear"]
      target_sparsity: 0.7
      pruners:
        - !Pruner
            names: ["backbone"]
            extra_excluded_names: ["stem"]
            pattern: "tile_pattern_4x1"
            update_frequency_on_step: 5
            prune_domain: "local"
            prune_type: "snip"
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str | bytes) -> Path:
        path = tmp_path / "c.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def refused(path: str | Path) -> str:
    """The one line of the error, without the path that it begins with."""
    with pytest.raises(ValueError) as caught:
        read_mapping(path)
    assert type(caught.value) is ValueError
    text = str(caught.value)
    assert text.startswith(str(path))
    assert "\n" not in text
    return text.removeprefix(str(path))


# ---- the files of Neural Compressor -------------------------------------------------------------------------------


def test_seed_000_is_the_same_as_the_dict(write):
    exclusions = {"excluded_op_names": ["model.33.m.*"], "pruning_op_types": ["Conv2d"]}
    expected = WeightPruningConfig(
        [
            {
                "extra_excluded_op_names": ["model.*.cv1", "model.*.cv2", "model.*.cv3"],
                "pattern": "1x1",
                "pruning_frequency": 1000,
                "pruning_scope": "global",
                "pruning_type": "snip_momentum",
                "sparsity_decay_type": "exp",
            },
            {
                "extra_excluded_op_names": [],
                "pattern": "4x1",
                "pruning_frequency": 1000,
                "pruning_scope": "global",
                "pruning_type": "snip_momentum",
                "sparsity_decay_type": "exp",
            },
        ],
        start_step=0,
        end_step=0,
        target_sparsity=0.8,
        max_sparsity_ratio_per_op=0.98,
        **exclusions,
    )
    path = write(NEURAL_COMPRESSOR_YAML)
    assert WeightPruningConfig(path) == WeightPruningConfig(str(path)) == Pruning(str(path)).config == expected
    assert WeightPruningConfig(read_mapping(path)) == expected


def test_seed_000_takes_the_steps_of_the_template(write):
    pruner = Pruning(str(write(NEURAL_COMPRESSOR_YAML)))
    pruner.update_items_for_all_pruners(start_step=5, end_step=5000)
    assert [(p.start_step, p.end_step, p.pattern) for p in pruner.config.pruners] == [
        (5, 5000, "1x1"),
        (5, 5000, "4x1"),
    ]


def test_seed_000_selects_what_it_says(write):
    """The first pruner leaves cv1 to cv3 to the second; the head of layer 33 is nobody's, and no Linear layer is."""
    block = {"cv1": nn.Conv2d(4, 4, 1), "cv2": nn.Conv2d(4, 4, 1), "m": nn.Conv2d(4, 4, 1)}
    layers = {"0": nn.Conv2d(3, 4, 1), "2": nn.Sequential(OrderedDict(block)), "9": nn.Linear(4, 4)}
    head = nn.ModuleDict({"m": nn.ModuleList([nn.Conv2d(4, 4, 1)]), "cv3": nn.Conv2d(4, 4, 1)})
    model = nn.ModuleDict({"model": nn.ModuleDict({**layers, "33": head})})
    pruner = Pruning(str(write(NEURAL_COMPRESSOR_YAML)))
    pruner.model = model
    pruner.on_train_begin()
    selected = [[weight.target.layer for weight in group.weights] for group in pruner._groups]
    assert selected == [["model.0", "model.2.m"], ["model.2.cv1", "model.2.cv2", "model.33.cv3"]]


def test_second_generation(write):
    expected = {
        "start_step": 10,
        "end_step": 90,
        "excluded_op_names": ["head"],
        "extra_excluded_op_names": ["stem"],
        "op_names": ["backbone"],
        "pruning_op_types": ["Conv2d", "Linear"],
        "target_sparsity": 0.7,
        "pattern": "4x1",
        "pruning_frequency": 5,
        "pruning_scope": "local",
        "pruning_type": "snip",
    }
    assert WeightPruningConfig(write(SECOND_GENERATION)) == WeightPruningConfig([expected])


@pytest.mark.parametrize(
    "pruners",
    [
        "        - !Pruner\n            pattern: 1x1\n            start_step: 3\n",
        "        - !Pruner\n          pattern: 1x1\n          start_step: 3\n",
        "        - !Pruner {pattern: 1x1, start_step: 3}\n",
        "      - !Pruner\n        pattern: 1x1\n        start_step: 3\n",
        "        -\n          !Pruner\n          pattern: 1x1\n          start_step: 3\n",
        "        - pattern: 1x1\n          start_step: 3\n",
    ],
    ids=["nested", "flat", "flow", "flat list", "own line", "no tag"],
)
def test_a_pruner_however_it_is_indented(write, pruners):
    top = "pruning:\n  approach:\n    weight_compression_pytorch:\n      end_step: 9\n      pruners:\n"
    config = WeightPruningConfig(write(top + pruners))
    assert config == WeightPruningConfig([{"pattern": "1x1", "start_step": 3, "end_step": 9}])


def test_a_section_without_pruners_is_one_pruner(write):
    path = write("pruning:\n  approach:\n    weight_compression:\n      target_sparsity: 0.6\n")
    assert WeightPruningConfig(path) == WeightPruningConfig(target_sparsity=0.6)


def test_an_error_in_a_file_names_the_place_in_it(write):
    with pytest.raises(ValueError) as caught:
        WeightPruningConfig(write(NEURAL_COMPRESSOR_YAML.replace('"global" #', '"globe" #')))
    where = "pruning.approach.weight_compression_pytorch.pruners[0].prune_domain: "
    assert str(caught.value) == where + "wrong value, got 'globe'; it must be 'global' or 'local'"
    with pytest.raises(ValueError) as caught:
        WeightPruningConfig(write(NEURAL_COMPRESSOR_YAML.replace("end_step: 0", "end_stop: 0")))
    assert str(caught.value).startswith("pruning.approach.weight_compression_pytorch.end_stop: unknown option, got 0; ")


# ---- our own files ------------------------------------------------------------------------------------------------


def test_a_flat_mapping_is_one_pruner(write):
    config = WeightPruningConfig(write("target_sparsity: 0.5\nop_names: [a, b]\nreg_type: null\n"))
    assert config == WeightPruningConfig([{"target_sparsity": 0.5, "op_names": ["a", "b"]}])


def test_a_list_of_pruners_with_global_options(write):
    text = "end_step: 100\npruning_configs:\n- pattern: 1x1\n- pattern: 2:4\n  end_step: 50\n"
    expected = WeightPruningConfig([{"pattern": "1x1"}, {"pattern": "2:4", "end_step": 50}], end_step=100)
    assert WeightPruningConfig(write(text)) == expected


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "12:30", "1:59", "4x1", "1xchannel"])
def test_a_pattern_needs_no_quotes(write, pattern):
    """YAML 1.1 reads 2:4 as 124, base sixty."""
    assert read_mapping(write(f"pattern: {pattern}")) == {"pattern": pattern}
    assert read_mapping(write(f"pattern: '{pattern}'")) == {"pattern": pattern}


@pytest.mark.parametrize(
    "text, value",
    [
        ("0", 0),
        ("7", 7),
        ("-3", -3),
        ("+3", 3),
        ("10_000", 10_000),
        ("0.8", 0.8),
        (".8", 0.8),
        ("1.", 1.0),
        ("-0.5", -0.5),
        ("1e-4", 1e-4),
        ("1E3", 1e3),
        ("1.5e+3", 1.5e3),
        (".inf", float("inf")),
        ("-.inf", -float("inf")),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("yes", "yes"),
        ("on", "on"),
        ("0x10", "0x10"),
        ("010", "010"),
        ("2024-01-01", "2024-01-01"),
        ("2024-99-99", "2024-99-99"),
        ("1:2:3.5", "1:2:3.5"),
        ("=", "="),
        ("'0.8'", "0.8"),
        ("[1, 0.5, a]", [1, 0.5, "a"]),
        ("{a: 1}", {"a": 1}),
        ("nan", "nan"),
        ("9" * 5000, "9" * 5000),
        ("2:" * 5000 + "2", "2:" * 5000 + "2"),
    ],
)
def test_plain_text(write, text, value):
    loaded = read_mapping(write(f"a: {text}\n"))["a"]
    assert loaded == value
    assert type(loaded) is type(value)


def test_not_a_number_is_read_and_refused_as_an_option(write):
    with pytest.raises(ValueError, match=r"^target_sparsity: wrong value, got nan; it must be a finite number$"):
        WeightPruningConfig(write("target_sparsity: .nan"))


def test_a_byte_order_mark_is_no_text(write):
    assert read_mapping(write(b"\xef\xbb\xbfpattern: 1x1\r\n")) == {"pattern": "1x1"}


def test_what_is_read_is_new_every_time(write):
    path = write(NEURAL_COMPRESSOR_YAML)
    read_mapping(path)["pruning"].clear()
    assert read_mapping(path)["pruning"]


# ---- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", ": is empty; write at least 'target_sparsity: 0.8'"),
        ("\n# nothing\n", ": is empty; "),
        ("---\n", ": is empty; "),
        ("~", ": is empty; "),
        ("- pattern: 1x1\n", ": must be a mapping of options, got list; see docs/configuration.md"),
        ("[]", ": must be a mapping of options, got list; "),
        ("just text", ": must be a mapping of options, got str; "),
        ("0.8", ": must be a mapping of options, got float; "),
        ("a: !Prunner {}", ", line 1: unknown tag '!Prunner'; known: !Pruner, !PrunerV2"),
        ("a: 1\nb:\n  - !Pruner/x {}", ", line 3: unknown tag '!Pruner/x'; known: !Pruner, !PrunerV2"),
        ("!x a: 1", ", line 1: unknown tag '!x'; known: !Pruner, !PrunerV2"),
        ("a: !x [1]", ", line 1: unknown tag '!x'; "),
        ("a: !!python/object:os.system x", ", line 1: unknown tag 'tag:yaml.org,2002:python/object:os.system'; "),
        ("a: !!python/object/apply:os.system [x]", ", line 1: unknown tag 'tag:yaml.org,2002:python/object/apply:os"),
        ("a: !!python/name:os.system", ", line 1: unknown tag 'tag:yaml.org,2002:python/name:os.system'; "),
        ("a: !!int x", ", line 1: unknown tag 'tag:yaml.org,2002:int'; "),
        ("a: !!timestamp x", ", line 1: unknown tag 'tag:yaml.org,2002:timestamp'; "),
        ("a: !!binary '*'", ", line 1: unknown tag 'tag:yaml.org,2002:binary'; "),
        ("!!set {a, b}", ", line 1: unknown tag 'tag:yaml.org,2002:set'; "),
        ("a: !!omap [b: 1]", ", line 1: unknown tag 'tag:yaml.org,2002:omap'; "),
        ("a: !Pruner", ", line 1: !Pruner must be followed by options, as '!Pruner' and then 'pattern: 4x1' on the"),
        ("a: !Pruner [1]", ", line 1: !Pruner must be followed by options"),
        ("a: 1\nb: 2\na: 3\n", ", line 3: duplicate key 'a'; keep one"),
        ("a:\n  b:\n  - c: 1\n    c: 2\n", ", line 4: duplicate key 'c'; keep one"),
        ("a:\n  - !Pruner\n    c: 1\n    'c': 2\n", ", line 4: duplicate key 'c'; keep one"),
        ("1: a\n'1': b\n", ", line 2: duplicate key '1'; keep one"),
        ("[a]: 1", ", line 1: a key must be plain text"),
        ("{a: 1}: 2", ", line 1: a key must be plain text"),
        ("? [a, b]\n: 1", ", line 1: a key must be plain text"),
        ("a: &x 1\nb: *x\n", ", line 2: aliases are not read, got '*x'; write the options out"),
        ("a: &x [*x]", ", line 1: aliases are not read, got '*x'; write the options out"),
        ("a: &x {b: 1}\nc:\n  <<: *x\n", ", line 3: aliases are not read, got '*x'; write the options out"),
        ("a: 1\n---\nb: 2\n", ", line 2: expected a single document in the stream, but found another document"),
        ("a: 1\n\tb: 2\n", ", line 2: while scanning for the next token, found character '\\t' that cannot start any"),
        ("a:\n  - b\n c: 1\n", ", line 3: while parsing a block mapping, expected <block end>, but found"),
        ("a: [1, 2\nb: 3\n", ", line 2: while parsing a flow sequence, expected ',' or ']', but got ':'"),
        ("a: [1, 2\n", ", line 2: while parsing a flow sequence, expected ',' or ']', but got '<stream end>'"),
        ("a: 'open\n", ", line 2: while scanning a quoted scalar, found unexpected end of stream"),
        ("a: b: c\n", ", line 1: mapping values are not allowed here"),
        ("a: @x\n", ", line 1: while scanning for the next token, found character '@' that cannot start any token"),
        ("%YAML 3.0\n---\na: 1", ", line 1: found incompatible YAML document (version 1.* is required)"),
        ("a: \0", ": not readable as YAML (unacceptable character #x0000: special characters are not allowed)"),
        (b"a: \xff\xfe", ": is not UTF-8 text; check the path of the configuration"),
        ("a: 1".encode("utf-16"), ": is not UTF-8 text; check the path of the configuration"),
        (b"PK\x03\x04\x00\x00\x80\xff", ": is not UTF-8 text; check the path of the configuration"),
    ],
)
def test_refused(write, text, expected):
    assert refused(write(text)).startswith(expected)


def test_a_tag_runs_no_code(write, tmp_path):
    trace = tmp_path / "owned"
    refused(write(f"a: !!python/object/apply:os.system ['touch {trace}']"))
    refused(write(f"a: !!python/object/new:os.system ['touch {trace}']"))
    assert not trace.exists()


def test_a_merge_key_is_a_name_like_any_other(write):
    with pytest.raises(ValueError, match=r"^<<: unknown option, got {'pattern': '1x1'}; "):
        WeightPruningConfig(write("<<: {pattern: 1x1}"))


def test_missing_file(tmp_path):
    expected = ": cannot be read (No such file or directory); check the path of the configuration"
    assert refused(tmp_path / "none.yaml") == expected
    with pytest.raises(ValueError, match=r"none\.yaml: cannot be read \(No such file"):
        Pruning(str(tmp_path / "none.yaml"))


def test_folder(tmp_path):
    assert refused(tmp_path) == ": cannot be read (Is a directory); check the path of the configuration"


def test_a_file_below_a_file(write):
    assert refused(write("") / "c.yaml").startswith(": cannot be read (Not a directory)")


def test_a_text_that_is_no_path():
    with pytest.raises(ValueError, match=r"cannot be read \(File name too long\)"):
        WeightPruningConfig("pattern: 1x1 " * 1000)


# ---- files that are made to hurt ----------------------------------------------------------------------------------

BELOW = MAX_BYTES - 100
TOO_LONG = ": nested too deep or too long; this is not a pruning configuration"
TOO_LARGE = f": larger than {MAX_BYTES} bytes; this is not a pruning configuration"
LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcd", "bcde", strict=True)
)

HOSTILE = {
    "10 MB of brackets": ("[" * 10_000_000, TOO_LARGE),
    "10 MB of braces": ("{" * 10_000_000, TOO_LARGE),
    "10 MB flat": ("".join(f"k{i}: {i}\n" for i in range(800_000)), TOO_LARGE),
    "10 MB of spaces": (" " * 10_000_000, TOO_LARGE),
    "deep brackets": ("[" * BELOW, TOO_LONG),
    "deep braces": ("{a: " * (BELOW // 4), TOO_LONG),
    "deep list": ("- " * (BELOW // 2), TOO_LONG),
    "deep keys": ("? " * (BELOW // 2), TOO_LONG),
    "deep indentation": ("".join(" " * i + "a:\n" for i in range(MAX_DEPTH + 1)), TOO_LONG),
    "long flat": ("".join(f"k{i}: {i}\n" for i in range(70_000)), TOO_LONG),
    "long list": ("a: [" + "1," * (BELOW // 2) + "]", TOO_LONG),
    "many documents": ("---\n" * (BELOW // 4), TOO_LONG),
    "billion laughs": (LAUGHS, ", line 2: aliases are not read, got '*a'; write the options out"),
    "long tag": ("a: !" + "x" * BELOW, ", line 1: unknown tag '!xxx"),
    "long key": ("x" * BELOW + ": 1", ", line 1: mapping values are not allowed here"),
    "comment": ("#" * BELOW, ": is empty; "),
    "many directives": ("%YAML 1.1\n" * (BELOW // 10), ", line 2: found duplicate YAML directive"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_file(write, name):
    text, expected = HOSTILE[name]
    path = write(text)
    began = time.process_time()
    problem = refused(path)
    assert time.process_time() - began < 2
    assert problem.startswith(expected)
    assert len(problem) < 300


LONG = {
    "digits": "1" * BELOW,
    "base sixty": "1" + ":1" * (BELOW // 2),
    "base sixty, float": "1" + ":1" * (BELOW // 2 - 9) + ".5",
    "underscores": "1" + "_" * (BELOW - 1),
    "hexadecimal": "0x" + "f" * (BELOW - 2),
    "float": "1." + "1" * (BELOW - 2),
    "exponent": "1e" + "1" * (BELOW - 2),
    "time": "2001-01-01 00:00:00." + "0" * (BELOW - 50),
    "text": "a" * BELOW,
}


@pytest.mark.parametrize("name", LONG)
def test_a_long_value_is_read_in_no_time(write, name):
    """PyYAML takes a minute for a megabyte of 1:1:1:1, and an integer of 4301 digits is an error without a file."""
    path = write("a: " + LONG[name])
    began = time.process_time()
    assert set(read_mapping(path)) == {"a"}
    assert time.process_time() - began < 2


def test_the_deepest_and_the_longest_that_is_read(write):
    deep: object = read_mapping(write("a: " + "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1)))["a"]
    for _ in range(MAX_DEPTH - 2):
        (deep,) = deep
    assert deep == []
    assert refused(write("a: " + "[" * MAX_DEPTH + "]" * MAX_DEPTH)) == TOO_LONG
    flat = {f"k{i}": i for i in range((MAX_NODES - 10) // 2)}
    assert read_mapping(write("".join(f"{key}: {value}\n" for key, value in flat.items()))) == flat


def test_damaged_files_end_in_one_kind_of_error(write):
    """Whatever stands in the file, the answer is a configuration or one ValueError that names the file."""
    chance = random.Random(0)
    kinds = set()
    for _ in range(300):
        data = bytearray(NEURAL_COMPRESSOR_YAML.encode())
        for _ in range(chance.randrange(1, 6)):
            data[chance.randrange(len(data))] = chance.choice(b"\t\n :[]{}!&*?|>'\"%@`#,-~<=0aA\xff\x00")
        path = write(bytes(data[: chance.randrange(len(data))] if chance.random() < 0.3 else data))
        try:
            assert isinstance(read_mapping(path), dict)
            kinds.add("read")
        except ValueError as error:
            assert str(error).startswith(str(path)), error
            kinds.add("refused")
    assert kinds == {"read", "refused"}


@pytest.fixture
def pipe(tmp_path):
    if not hasattr(os, "mkfifo"):
        pytest.skip("needs a named pipe")
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


def test_a_pipe_is_a_file(pipe):
    """``<(...)`` of the shell gives one."""
    writer = threading.Thread(target=pipe.write_text, args=("pattern: 1x1\n",))
    writer.start()
    assert read_mapping(pipe) == {"pattern": "1x1"}
    writer.join()


def test_an_endless_file_is_not_read_to_its_end(pipe):
    """A device or a pipe has no size to look at."""
    written = []

    def write() -> None:
        with contextlib.suppress(BrokenPipeError), pipe.open("wb", buffering=0) as file:
            while len(written) < 100:
                written.append(file.write(b"#" * MAX_BYTES))

    writer = threading.Thread(target=write)
    writer.start()
    assert refused(pipe) == TOO_LARGE
    writer.join()
    assert len(written) < 10


# ---- files of Neural Compressor's own tests --------------------------------------------------------------------------

V2 = """
model:
  name: imagenet_prune
  framework: pytorch
pruning:
  approach:
    weight_compression_v2:
      initial_sparsity: 0.0
      target_sparsity: 0.9
      start_step: 0
      end_step: 10
      excluded_op_names: ["classifier"]
      update_frequency: 2
      pruners:
        - !PrunerV2
            pruning_type: "magnitude"
            op_names: ['layer1.*']
            pattern: "4x1"
            parameters: {"reg_coeff":0.1}
            reg_type: group_lasso
        - !PrunerV2
            start_step: 1
            end_step: 1
            initial_sparsity: 0
            target_sparsity: 0.5
            update_frequency: 3
            op_names: ['layer2.*']
            pattern: "2:4"
"""


def test_the_second_generation_of_files(write):
    first, second = WeightPruningConfig(write(V2)).pruners
    assert (first.target_sparsity, first.pruning_frequency, first.reg_coeff) == (0.9, 2, 0.1)
    assert (second.target_sparsity, second.pruning_frequency, second.pattern) == (0.5, 3, "2:4")
    assert first.excluded_op_names == second.excluded_op_names == ["classifier"]


@pytest.mark.parametrize("value", ["0.1", "true", "null"])
def test_a_schedule_that_would_not_begin_at_zero(write, value):
    text = V2.replace("initial_sparsity: 0.0", f"initial_sparsity: {value}")
    message = r"initial_sparsity: has no meaning here, got .*; every schedule begins at 0; remove it"
    with pytest.raises(ValueError, match=message):
        WeightPruningConfig(write(text))
