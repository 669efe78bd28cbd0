"""Circles, squares and triangles to detect, in YOLO layout, made on the spot: the same seed gives the same bits.

python data/shapes_detection.py --output runs/data/shapes
"""

from __future__ import annotations

import argparse
import math
import re
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

CLASSES = ("circle", "square", "triangle")
FINE = 4  # subpixels per pixel and axis: shapes are drawn and placed on this grid, so a box is exact on it
COVERED = 0.3  # the most of a box that other boxes may cover
VERSION = 1  # raise it when a drawing changes: a set made before is then refused instead of taken for a new one
LEAST = {"train": 1, "val": 1, "size": 32, "seed": 0}
FOLDERS = ("images", "images/train", "images/val", "labels", "labels/train", "labels/val")
# Narrow on purpose: what matches may be deleted. Ultralytics leaves labels/*.cache beside our files.
FILES = re.compile(r"(images|labels)/(train|val)/shapes-\d{5,}\.(png|txt)|labels/(train|val)\.cache|data\.yaml\.tmp")


class Thing(NamedTuple):
    kind: int
    box: tuple[int, int, int, int]  # left, top, right, bottom in subpixels, with what another shape hides
    stencil: np.ndarray  # the subpixels inside the shape, cut to its box


def make(folder: Path, *, train: int = 400, val: int = 96, size: int = 128, seed: int = 0) -> Path:
    """Write the set into ``folder`` unless it is there already; the path of its data.yaml."""
    asked = {"train": train, "val": val, "size": size, "seed": seed}
    for name, value in asked.items():
        if not isinstance(value, int) or value < LEAST[name]:
            raise ValueError(f"{name}: out of range, got {value!r}; give a whole number of {LEAST[name]} or more")
    made_with = "made_with: " + str({**asked, "version": VERSION}).replace("'", "")
    file = Path(folder) / "data.yaml"
    if file.exists():
        found = [line for line in file.read_text(errors="replace").splitlines() if line.startswith("made_with:")]
        if found == [made_with]:
            return file
        got = f"'{found[0]}'" if found else "a data.yaml without made_with"
        raise ValueError(f"{folder}: holds another set, got {got}; choose another folder or delete this one")
    _clear(file.parent)
    for split, count in enumerate((train, val)):
        for index in range(count):
            _write(file.parent, split, index, *scene(size, seed, split, index))
    # Last and in one move: a data.yaml means that everything it names is there.
    draft = file.with_name("data.yaml.tmp")
    draft.write_text(f"train: images/train\nval: images/val\nnames: {dict(enumerate(CLASSES))}\n{made_with}\n")
    return draft.replace(file)


