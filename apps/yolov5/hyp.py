"""``--hyp``: today's hyperparameters, and those of the old yolov5 repository translated with one line each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from apps.common.errors import BadInput
from apps.common.yaml_file import read_yaml
from pruning_core.registry import did_you_mean

KEYS = (
    *("lr0", "lrf", "momentum", "weight_decay", "warmup_epochs", "warmup_momentum", "warmup_bias_lr", "nbs"),
    *("box", "cls", "dfl", "hsv_h", "hsv_s", "hsv_v", "degrees", "translate", "scale", "shear", "perspective"),
    *("flipud", "fliplr", "bgr", "mosaic", "close_mosaic", "mixup", "cutmix", "copy_paste"),
)
DROPPED = {
    "obj": "today's head has no objectness",
    "obj_pw": "today's head has no objectness",
    "iou_t": "today's head has no anchors",
    "anchor_t": "today's head has no anchors",
    "anchors": "today's head has no anchors",
    "fl_gamma": "today's loss has no focal term",
    "label_smoothing": "today's targets are soft already",
    "cls_pw": "it was the weight of positives, and means class balancing by frequency today",
}
OLD_ONLY = ("obj", "obj_pw", "iou_t", "anchor_t", "anchors", "fl_gamma")
BOX_GAIN_THEN, BOX_GAIN_NOW = 0.05, 7.5


def read_hyp(path: str | None, say: Callable[[str], None]) -> dict[str, Any]:
    """The given hyperparameters under today's names. Empty without a file: then upstream's defaults hold."""
    if path is None:
        return {}
    missing = "leave it out for the defaults"
    shape = {"expected": "'name: number' lines", "example": "see recipes/hyp.finetune.yaml"}
    return translate(read_yaml(path, option="--hyp", missing=missing, **shape), say)


def translate(content: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """An old file is known by keys that only old files have."""
    old = any(key in content for key in OLD_ONLY)
    today: dict[str, Any] = {}
    for key, value in content.items():
        if key in DROPPED:
            say(f"--hyp: {key}: {value} is left out: {DROPPED[key]}")
        elif key not in KEYS:
            raise BadInput(f"--hyp: unknown key, got {key!r}; {did_you_mean(key, KEYS)}")
        else:
            today[key] = _number(key, value)
        if old and key == "box":
            today[key] = float(f"{today[key] * BOX_GAIN_NOW / BOX_GAIN_THEN:.6g}")
            say(f"--hyp: box: {value} becomes {today[key]:g}: the old default {BOX_GAIN_THEN} is {BOX_GAIN_NOW} today")
        if old and key == "cls":
            say(f"--hyp: cls: {value} is kept: the default is 0.5 as it was; classes no longer scale it")
    return today


def _number(key: str, value: Any) -> float:
    """``1e-3`` is a number too: YAML 1.1 takes it for text."""
    number = value
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            number = float(value)
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number < float("inf"):
        raise BadInput(f"--hyp: {key}: must be a number of 0 or more, got {value!r}; leave it out for the default")
    if key == "momentum" and number >= 1:
        raise BadInput(f"--hyp: momentum: must be below 1, got {value!r}; 0.9 is usual")
    return number
