"""Everything that this app takes from ultralytics, and nothing else imports it. ultralytics is AGPL-3.0.

Model, data set, loss, moving average and metrics come from there. Pinned to the range in ``SUPPORTED``;
``tests/apps/yolov5/test_adapter.py`` is the contract: it fails when that package moves under us.
"""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy, deepcopy
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

# Read once, at import: no network, no telemetry, no package is installed, no pickled code is run.
os.environ.setdefault("YOLO_OFFLINE", "true")
os.environ.setdefault("YOLO_AUTOINSTALL", "false")
os.environ.setdefault("ULTRALYTICS_SKIP_REQUIREMENTS_CHECKS", "1")
os.environ.setdefault("ULTRALYTICS_SAFE_LOAD", "true")
os.environ.setdefault("YOLO_VERBOSE", "false")

import torch
from torch import Tensor, nn
from ultralytics.cfg import get_cfg
from ultralytics.data import utils as data_utils
from ultralytics.data.dataset import YOLODataset
from ultralytics.models.yolo.detect import DetectionTrainer, DetectionValidator
from ultralytics.nn import tasks
from ultralytics.nn.modules import Detect
from ultralytics.nn.tasks import DetectionModel, guess_model_scale, load_checkpoint, torch_safe_load
from ultralytics.utils import LOGGER, YAML, downloads, nms
from ultralytics.utils.torch_utils import ModelEMA

from apps.common.errors import BadInput
from pruning_core import Detections, apply_structure, structure
from pruning_core.checkpoint import write_atomically

LOGGER.setLevel("ERROR")
tasks.SAFE_LOAD = True  # also where upstream was imported before this file, or the environment says otherwise


def _only_decode(file: str, write: Any) -> None:
    """Upstream rewrites a JPEG that does not end as usual, in place. Here it is decoded, and stays as it is."""
    write(io.BytesIO())


data_utils._replace_image = _only_decode

SUPPORTED = ("8.4.185", "8.5")
"""The lowest version tested, and the first one that is not."""

Model: TypeAlias = DetectionModel
Trainer: TypeAlias = DetectionTrainer
Ema: TypeAlias = ModelEMA
SCALES = "nsmlx"
SECONDS_PER_IMAGE = 1e6
"""Upstream's non-maximum suppression drops the images that are left when its time is up. Here it takes its time."""


def check_version() -> None:
    installed = version("ultralytics")
    low, high = (tuple(int(part) for part in bound.split(".")) for bound in SUPPORTED)
    here = tuple(int(part) for part in re.findall(r"\d+", installed)[:3])
    if not low <= here < high:
        do = f"pip install 'ultralytics>={SUPPORTED[0]},<{SUPPORTED[1]}'"
        raise BadInput(f"ultralytics: this version was never tested here, got {installed}; {do}")


# ---- models ---------------------------------------------------------------------------------------------------------


def architecture(name: str) -> str:
    """``yolov5s``, ``yolov5s6``, ``yolov5s-p6.yaml`` ... -> today's upstream name; other ``.yaml`` files as given."""
    known = re.fullmatch(rf"yolov5([{SCALES}])(6|-p6)?u?(\.yaml|\.yml)?", Path(name).name)
    if known and not Path(name).is_file():
        return f"yolov5{known[1]}{'-p6' if known[2] else ''}.yaml"
    if name.endswith((".yaml", ".yml")) and Path(name).is_file():
        return name
    kinds = ", ".join(f"yolov5{scale}" for scale in SCALES)
    raise BadInput(f"--cfg: no such model, got {name!r}; use {kinds}, each also as yolov5s6, or a model yaml")


