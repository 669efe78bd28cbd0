"""``--hyp``: files of the old yolov5 repository, today's files, and files that are neither."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from apps.common.errors import BadInput
from apps.yolov5 import hyp as hyp_module
from apps.yolov5 import ultralytics_adapter as adapter
from apps.yolov5.hyp import DROPPED, KEYS, read_hyp, translate

# hyp.scratch-low.yaml of ultralytics/yolov5 v7.0, without its comments.
SCRATCH_LOW = """\
lr0: 0.01
lrf: 0.01
momentum: 0.937
weight_decay: 0.0005
warmup_epochs: 3.0
warmup_momentum: 0.8
warmup_bias_lr: 0.1
box: 0.05
cls: 0.5
cls_pw: 1.0
obj: 1.0
obj_pw: 1.0
iou_t: 0.20
anchor_t: 4.0
# anchors: 3
fl_gamma: 0.0
hsv_h: 0.015
hsv_s: 0.7
hsv_v: 0.4
degrees: 0.0
translate: 0.1
scale: 0.5
shear: 0.0
perspective: 0.0
flipud: 0.0
fliplr: 0.5
mosaic: 1.0
mixup: 0.0
copy_paste: 0.0
"""
RECIPES = Path(hyp_module.__file__).parent / "recipes"


@pytest.fixture
def read(tmp_path):
    """What a file with this text becomes, and the lines that are said about it."""

    def from_text(text: str | bytes) -> tuple[dict[str, float], list[str]]:
        path = tmp_path / "hyp.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        said: list[str] = []
        return read_hyp(str(path), said.append), said

    return from_text


def refused(read, text: str | bytes) -> str:
    with pytest.raises(BadInput) as caught:
        read(text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_old_file_has_the_same_meaning_today(read):
    found, said = read(SCRATCH_LOW)
    old = yaml.safe_load(SCRATCH_LOW)
    dropped = {"cls_pw", "obj", "obj_pw", "iou_t", "anchor_t", "fl_gamma"}
    assert found == {**{key: value for key, value in old.items() if key not in dropped}, "box": 7.5}
    assert found["cls"] == 0.5
    for key in dropped:
        assert [line for line in said if line.startswith(f"--hyp: {key}: ")] == [
            f"--hyp: {key}: {old[key]} is left out: {DROPPED[key]}"
        ]
    assert len(said) == len(dropped) + 2
    assert "--hyp: cls: 0.5 is kept: the default is 0.5 as it was; classes no longer scale it" in said
    assert "--hyp: box: 0.05 becomes 7.5: the old default 0.05 is 7.5 today" in said


def test_an_old_file_gives_the_defaults_of_today(read):
    """Upstream kept the values of this file, so a user who never changed it gets what a user without a file gets."""
    found, _ = read(SCRATCH_LOW)
    assert vars(adapter.hyperparameters(found)) == vars(adapter.hyperparameters({}))


@pytest.mark.parametrize(("old", "today"), [(0.02, 3.0), (0.05, 7.5), (0.1, 15.0), (0, 0.0)])
def test_a_tuned_gain_is_tuned_as_much_today(read, old, today):
    found, said = read(f"box: {old}\nobj: 1.0\n")
    assert found == {"box": pytest.approx(today)}
    assert len(said) == 2


def test_a_file_of_today_passes_unchanged_and_silently(read):
    upstream = vars(adapter.hyperparameters({}))
    content = {key: upstream[key] for key in KEYS}
    assert read(yaml.safe_dump(content)) == (content, [])
    assert read("box: 0.05\n") == ({"box": 0.05}, [])


@pytest.mark.parametrize("path", sorted(RECIPES.glob("hyp.*.yaml")), ids=lambda path: path.name)
def test_our_recipes_are_files_of_today(path):
    said: list[str] = []
    found = read_hyp(str(path), said.append)
    assert found
    assert said == []
    adapter.hyperparameters(found)


def test_without_a_file_upstreams_defaults_hold():
    assert read_hyp(None, pytest.fail) == {}


def test_every_key_is_known_upstream():
    for key in KEYS:
        assert vars(adapter.hyperparameters({key: 1}))[key] == 1
    assert not set(KEYS) & set(DROPPED)


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 0.001), ("1.0e-3", 0.001), ("5E-4", 0.0005), ("0", 0), (".5", 0.5)]
)
def test_every_spelling_of_a_number(read, text, value):
    """YAML 1.1 takes 1e-3 for text."""
    assert read(f"lr0: {text}\n") == ({"lr0": value}, [])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weight_decy: 0.1", r"--hyp: unknown key, got 'weight_decy'; did you mean 'weight_decay'\?"),
        ("mosaics: 0.1", r"--hyp: unknown key, got 'mosaics'; did you mean 'mosaic'\?"),
        ("3: 0.1", r"--hyp: unknown key, got 3; known: lr0, .*"),
        ("lr0: fast", r"--hyp: lr0: must be a number of 0 or more, got 'fast'; .*"),
        ("lr0: true", r"--hyp: lr0: must be a number of 0 or more, got True; .*"),
        ("lr0:", r"--hyp: lr0: must be a number of 0 or more, got None; .*"),
        ("lr0: [0.1]", r"--hyp: lr0: must be a number of 0 or more, got \[0.1\]; .*"),
        ("obj: 1\nbox: wide", r"--hyp: box: must be a number of 0 or more, got 'wide'; .*"),
        ("obj: 1\nbox: false", r"--hyp: box: must be a number of 0 or more, got False; .*"),
        ("warmup_epochs: -1", r"--hyp: warmup_epochs: must be a number of 0 or more, got -1; .*"),
        ("warmup_epochs: .nan", r"--hyp: warmup_epochs: must be a number of 0 or more, got nan; .*"),
        ("warmup_epochs: .inf", r"--hyp: warmup_epochs: must be a number of 0 or more, got inf; .*"),
        ("lr0: '-inf'", r"--hyp: lr0: must be a number of 0 or more, got '-inf'; .*"),
        ("- lr0", r"--hyp: must hold 'name: number' lines, got '.*hyp.yaml'; see .*"),
        ("lr0", r"--hyp: must hold 'name: number' lines, got '.*hyp.yaml'; see .*"),
        ("", r"--hyp: must hold 'name: number' lines, got '.*hyp.yaml'; see .*"),
        ("lr0: [", r"--hyp: not a yaml file \(.*\), got '.*hyp.yaml'"),
        ("lr0: 0.1\n\tbox: 3", r"--hyp: not a yaml file \(.*\), got '.*hyp.yaml'"),
        ("lr0: !!python/name:os.system", r"--hyp: not a yaml file \(.*\), got '.*hyp.yaml'"),
        ("lr0: 2024-99-99", r"--hyp: not a yaml file \(.*\), got '.*hyp.yaml'"),
        ("[" * 3000, r"--hyp: not a yaml file \(.*\), got '.*hyp.yaml'"),
        (b"\xff\xfe\x00", r"--hyp: not a yaml file \(.*\), got '.*hyp.yaml'"),
    ],
)
def test_what_is_no_hyperparameter_file(read, text, message):
    assert re.fullmatch(message, refused(read, text))


def test_a_message_names_a_file_that_is_there(read):
    named = re.search(r"see (recipes/\S+)", refused(read, "- lr0"))
    assert (RECIPES.parent / named[1]).is_file()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"lr0": 2}, r"--hyp: 'lr0=2' .*; see ultralytics' default.yaml"),
        ({"nbs": 0}, r"--hyp: 'nbs=0' .*; see ultralytics' default.yaml"),
        ({"close_mosaic": 1.5}, r"--hyp: 'close_mosaic=1.5' .*; see ultralytics' default.yaml"),
    ],
)
def test_upstream_knows_the_ranges(content, message):
    with pytest.raises(BadInput) as caught:
        adapter.hyperparameters(translate(content, pytest.fail))
    assert re.fullmatch(message, str(caught.value))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.yaml", r"--hyp: no such file, got '.*missing.yaml'; leave it out for the defaults"),
        (".", r"--hyp: not a yaml file \(.*\), got '.*'"),
    ],
)
def test_no_file(tmp_path, path, message):
    with pytest.raises(BadInput) as caught:
        read_hyp(str(tmp_path / path), pytest.fail)
    assert re.fullmatch(message, str(caught.value))
