"""The detection set: the same bits every time, true boxes, and a folder of somebody else stays as it is."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from data import shapes_detection
from data.shapes_detection import CLASSES, FINE, main, make, scene
from tests.support import ROOT

TINY = {"train": 4, "val": 2, "size": 48, "seed": 7}
# Pixels and labels of TINY. Whoever changes a drawing changes this line and raises VERSION.
GOLDEN = "08d6a5666b6cad279a36829a1d81feb538120af25968f1ca9b0dd91c36b87b95"


def digest(folder: Path) -> str:
    """Over decoded pixels, not over PNG bytes: those depend on the zlib that is installed."""
    total = hashlib.sha256()
    for file in sorted([*folder.rglob("*.png"), *folder.rglob("*.txt")]):
        total.update(file.relative_to(folder).as_posix().encode())
        total.update(np.asarray(Image.open(file)).tobytes() if file.suffix == ".png" else file.read_bytes())
    return total.hexdigest()


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def scenes() -> list[tuple[np.ndarray, list[shapes_detection.Thing]]]:
    return [scene(96, 3, 0, index) for index in range(80)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("shapes") / "set", train=30, val=10, size=64).parent


def rows(folder: Path) -> list[np.ndarray]:
    """One array (objects, 5) per label file."""
    return [
        np.array([line.split() for line in file.read_text().splitlines()], dtype=float).reshape(-1, 5)
        for file in sorted(folder.glob("labels/*/*.txt"))
    ]


def test_the_same_arguments_give_the_same_bits(tmp_path):
    first, second = (make(tmp_path / name, **TINY).parent for name in ("a", "b"))
    assert digest(first) == digest(second) == GOLDEN


def test_another_seed_gives_another_set(tmp_path):
    first, second = (make(tmp_path / str(seed), **{**TINY, "seed": seed}).parent for seed in (7, 8))
    assert digest(first) != digest(second)


def test_an_image_does_not_depend_on_how_many_there_are(tmp_path):
    few = make(tmp_path / "few", train=2, val=1, size=48, seed=7).parent
    many = make(tmp_path / "many", **TINY).parent
    for file in [*few.glob("images/*/*.png"), *few.glob("labels/*/*.txt")]:
        assert file.read_bytes() == (many / file.relative_to(few)).read_bytes()


def test_train_and_val_share_no_image(made):
    train, val = ({file.read_bytes() for file in made.glob(f"images/{split}/*.png")} for split in ("train", "val"))
    assert (len(train), len(val)) == (30, 10)
    assert not train & val


def test_layout_is_what_yolo_reads(made):
    page = yaml.safe_load((made / "data.yaml").read_text())
    assert set(page) == {"train", "val", "names", "made_with"}
    assert page["names"] == dict(enumerate(CLASSES))
    for split in ("train", "val"):
        images = sorted((made / page[split]).glob("*.png"))
        labels = sorted((made / page[split].replace("images", "labels")).glob("*.txt"))
        assert [file.stem for file in images] == [file.stem for file in labels]
    with Image.open(images[0]) as image:
        assert (image.mode, image.size) == ("RGB", (64, 64))
    assert not list(made.glob("*.tmp"))


def test_labels_are_what_the_scene_says(made):
    things = scene(64, 0, 0, 5)[1]
    labels = rows(made)[5]
    assert len(things) == len(labels) > 0
    for (kind, (left, top, right, bottom), _), (named, x, y, width, height) in zip(things, labels, strict=True):
        assert kind == named
        edges = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
        assert np.array(edges) * 64 * FINE == pytest.approx([left, top, right, bottom], abs=1e-3)


def test_labels_are_normalized_and_every_class_appears(made):
    labels = np.concatenate(rows(made))
    assert set(labels[:, 0]) == {0, 1, 2}
    middle, half = labels[:, 1:3], labels[:, 3:] / 2
    assert (half > 0).all()
    assert (middle - half >= 0).all()
    assert (middle + half <= 1).all()
    for line in "".join(file.read_text() for file in made.glob("labels/*/*.txt")).splitlines():
        assert re.fullmatch(r"[012]( [01]\.\d{6}){4}", line)


def test_up_to_eight_objects_and_a_few_images_without():
    counts = np.array([len(scene(32, 0, 0, index)[1]) for index in range(200)])
    assert set(counts) == set(range(9)) - {1}
    assert 0.01 < (counts == 0).mean() < 0.1


def test_sizes_run_from_small_to_medium(scenes):
    spans = [max(box[2] - box[0], box[3] - box[1]) / (96 * FINE) for _, things in scenes for _, box, _ in things]
    assert 0.11 < min(spans) < 0.13
    assert 0.4 < max(spans) < 0.46


def test_a_box_is_tight_around_the_painted_pixels(scenes):
    for _, things in scenes[:40]:
        for thing in things:
            canvas = np.full((96, 96, 3), 128.0)
            shapes_detection._paint(np.random.default_rng(0), canvas, thing)
            painted = (canvas != 128).any(axis=2)
            columns, lines = np.flatnonzero(painted.any(axis=0)), np.flatnonzero(painted.any(axis=1))
            left, top, right, bottom = thing.box
            assert (columns[0], lines[0]) == (left // FINE, top // FINE)
            assert (columns[-1], lines[-1]) == ((right - 1) // FINE, (bottom - 1) // FINE)


@pytest.mark.parametrize(("kind", "share"), [(0, np.pi / 4), (1, 1.0), (2, 3**0.5 / 4)])
def test_a_shape_has_the_area_of_its_formula(kind, share):
    """With one side along the box, so that the span is that side."""
    upright = np.pi / 4 if kind == 1 else np.pi / 2
    stencil = shapes_detection._stencil(kind, 200.0, upright)
    assert max(stencil.shape) == pytest.approx(200, abs=2)
    assert stencil.sum() / 200**2 == pytest.approx(share, rel=0.03)


@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("angle", [0.0, 0.4, 1.1, 2.9])
def test_a_turned_shape_is_whole_and_its_box_has_the_span(kind, angle):
    stencil = shapes_detection._stencil(kind, 90.0, angle)
    assert max(stencil.shape) == pytest.approx(90, abs=2)
    for edge in (stencil[0], stencil[-1], stencil[:, 0], stencil[:, -1]):
        assert edge.any()


def test_no_box_is_covered_by_more_than_the_limit(scenes):
    most = 0.0
    for _, things in scenes:
        for one in range(len(things)):
            cover = np.zeros((96 * FINE, 96 * FINE), dtype=bool)
            for other, (_, (left, top, right, bottom), _) in enumerate(things):
                if other != one:
                    cover[top:bottom, left:right] = True
            left, top, right, bottom = things[one].box
            most = max(most, cover[top:bottom, left:right].mean())
    assert 0.1 < most <= 0.3  # some do overlap


def test_objects_stand_out(scenes):
    """The middle of an object against the four pixels just outside of its box, clutter and noise aside."""
    seen = []
    for pixels, things in scenes:
        for _, (left, top, right, bottom), stencil in things[-1:]:  # the last one lies on top
            y, x = np.argwhere(stencil).mean(axis=0)
            inside = pixels[int(top + y) // FINE, int(left + x) // FINE].astype(float)
            around = pixels[[top // FINE - 1, -(-bottom // FINE)], [left // FINE - 1, -(-right // FINE)]]
            seen.append(np.abs(inside - around).sum(axis=1).min() > 40)
    assert np.mean(seen) > 0.9


def test_a_second_make_touches_nothing(tmp_path):
    file = make(tmp_path / "set", **TINY)
    picture = next(file.parent.rglob("*.png"))
    picture.write_bytes(b"not made again")
    assert make(tmp_path / "set", **TINY) == file
    assert picture.read_bytes() == b"not made again"


@pytest.mark.parametrize("name", ["train", "val", "size", "seed"])
def test_other_arguments_are_refused(tmp_path, name):
    folder = tmp_path / "set"
    make(folder, **TINY)
    before = everything(folder)
    with pytest.raises(
        ValueError, match=rf"set: holds another set, got '.*{name}: {TINY[name]}.*'; choose another folder"
    ):
        make(folder, **{**TINY, name: TINY[name] + 1})
    assert everything(folder) == before


def test_a_set_of_an_older_version_is_refused(tmp_path, monkeypatch):
    make(tmp_path, **TINY)
    monkeypatch.setattr(shapes_detection, "VERSION", shapes_detection.VERSION + 1)
    with pytest.raises(ValueError, match=r"holds another set, got '.*version: 1}'"):
        make(tmp_path, **TINY)


@pytest.mark.parametrize(
    ("name", "got"),
    [
        ("data.yaml", "a data.yaml without made_with"),
        ("notes.txt", "'notes.txt'"),
        ("images/train/0001.png", "'images/train/0001.png'"),
        ("labels/test/shapes-00000.txt", "'labels/test'"),
    ],
)
def test_a_folder_of_somebody_else_is_refused(tmp_path, name, got):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine\n")
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}: holds .*, got {got}; choose"):
        make(tmp_path, **TINY)
    assert everything(tmp_path) == {str(tmp_path / name): b"mine\n"}


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "set").write_text("mine")
    with pytest.raises(ValueError, match="set: is not a folder, got a file; choose another folder"):
        make(tmp_path / "set", **TINY)


def test_a_killed_run_is_made_again(tmp_path, monkeypatch):
    write, calls = shapes_detection._write, []

    def killed(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        write(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shapes_detection, "_write", killed)
        make(tmp_path, **{**TINY, "seed": 9, "train": 40})
    assert not (tmp_path / "data.yaml").exists()
    assert (tmp_path / "images/train/shapes-00002.png").exists()
    # Leftovers of more images, of the last step, and of Ultralytics must not survive in the new set.
    for name in ("images/train/shapes-00039.png", "labels/val.cache", "data.yaml.tmp"):
        (tmp_path / name).write_bytes(b"half")
    make(tmp_path, **TINY)
    assert digest(tmp_path) == GOLDEN
    assert not [*tmp_path.rglob("*.cache"), *tmp_path.rglob("*.tmp")]


def test_the_cache_of_ultralytics_is_no_reason_to_refuse(tmp_path):
    make(tmp_path, **TINY)
    (tmp_path / "labels/train.cache").write_bytes(b"cache")
    assert make(tmp_path, **TINY) == tmp_path / "data.yaml"


@pytest.mark.parametrize(("name", "value"), [("train", 0), ("val", 0), ("size", 31), ("seed", -1), ("size", 64.5)])
def test_bad_numbers_are_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=rf"^{name}: out of range, got {value}; give a whole number of -?\d+ or more$"):
        make(tmp_path / "set", **{**TINY, name: value})
    assert not (tmp_path / "set").exists()


def test_the_command_prints_one_line(tmp_path, capsys):
    folder = tmp_path / "set"
    command = ["--output", str(folder), "--train", "3", "--val", "2", "--size", "40", "--seed", "1"]
    main(command)
    objects = sum(len(one) for one in rows(folder))
    said = f"{folder}/data.yaml: 3 train and 2 val images of 40 px, 3 classes ({objects} objects, seed 1), "
    assert re.fullmatch(re.escape(said) + r"\d+\.\d s\n", capsys.readouterr().out)
    main(command)
    assert capsys.readouterr().out == said + "already there\n"


@pytest.mark.parametrize(
    ("option", "value", "line"),
    [
        ("--size", "31", "size: out of range, got 31; give a whole number of 32 or more"),
        ("--train", "0", "train: out of range, got 0; give a whole number of 1 or more"),
        ("--val", "many", "argument --val: invalid int value: 'many'"),
    ],
)
def test_the_command_says_what_is_wrong_with_a_number(tmp_path, capsys, option, value, line):
    with pytest.raises(SystemExit) as stopped:
        main(["--output", str(tmp_path / "set"), option, value])
    assert stopped.value.code == 2
    assert capsys.readouterr() == ("", line + "\n")


def test_the_command_says_when_it_cannot_write(tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit):
        main(["--output", str(tmp_path / "file/set")])
    assert re.fullmatch(r".*file/set: cannot be written, got .*; choose another folder\n", capsys.readouterr().err)


def test_the_script_runs_by_itself(tmp_path):
    """Without pruning_core or torch beside it, and with an exit code that a Makefile sees."""
    script = [sys.executable, str(ROOT / "data/shapes_detection.py"), "--output", str(tmp_path / "set"), "--size", "3"]
    done = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "size: out of range, got 3; give a whole number of 32 or more\n"