def new_model(name: str | dict[str, Any], names: dict[int, str]) -> Model:
    """A fresh model of an architecture (its name, or the ``model.yaml`` of another model)."""
    config = architecture(name) if isinstance(name, str) else deepcopy(name)
    try:
        if isinstance(config, str) and Path(config).is_file():  # upstream reads yolov5s6.yaml as yolov5s-p6.yaml
            config = {**YAML.load(config), "scale": guess_model_scale(config), "yaml_file": config}
        model = DetectionModel(config, nc=len(names), verbose=False)
    except Exception as error:  # a wrong yaml leads upstream to errors of many types
        reason = " ".join(str(error).split())
        raise BadInput(f"--cfg: upstream cannot build it ({reason}), got {name}; see yolov5n.yaml") from error
    if not isinstance(model.model[-1], Detect):
        raise BadInput(f"--cfg: its last layer must be Detect, got {name}; see yolov5n.yaml")
    return _dressed(model, names)


def checkpoint_file(path: str) -> str:
    """A checkpoint, or the best one in the folder of a run."""
    places = [Path(path) / name for name in ("weights/best.pt", "best.pt")]
    return str(next((place for place in places if place.is_file()), path))


def load_model(path: str | Path, option: str) -> Model:
    """The model inside an ultralytics checkpoint, in fp32. No pickled code is run."""
    if not Path(path).is_file():
        hint = "nothing is downloaded: give a checkpoint that you have"
        hint += ", or --cfg yolov5n to train from scratch" if option == "--weights" else ""
        raise BadInput(f"{option}: no such file, got {str(path)!r}; {hint}")
    if Path(path).suffix != ".pt":
        raise BadInput(f"{option}: must be a .pt checkpoint, got {str(path)!r}; use --cfg for a model yaml")
    try:
        with _names_as_given(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, _ = load_checkpoint(path)
    except Exception as error:  # a damaged file can raise anything
        reason = " ".join(str(error).split())[:160]
        do = "use a .pt of ultralytics 8 or of this app (old yolov5 repository files have another head)"
        raise BadInput(f"{option}: not an ultralytics model ({reason}), got {str(path)!r}; {do}") from error
    if not isinstance(model, DetectionModel):
        raise BadInput(f"{option}: must hold a detection model, got {type(model).__name__}; use a yolov5 checkpoint")
    return model


@contextmanager
def _names_as_given() -> Iterator[None]:
    """Upstream reads yolov5s.pt as yolov5su.pt, even where the first is there, and downloads the second."""
    theirs = downloads.attempt_download_asset
    downloads.attempt_download_asset = lambda file, **_: str(file)
    try:
        yield
    finally:
        downloads.attempt_download_asset = theirs


def trainable_copy(model: Model, names: dict[int, str]) -> Model:
    """A new model with the weights of a loaded one; loaded checkpoints may be fused or frozen."""
    fresh = slim_model(model.yaml, names, structure(model))
    fresh.load(model, verbose=False)
    return fresh


def slim_model(name: str | dict[str, Any], names: dict[int, str], cut: dict[str, Any] | None) -> Model:
    """A fresh model, cut as another one was; ``cut`` is None where that never happened."""
    model = new_model(name, names)
    if cut is not None:
        apply_structure(model, cut)
    return model


def _dressed(model: Model, names: dict[int, str]) -> Model:
    model.nc, model.names = len(names), dict(names)
    thaw(model)
    return model


def thaw(model: Model) -> None:
    """Checkpoints hold frozen averages; the bins' distances 0, 1, 2, ... alone are constants."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".dfl." not in name)


def class_names(model: Model) -> dict[int, str]:
    return {int(i): str(name) for i, name in dict(model.names).items()}


def head_of(model: Model) -> str:
    """The name of the detection head: ``model.24``, or ``model.33`` with P6."""
    return f"model.{len(model.model) - 1}"


def one_output_(model: Model) -> None:
    """Boxes and scores alone, as upstream exports them: without the maps that the loss reads."""
    head = model.model[-1]
    head.export, head.format, head.dynamic = True, "onnx", True  # dynamic: anchors do not depend on an earlier batch


def feature_channels(model: Model) -> list[int]:
    """Of the maps that the head reads, level by level."""
    return [branch[0].conv.in_channels for branch in model.model[-1].cv2]


def largest_stride(model: Model) -> int:
    return max(int(model.stride.max()), 32)


def hyperparameters(values: dict[str, Any]) -> SimpleNamespace:
    """Upstream's settings with these changed; the loss and the augmentations read them."""
    try:
        return get_cfg(overrides={"task": "detect", "mode": "train", **values})
    except (TypeError, ValueError, SyntaxError) as error:
        raise BadInput(f"--hyp: {' '.join(str(error).split())}; see ultralytics' default.yaml") from error


def criterion_of(model: Model, hyp: SimpleNamespace) -> Any:
    """(outputs, batch) -> (three losses times the batch size, their names and values)."""
    model.args = hyp
    return model.init_criterion()


def detections(outputs: Any) -> Detections:
    """The raw head outputs, of a model in training or in eval mode."""
    raw = outputs[1] if isinstance(outputs, tuple) else outputs
    return Detections(scores=raw["scores"], bins=raw["boxes"], features=tuple(raw["feats"]))


def save_model(model: Model, path: Path, *, arguments: dict[str, Any], metrics: dict[str, float], epoch: int) -> None:
    """A checkpoint that ``ultralytics.YOLO(path)`` loads: the whole module in fp16, as upstream writes it."""
    module = deepcopy(model).half().eval()
    module.criterion = None
    module.args = dict(arguments)
    for value in module.state_dict().values():
        if value.is_floating_point():
            torch.nan_to_num_(value)  # what fp16 cannot hold
    content = {
        "epoch": epoch,
        "model": module,
        "ema": None,
        "updates": None,
        "optimizer": None,
        "train_args": dict(arguments),
        "train_metrics": metrics,
        "date": datetime.now(UTC).isoformat(),
        "version": version("ultralytics"),
        "license": "AGPL-3.0 (https://ultralytics.com/license)",
    }
    write_atomically(path, lambda file: torch.save(content, file))


def content_of(path: Path) -> dict[str, Any]:
    """All of what ``save_model`` wrote."""
    with _names_as_given():
        return torch_safe_load(path)[0]


# ---- data -----------------------------------------------------------------------------------------------------------


class Images(YOLODataset):
    """Upstream's data set without its surprises: no pickled label cache is read or written, a bad image or label is an
    error and not a smaller data set, and mosaics draw from the whole set, so that an image is a function of its seed.
    """

    def __init__(self, *, split: str, keep: bool, **kwargs: Any) -> None:
        self.split = split
        super().__init__(**kwargs)
        # Upstream reads an .npy file beside an image in its place, and deletes it when it is damaged.
        self.npy_files = [Path(os.devnull, "none")] * self.ni
        if self.augment:
            self.cache = "ram"  # tells mosaic to draw from the whole set instead of what was loaded lately
            self.transforms = self.build_transforms(copy(kwargs["hyp"]))
        if keep:
            self.cache_images()

    @property
    def most_objects(self) -> int:
        """In one image: an evaluation that keeps fewer boxes cannot find them all."""
        return max(len(label["cls"]) for label in self.labels)

    def cache_images(self) -> None:
        with ThreadPool(min(8, os.cpu_count() or 1)) as pool:
            loaded = pool.map(self.load_image, range(self.ni))
        self.ims, self.im_hw0, self.im_hw = (list(column) for column in zip(*loaded, strict=True))

    def get_img_files(self, img_path: Any) -> list[str]:
        try:
            return super().get_img_files(img_path)
        except FileNotFoundError as error:
            do = "put images there, or name another folder"
            raise BadInput(f"--data: {self.split}: no images, got {', '.join(img_path)}; {do}") from error

    def get_labels(self) -> list[dict[str, Any]]:
        self.get_label_files()
        verify, rows = self.verify_args()
        with ThreadPool(min(8, os.cpu_count() or 1)) as pool:
            results = pool.map(verify, rows)
        bad = [(file, result[-1]) for file, result in zip(self.im_files, results, strict=True) if result[0] is None]
        if bad:
            file, reason = bad[0]
            reason = " ".join(str(reason).split()).partition("ignoring corrupt image/label: ")[2] or reason
            reason = "is no image" if "No module named" in reason else reason  # upstream tries a last reader
            more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
            raise BadInput(f"--data: {self.split}: {reason}, got {file}{more}; mend or remove the image and its label")
        labels = [self.result_to_label(result)[0] for result in results]
        if self.augment and not any(len(label["cls"]) for label in labels):
            where = Path(self.label_files[0]).parent
            raise BadInput(f"--data: {self.split}: no labels, got {where}; labels lie beside images, in labels/")
        self.verify_labels(labels, Path(self.label_files[0]).parent)
        return labels


def images(
    paths: list[str],
    *,
    split: str,
    names: dict[int, str],
    hyp: SimpleNamespace,
    size: int,
    batch: int,
    stride: int,
    cache: bool,
) -> Images:
    """``split`` train augments; the others letterbox to the least shape a batch needs."""
    train = split == "train"
    return Images(
        img_path=paths,
        split=split,
        keep=cache,
        imgsz=size,
        batch_size=batch,
        augment=train,
        hyp=hyp,
        rect=not train,
        stride=stride,
        pad=0.0 if train else 0.5,
        task="detect",
        data={"names": names, "nc": len(names), "channels": 3},
    )


@contextmanager
def no_fonts() -> Iterator[None]:
    """Upstream's own check of a data yaml fetches a font."""
    theirs = data_utils.check_font
    data_utils.check_font = lambda *_, **__: None
    try:
        yield
    finally:
        data_utils.check_font = theirs


def close_mosaic(dataset: Images, hyp: SimpleNamespace) -> None:
    dataset.close_mosaic(copy(hyp))


collate = Images.collate_fn


# ---- metrics --------------------------------------------------------------------------------------------------------


class PatientValidator(DetectionValidator):
    """Upstream's validator, with all the time it needs."""

    def postprocess(self, preds: Any) -> list[dict[str, Tensor]]:
        found = nms.non_max_suppression(
            preds,
            self.args.conf,
            self.args.iou,
            multi_label=True,
            agnostic=self.args.single_cls,
            max_det=self.args.max_det,
            max_time_img=SECONDS_PER_IMAGE,
        )
        return [{"bboxes": x[:, :4], "conf": x[:, 4], "cls": x[:, 5], "extra": x[:, 6:]} for x in found]


class Evaluator(PatientValidator):
    """Its metrics step by step: on any device, on this rank's share of the images."""

    def __init__(self, hyp: SimpleNamespace, names: dict[int, str], device: torch.device, folder: Path) -> None:
        settings = {**vars(hyp), "mode": "val", "plots": False, "save_json": False, "conf": None, "quantize": None}
        super().__init__(None, save_dir=folder, args=settings)
        self.device, self.data, self.names = device, {"names": names}, names

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[Any], criterion: Any, ranks: Any) -> dict[str, float]:
        """Precision, recall, mAP50, mAP50-95 and the mean losses over all ranks' images. Empty except on rank 0."""
        self.dataloader = batches
        model.eval()
        self.init_metrics(model)
        losses: dict[str, float] = {}
        seen = 0
        for batch in batches:
            batch = self.preprocess(batch)
            outputs = model(batch["img"])
            count = len(batch["img"])
            for name, value in criterion(outputs, batch)[1].items():
                losses[name] = losses.get(name, 0.0) + float(value) * count
            seen += count
            self.update_metrics(self.postprocess(outputs), batch)
        parts = ranks.gather((self.metrics.stats, losses, seen))
        if not ranks.first:
            self.metrics.clear_stats()
            return {}
        self.metrics.stats = {key: [each for stats, _, _ in parts for each in stats[key]] for key in parts[0][0]}
        total = sum(count for _, _, count in parts)
        means = {f"val/{name}": sum(part.get(name, 0.0) for _, part, _ in parts) / total for name in parts[0][1]}
        found = {name.removesuffix("(B)"): float(value) for name, value in self.get_stats().items()}
        fitness = found.pop("fitness")
        return {**found, **means, "fitness": fitness}
