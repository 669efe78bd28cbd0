"""``--data``: what a data yaml may say, batches that depend on the seed alone, and images that are no surprise."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from apps.common.errors import BadInput
from apps.common.ranks import Ranks
from apps.yolov5 import ultralytics_adapter as adapter
from apps.yolov5.data_set import TrainBatches, ValBatches, read_data, to_device
from data.shapes_detection import make

NAMES = {0: "circle", 1: "square", 2: "triangle"}
REST = "val: images/val\nnames: [a, b, c]\n"


def ranks_of(size: int) -> list[Ranks]:
    return [Ranks(rank=rank, size=size, local=rank, device=torch.device("cpu")) for rank in range(size)]


ONE = ranks_of(1)[0]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set that no test changes."""
    return make(tmp_path_factory.mktemp("shapes") / "set", train=10, val=5, size=64).parent


@pytest.fixture
def folder(tmp_path: Path, shared: Path) -> Path:
    """A data set of its own."""
    return Path(shutil.copytree(shared, tmp_path / "set"))


def images(folder: Path, split: str = "train", cache: bool = False, batch: int = 2) -> adapter.Images:
    data = read_data(str(folder / "data.yaml"))
    kind = {"names": data.names, "hyp": adapter.hyperparameters({"imgsz": 64}), "size": 64, "stride": 32}
    return adapter.images(getattr(data, split), split=split, batch=batch, cache=cache, **kind)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- the data yaml --------------------------------------------------------------------------------------------------


@pytest.fixture
def write(folder):
    def yaml_file(text: str | bytes) -> str:
        path = folder / "data.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return yaml_file


def test_folders_and_names(write, folder):
    data = read_data(write("train: images/train\nval: images/val\nnames: {0: circle, 1: square, 2: triangle}\n"))
    assert data.train == [str(folder / "images/train")]
    assert data.val == [str(folder / "images/val")]
    assert data.names == NAMES


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("names: [a, b]", {0: "a", 1: "b"}),
        ("names: {1: b, 0: a}", {0: "a", 1: "b"}),
        ("names: [a, b]\nnc: 2", {0: "a", 1: "b"}),
        ("nc: 2", {0: "class0", 1: "class1"}),
        ("names: [1, 2.5]", {0: "1", 1: "2.5"}),
    ],
)
def test_the_spellings_of_names(write, names, expected):
    assert read_data(write(f"train: images/train\nval: images/val\n{names}\n")).names == expected


@pytest.mark.parametrize("key", ["val", "validation"])
def test_the_spellings_of_val(write, folder, key):
    assert read_data(write(f"train: images/train\n{key}: images/val\nnc: 3\n")).val == [str(folder / "images/val")]


def test_a_split_may_be_a_list_or_a_file(write, folder):
    (folder / "some.txt").write_text("./images/train/shapes-00003.png\n./images/train/shapes-00001.png\n")
    data = read_data(write("train: [images/train, some.txt]\nval: some.txt\nnc: 3\n"))
    assert data.train == [str(folder / "images/train"), str(folder / "some.txt")]
    assert data.val == [str(folder / "some.txt")]
    assert len(images(folder)) == 12
    assert [Path(file).name for file in images(folder, "val").im_files] == ["shapes-00001.png", "shapes-00003.png"]