def _clear(folder: Path) -> None:
    """Make the folders, without the files of a run that was killed. Any other file is somebody's, so it is refused."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is not a folder, got a file; choose another folder")
    paths = sorted(folder.rglob("*"))
    for path in paths:
        name = path.relative_to(folder).as_posix()
        if not (name in FOLDERS if path.is_dir() else FILES.fullmatch(name)):
            raise ValueError(f"{folder}: holds a file that is not ours, got {name!r}; choose an empty or a new folder")
    for path in filter(Path.is_file, paths):
        path.unlink()
    for name in FOLDERS:
        (folder / name).mkdir(parents=True, exist_ok=True)


def _write(folder: Path, split: int, index: int, pixels: np.ndarray, things: list[Thing]) -> None:
    name = f"{('train', 'val')[split]}/shapes-{index:05d}"
    # Noise hardly compresses: level 1 is several times faster and a few percent larger.
    Image.fromarray(pixels).save(folder / f"images/{name}.png", compress_level=1)
    lines = ""
    for kind, (left, top, right, bottom), _ in things:
        places = ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)
        lines += " ".join([str(kind), *(f"{place / (FINE * len(pixels)):.6f}" for place in places)]) + "\n"
    (folder / f"labels/{name}.txt").write_text(lines)


def scene(size: int, seed: int, split: int, index: int) -> tuple[np.ndarray, list[Thing]]:
    """Pixels (size, size, 3) and what is on them. The generator is the image's own, whatever else is made."""
    rng = np.random.default_rng([seed, split, index])
    canvas = _background(rng, size)
    things: list[Thing] = []
    for _ in range(0 if rng.random() < 0.04 else rng.integers(2, 9)):  # real sets have a few empty images
        thing = _place(rng, size, [thing.box for thing in things])
        if thing is not None:
            _paint(rng, canvas, thing)
            things.append(thing)
    canvas += (4 + 14 * rng.random()) * (rng.random((2, size, size, 3)).sum(axis=0) - 1)
    return (canvas.clip(0, 255) + 0.5).astype(np.uint8), things


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A gradient with speckle, lines, dots and open arcs: edges and round things that are no object."""
    axis, angle = np.arange(size) + 0.5, 2 * math.pi * rng.random()
    slope = (axis / size - 0.5) * math.cos(angle) + (axis / size - 0.5)[:, None] * math.sin(angle)
    canvas = 30 + 195 * rng.random(3) + 140 * (rng.random(3) - 0.5) * slope[..., None]
    speckle = rng.random((size, size)) < 0.02 * rng.random()
    canvas[speckle] += 160 * (rng.random((speckle.sum(), 3)) - 0.5)
    thin = max(0.6, 0.004 * size)
    for what in rng.integers(0, 3, rng.integers(3, 9)):
        (x, y), angle, share = size * rng.random(2), 2 * math.pi * rng.random(), rng.random()
        dx, dy = axis - x, axis[:, None] - y
        along = dx * math.cos(angle) + dy * math.sin(angle)
        far = np.sqrt(dx**2 + dy**2)
        if what == 0:  # the distance to a segment with its middle at x, y
            beyond = np.maximum(np.abs(along) - size * (0.05 + 0.4 * share), 0)
            distance = np.sqrt(np.maximum(far**2 - along**2, 0) + beyond**2) - thin * (0.5 + share)
        elif what == 1:
            distance = far - size * (0.006 + 0.012 * share)
        else:  # between a third and two thirds of a circle, so that it cannot pass for one
            ring = np.abs(far - size * (0.04 + 0.13 * share)) - thin
            distance = np.where(along < far * (rng.random() - 0.5), np.inf, ring)
        canvas += 0.9 * (0.5 - distance).clip(0, 1)[..., None] * (255 * rng.random(3) - canvas)
    return canvas


def _stencil(kind: int, span: float, angle: float) -> np.ndarray:
    """The shape as subpixels, cut to its box; the long side of the box is ``span``."""
    half = math.ceil(0.71 * span) + 1  # the corner of an upright square reaches farthest from its middle
    y, x = np.ogrid[0.5 - half : half, 0.5 - half : half]
    if CLASSES[kind] == "circle":
        inside = x**2 + y**2 < (span / 2) ** 2
    else:
        sides = 4 if CLASSES[kind] == "square" else 3
        turns = angle + 2 * math.pi * np.arange(sides) / sides
        radius = span / max(np.ptp(np.cos(turns)), np.ptp(np.sin(turns)))
        normals = turns + math.pi / sides  # a side faces the middle between two corners
        reach = np.max([x * math.cos(normal) + y * math.sin(normal) for normal in normals], axis=0)
        inside = reach < radius * math.cos(math.pi / sides)
    return inside[inside.any(axis=1)][:, inside.any(axis=0)]


def _place(rng: np.random.Generator, size: int, boxes: list[tuple[int, int, int, int]]) -> Thing | None:
    """A shape at a place where no box is covered too much, or None when the image is too full for it."""
    kind = int(rng.integers(len(CLASSES)))
    # As many from 12 to 23 % as from 23 to 45 %; under 6 pixels a circle and a square look the same.
    span = max(6.0, size * 0.12 * (0.45 / 0.12) ** rng.random())
    stencil = _stencil(kind, FINE * span, 2 * math.pi * rng.random())
    height, width = stencil.shape
    for _ in range(20):
        # One pixel stays free at the border, so that rounding in the label cannot leave the image.
        left, top = rng.integers(FINE, FINE * (size - 1) - np.array([width, height]) + 1).tolist()
        box = (left, top, left + width, top + height)
        if not _crowded(np.array([*boxes, box])):
            return Thing(kind, box, stencil)
    return None


def _crowded(edges: np.ndarray) -> bool:
    """Whether other boxes cover too much of one; what two of them share counts twice, which errs on the safe side."""
    start, end = np.maximum(edges[:, None, :2], edges[:, :2]), np.minimum(edges[:, None, 2:], edges[:, 2:])
    shared = (end - start).clip(0).prod(axis=2)
    own = shared.diagonal()
    return bool((shared.sum(axis=1) - own > COVERED * own).any())


def _paint(rng: np.random.Generator, canvas: np.ndarray, thing: Thing) -> None:
    """Fill the shape with a colour that differs from what lies under it, by a little or a lot."""
    left, top, right, bottom = thing.box
    fine = np.pad(thing.stencil, ((top % FINE, -bottom % FINE), (left % FINE, -right % FINE)))
    under = canvas[top // FINE : -(-bottom // FINE), left // FINE : -(-right // FINE)]
    covered = fine.reshape(len(under), FINE, -1, FINE).mean(axis=(1, 3))[..., None]
    direction = rng.random((16, 3)) - 0.5
    direction *= (130 + 90 * rng.random()) / np.linalg.norm(direction, axis=1, keepdims=True)
    colours = (under.mean(axis=(0, 1)) + direction).clip(0, 255)
    near = ((under[::2, ::2] - colours[:, None, None]) ** 2).sum(axis=3) < 55**2
    # The first colour that stands out from most pixels: argmin takes the first of equals.
    under += covered * (colours[near.mean(axis=(1, 2)).argmin()] - under)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make a small detection set in YOLO layout.", exit_on_error=False)
    parser.add_argument("--output", type=Path, default=Path("runs/data/shapes"), help="folder (default: %(default)s)")
    for name, value in (("train", 400), ("val", 96), ("size", 128), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=value, help="(default: %(default)s)")
    start = time.perf_counter()
    try:
        args = parser.parse_args(argv)
        there = (args.output / "data.yaml").exists()
        file = make(args.output, train=args.train, val=args.val, size=args.size, seed=args.seed)
    except (argparse.ArgumentError, ValueError) as error:
        parser.exit(2, f"{error}\n")
    except OSError as error:
        parser.exit(2, f"{args.output}: cannot be written, got {error}; choose another folder\n")
    objects = sum(len(labels.read_text().splitlines()) for labels in args.output.glob("labels/*/*.txt"))
    made = f"{args.train} train and {args.val} val images of {args.size} px, {len(CLASSES)} classes"
    ended = "already there" if there else f"{time.perf_counter() - start:.1f} s"
    print(f"{file}: {made} ({objects:,} objects, seed {args.seed}), {ended}")


if __name__ == "__main__":
    main()
