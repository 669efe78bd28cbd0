"""``--data``: the yaml of a YOLO data set, and batches whose content depends on the seed and their place alone."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from apps.common.errors import BadInput
from apps.common.ranks import Ranks
from apps.common.yaml_file import read_yaml
from apps.yolov5.ultralytics_adapter import Images, collate

GET_DATA = "nothing is downloaded: fetch the set yourself, or make one with python data/shapes_detection.py"


@dataclass(frozen=True)
class DataSet:
    train: list[str]
    val: list[str]
    names: dict[int, str]


def read_data(path: str) -> DataSet:
    """``train``, ``val`` (a folder, a text file of images, or a list of them) and ``names`` of a data yaml."""
    shape = {"expected": "'train:', 'val:' and 'names:'", "example": "data/shapes_detection.py makes one"}
    content = read_yaml(path, option="--data", missing=GET_DATA, **shape)
    folder = Path(path).resolve().parent
    root = str(content.get("path") or "")
    bases = [folder / root, Path(root).resolve()] if root else [folder]
    splits = {split: _places(path, content, split, bases) for split in ("train", "val")}
    return DataSet(splits["train"], splits["val"], _names(path, content))


def _places(path: str, content: dict[str, Any], split: str, bases: list[Path]) -> list[str]:
    given = content.get(split, content.get("validation") if split == "val" else None)
    if not given:
        raise BadInput(f"--data: has no '{split}:', got {path!r}; name the folder of the {split} images")
    found = []
    for each in given if isinstance(given, list) else [given]:
        places = [base / str(each) for base in bases]
        place = next((place for place in places if place.exists()), None)
        if place is None:
            raise BadInput(f"--data: {split}: no such folder or file, got {str(places[0])!r}; {GET_DATA}")
        found.append(str(place.resolve()))
    return found


def _names(path: str, content: dict[str, Any]) -> dict[int, str]:
    names, count = content.get("names"), content.get("nc")
    if names is None and isinstance(count, int) and count > 0:
        names = [f"class{i}" for i in range(count)]
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names:
        raise BadInput(f"--data: has no 'names:', got {path!r}; list the classes, as names: [cat, dog]")
    if set(names) != set(range(len(names))):
        raise BadInput(f"--data: names: must be numbered from 0 without gaps, got {list(names)}")
    if count is not None and count != len(names):
        raise BadInput(f"--data: nc: {len(names)} names are given, got {count}; leave nc out")
    return {i: str(names[i]) for i in range(len(names))}


class _Seeded(Dataset):
    """Item (seed, i): image i, augmented by generators that start at ``seed``. No matter which worker makes it."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: tuple[int, int]) -> dict[str, Any]:
        seed, index = place
        random.seed(seed)
        np.random.seed(seed)
        return self.images[index]


class TrainBatches:
    """Shuffled by (seed, epoch); every rank gets as many batches; a resumed epoch can begin at any of them."""

    def __init__(self, images: Images, batch: int, workers: int, ranks: Ranks, seed: int) -> None:
        self.images, self.batch, self.workers, self.ranks, self.seed = images, batch, workers, ranks, seed

    def __len__(self) -> int:
        share = math.ceil(len(self.images) / self.ranks.size)
        return math.ceil(share / self.batch)

    def epoch(self, epoch: int, first: int = 0) -> DataLoader:
        """The batches of one epoch from number ``first`` on. Workers live as long as the epoch."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.images))
        share = math.ceil(len(order) / self.ranks.size)
        order = np.resize(order, share * self.ranks.size)[self.ranks.rank :: self.ranks.size]
        places = [(_mix(self.seed, epoch, self.ranks.rank, k), int(i)) for k, i in enumerate(order)]
        batches = [places[i : i + self.batch] for i in range(0, len(places), self.batch)]
        return _loader(_Seeded(self.images), batches[first:], self.workers, self.ranks.device)


def _mix(*numbers: int) -> int:
    """One 32-bit seed that differs for every tuple."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class ValBatches:
    """This rank's batches of the validation images, each image once over all ranks."""

    def __init__(self, images: Images, workers: int, ranks: Ranks) -> None:
        batches = [np.flatnonzero(images.batch == i).tolist() for i in range(images.batch[-1] + 1)]
        mine = [[(0, i) for i in batch] for batch in batches[ranks.rank :: ranks.size]]
        self.dataset = images
        self._loader = _loader(_Seeded(images), mine, workers, ranks.device)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._loader)

    def __len__(self) -> int:
        return len(self._loader)


def _loader(dataset: Dataset, batches: list[list[tuple[int, int]]], workers: int, device: torch.device) -> DataLoader:
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=min(workers, len(batches)),
        collate_fn=collate,
        pin_memory=device.type == "cuda",
        generator=torch.Generator().manual_seed(0),  # workers' own seeds are not used; the global generator stays put
    )


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    batch = {
        name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }
    batch["img"] = batch["img"].float() / 255
    return batch