@pytest.mark.parametrize("kind", ["absolute", "beside the yaml", "below the current folder", "absolute split", "none"])
def test_where_paths_begin(write, folder, monkeypatch, tmp_path, kind):
    monkeypatch.chdir(tmp_path)
    path = {"absolute": f"path: {folder}\n", "beside the yaml": "path: images\n", "none": ""}
    path |= {"below the current folder": "path: set\n", "absolute split": "path: /nowhere\n"}
    places = {"beside the yaml": "", "absolute split": f"{folder}/images/"}
    place = places.get(kind, "images/")
    data = read_data(write(f"{path[kind]}train: {place}train\nval: {place}val\nnc: 3\n"))
    assert data.train == [str(folder / "images/train")]
    assert data.val == [str(folder / "images/val")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (REST, r"has no 'train:', got '.*data.yaml'; name the folder of the train images"),
        ("train: images/train\nnc: 3", r"has no 'val:', got '.*data.yaml'; name the folder of the val images"),
        (f"train:\n{REST}", r"has no 'train:', got .*"),
        (f"train: []\n{REST}", r"has no 'train:', got .*"),
        (f"train: images/nowhere\n{REST}", r"train: no such folder or file, got '.*/images/nowhere'; nothing is .*"),
        (f"train: [images/train, 3]\n{REST}", r"train: no such folder or file, got '.*/set/3'; .*"),
        (f"train: {{a: b}}\n{REST}", r"train: no such folder or file, got .*; .*"),
        (f"path: /nowhere\ntrain: images/train\n{REST}", r"train: .*, got '/nowhere/images/train'; .*"),
        (f"path: nowhere\ntrain: images/train\n{REST}", r"train: .*, got '.*/set/nowhere/images/train'; .*"),
        (f"path: 3\ntrain: images/train\n{REST}", r"train: .*, got '.*/set/3/images/train'; .*"),
        (f"path: [a]\ntrain: images/train\n{REST}", r"train: no such folder or file, got .*; .*"),
        ("train: images/train\nval: images/val", r"has no 'names:', got .*; list the classes, as names: \[cat, dog\]"),
        ("train: images/train\nval: images/val\nnames: []", r"has no 'names:', got .*"),
        ("train: images/train\nval: images/val\nnames: cat", r"has no 'names:', got .*"),
        ("train: images/train\nval: images/val\nnc: 0", r"has no 'names:', got .*"),
        ("train: images/train\nval: images/val\nnc: many", r"has no 'names:', got .*"),
        (
            "train: images/train\nval: images/val\nnames: {1: a, 2: b}",
            r"names: must be numbered from 0 without gaps, got \[1, 2\]",
        ),
        ("train: images/train\nval: images/val\nnames: {a: 0, 1: b}", r"names: must be .*, got \['a', 1\]"),
        ("train: images/train\nval: images/val\nnames: {null: a}", r"names: must be .*, got \[None\]"),
        (f"train: images/train\nnc: 4\n{REST}", r"nc: 3 names are given, got 4; leave nc out"),
        (f"train: images/train\nnc: '3'\n{REST}", r"nc: 3 names are given, got 3; leave nc out"),
        ("- train", r"must hold 'train:', 'val:' and 'names:', got '.*data.yaml'; data/shapes_detection.py makes one"),
        ("", r"must hold 'train:', 'val:' and 'names:', got '.*data.yaml'; data/shapes_detection.py makes one"),
        ("train: [", r"not a yaml file \(.*\), got '.*data.yaml'"),
        ("train: !!python/name:os.system", r"not a yaml file \(.*\), got '.*data.yaml'"),
        ("train: 2024-99-99", r"not a yaml file \(.*\), got '.*data.yaml'"),
        ("[" * 3000, r"not a yaml file \(.*\), got '.*data.yaml'"),
        (b"\xff\xfe\x00", r"not a yaml file \(.*\), got '.*data.yaml'"),
    ],
)
def test_what_is_no_data_yaml(write, text, message):
    with pytest.raises(BadInput) as caught:
        read_data(write(text))
    assert re.fullmatch("--data: " + message, str(caught.value))


def test_no_data_yaml(tmp_path):
    with pytest.raises(BadInput, match=r"^--data: no such file, got '.*no.yaml'; nothing is downloaded: .*$"):
        read_data(str(tmp_path / "no.yaml"))
    with pytest.raises(BadInput, match=r"^--data: not a yaml file \(.*\), got '.*'$"):
        read_data(str(tmp_path))


# ---- batches --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def training(shared: Path) -> adapter.Images:
    return images(shared)


def pixels(batches) -> list[torch.Tensor]:
    return [batch["img"] for batch in batches]


def files(batches) -> list[list[str]]:
    return [[Path(file).name for file in batch["im_file"]] for batch in batches]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 12])
@pytest.mark.parametrize("batch", [1, 3, 16])
def test_every_image_at_least_once_and_as_many_batches_on_every_rank(training, size, batch):
    all_batches = [TrainBatches(training, batch, 0, ranks, seed=1) for ranks in ranks_of(size)]
    seen = [files(batches.epoch(0)) for batches in all_batches]
    assert {len(batches) for batches in all_batches} == {len(each) for each in seen} == {len(seen[0])}
    assert [[len(each) for each in rank] for rank in seen] == [[len(each) for each in seen[0]]] * size
    count = Counter(file for rank in seen for each in rank for file in each)
    assert len(count) == 10
    assert max(count.values()) <= -(-size // 10) + 1


def test_the_same_seed_gives_the_same_bits_and_leaves_the_generator_alone(training, shared):
    batches = TrainBatches(training, 4, 0, ONE, seed=3)
    before = torch.random.get_rng_state()
    first = list(batches.epoch(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    for again in (batches, TrainBatches(images(shared), 4, 0, ONE, seed=3)):
        second = list(again.epoch(2))
        assert same(pixels(first), pixels(second))
        for name in ("cls", "bboxes", "batch_idx"):
            assert same([batch[name] for batch in first], [batch[name] for batch in second])


def test_other_epochs_seeds_and_ranks_give_others(training):
    def order(epoch: int, seed: int, ranks: Ranks = ONE) -> list[list[str]]:
        return files(TrainBatches(training, 4, 0, ranks, seed).epoch(epoch))

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(1, 0)
    assert order(0, 0) != order(0, 1)
    assert order(1, 0) != order(0, 1)
    first, second = ({file for each in order(0, 0, ranks) for file in each} for ranks in ranks_of(2))
    assert not first & second


def test_an_image_is_augmented_anew_each_time(training):
    """Twelve ranks see ten images, so some are seen twice."""
    seen = [next(iter(TrainBatches(training, 1, 0, ranks, 0).epoch(0))) for ranks in ranks_of(12)]
    twice = [batch for batch in seen if batch["im_file"] == seen[0]["im_file"]]
    assert len(twice) == 2
    assert not torch.equal(twice[0]["img"], twice[1]["img"])


@pytest.mark.parametrize("mosaic", [True, False])
@pytest.mark.parametrize("first", [0, 1, 3, 5])
def test_an_epoch_can_begin_at_any_batch(shared, mosaic, first):
    dataset = images(shared)
    if not mosaic:
        adapter.close_mosaic(dataset, adapter.hyperparameters({"imgsz": 64}))
    batches = TrainBatches(dataset, 2, 0, ranks_of(2)[1], seed=0)
    whole = pixels(batches.epoch(1))
    assert len(whole) == len(batches) == 3
    assert same(pixels(batches.epoch(1, first=first)), whole[first:])


@pytest.mark.slow
def test_workers_and_the_cache_change_no_pixel(training, shared):
    expected = pixels(TrainBatches(training, 2, 0, ONE, seed=0).epoch(0))
    assert same(pixels(TrainBatches(training, 2, 2, ONE, seed=0).epoch(0)), expected)
    assert same(pixels(TrainBatches(training, 2, 2, ONE, seed=0).epoch(0, first=3)), expected[3:])
    assert same(pixels(TrainBatches(images(shared, cache=True), 2, 0, ONE, seed=0).epoch(0)), expected)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("batch", [1, 2, 16])
def test_every_validation_image_exactly_once(shared, size, batch):
    validation = images(shared, "val", batch=batch)
    seen = [files(ValBatches(validation, 0, ranks)) for ranks in ranks_of(size)]
    names = [file for rank in seen for each in rank for file in each]
    assert sorted(names) == [f"shapes-{i:05d}.png" for i in range(5)]


def test_validation_images_are_always_the_same(shared):
    one, two = (list(ValBatches(images(shared, "val"), 0, ONE)) for _ in range(2))
    assert same(pixels(one), pixels(two))
    assert len(ValBatches(images(shared, "val"), 0, ONE)) == len(one) == 3


def test_on_the_device_pixels_are_floats_from_0_to_1(training):
    batch = next(iter(TrainBatches(training, 2, 0, ONE, 0).epoch(0)))
    moved = to_device(batch, torch.device("cpu"))
    assert moved["img"].dtype == torch.float32
    assert 0 <= moved["img"].min() < 0.5 < moved["img"].max() <= 1
    assert batch["img"].dtype == torch.uint8
    assert moved["im_file"] == batch["im_file"]


# ---- images ---------------------------------------------------------------------------------------------------------

LABEL, IMAGE = "labels/train/shapes-00003.txt", "images/train/shapes-00003.png"


def mistake(folder: Path, split: str = "train") -> str:
    with pytest.raises(BadInput) as caught:
        images(folder, split)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"--data: {split}: ")
    return message


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        ("3 .5 .5 .1 .1", r"Label class 3 exceeds dataset class count 3.*"),
        ("-1 .5 .5 .1 .1", r"negative label values \[ ?-1\.?\]"),
        ("0.5 .5 .5 .1 .1", r"non-integer class labels \[ ?0\.5\]"),
        ("1 1.5 .5 .1 .1", r"non-normalized or out of bounds coordinates \[ ?1\.5\]"),
        ("1 .5 -.5 .1 .1", r"negative label values \[ ?-0\.5\]"),
        ("1 nan .5 .1 .1", r"non-normalized or out of bounds coordinates .*"),
        ("1 .5 .5 .1", r"labels require 5 columns, 4 columns detected"),
        ("1 .5 .5 .1 .1 .9", r"labels require 5 columns, 6 columns detected"),
        ("1 .5 .5 .1 .1\n1 .5 .5", r".*"),
        ("cat .5 .5 .1 .1", r"could not convert string to float: 'cat'"),
    ],
)
def test_a_bad_label_is_an_error_that_names_the_image(folder, label, reason):
    (folder / LABEL).write_text(label)
    do = "mend or remove the image and its label"
    assert re.fullmatch(rf"--data: train: {reason}, got {folder / IMAGE}; {do}", mistake(folder))


def test_several_bad_labels_are_counted(folder):
    for number in (2, 5, 7):
        (folder / f"labels/train/shapes-{number:05d}.txt").write_text("9 .5 .5 .1 .1")
    assert re.search(r", got \S+/shapes-00002.png \(and 2 more\); mend", mistake(folder))


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # upstream's check leaves it open
@pytest.mark.parametrize("damage", ["cut", "a byte", "text", "empty", "small", "missing"])
def test_a_bad_image_is_an_error_that_names_it(folder, damage):
    image = folder / IMAGE
    content = bytearray(image.read_bytes())
    content[len(content) // 2] ^= 0xFF
    if damage == "small":
        Image.new("RGB", (5, 5)).save(image)
    elif damage == "missing":
        (folder / "list.txt").write_text("./images/train/shapes-00003.png\n./images/train/shapes-00001.png\n")
        (folder / "data.yaml").write_text(f"train: list.txt\n{REST}")
        image.unlink()
    else:
        image.write_bytes({"cut": content[:3000], "a byte": bytes(content), "text": b"hello", "empty": b""}[damage])
    message = mistake(folder)
    assert message.endswith(f", got {image}; mend or remove the image and its label")
    assert "No module named" not in message  # the file is at fault, not the installation


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("what", ["empty folder", "no image in it", "empty list", "a list that is no text"])
def test_a_split_without_images_is_an_error_that_names_it(folder, split, what):
    place = folder / f"images/{split}"
    if "list" in what:
        place = folder / "list.txt"
        place.write_bytes(b"" if what == "empty list" else b"\xff\xfe\x00")
        splits = {"train": "images/train", "val": "images/val", split: "list.txt"}
        (folder / "data.yaml").write_text(f"train: {splits['train']}\nval: {splits['val']}\nnc: 3\n")
    else:
        for file in place.iterdir():
            file.unlink()
        if what == "no image in it":
            (place / "readme.md").touch()
    assert str(place) in mistake(folder, split)


def test_training_images_without_any_label_are_an_error(folder):
    shutil.rmtree(folder / "labels/train")
    assert mistake(folder) == f"--data: train: no labels, got {folder / 'labels/train'}; " + (
        "labels lie beside images, in labels/"
    )


def test_a_few_images_without_labels_are_background(folder):
    (folder / LABEL).unlink()
    (folder / "labels/train/shapes-00004.txt").write_text("")
    counts = [len(label["cls"]) for label in images(folder).labels]
    assert len(counts) == 10
    assert counts[3:5] == [0, 0]


@pytest.mark.parametrize("split", ["train", "val"])
def test_nothing_is_written_next_to_the_data(folder, split):
    (folder / "images/train/shapes-00002.npy").write_text("somebody's own file")
    before = everything(folder)
    dataset = images(folder, split)
    batches = TrainBatches(dataset, 4, 0, ONE, 0).epoch(0) if split == "train" else ValBatches(dataset, 0, ONE)
    assert len(files(batches)) == 3
    assert everything(folder) == before


def test_only_images_are_read_as_images(folder):
    """Upstream takes a .npy file beside an image for its pixels."""
    expected = images(folder).load_image(2)[0]
    np.save(folder / "images/train/shapes-00002.npy", np.zeros_like(expected))
    assert np.array_equal(images(folder).load_image(2)[0], expected)


def test_a_photo_with_bytes_behind_its_end_stays_as_it_is(folder):
    """Some cameras write them, and upstream "restores" such a file with another compression."""
    photo = folder / "images/train/shapes-00003.jpg"
    Image.open(folder / IMAGE).convert("RGB").save(photo, quality=80)
    (folder / IMAGE).unlink()
    photo.write_bytes(photo.read_bytes() + b"behind the end")
    before = everything(folder)
    try:
        images(folder)
    except BadInput as error:
        assert str(photo) in str(error)
    assert everything(folder) == before
