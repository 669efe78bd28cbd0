"""From a command line to a run: everything the loop in ``train_prune.py`` needs, checked before anything is written."""

from __future__ import annotations

import re
import warnings
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from apps.common.errors import BadInput
from apps.common.ranks import Ranks
from apps.common.run_folder import ResultsTable, latest_folder, safe_name
from apps.yolov5 import ultralytics_adapter as adapter
from apps.yolov5.arguments import MAY_CHANGE
from apps.yolov5.data_set import DataSet, TrainBatches, ValBatches, read_data
from apps.yolov5.hyp import KEYS, read_hyp
from apps.yolov5.timeline import Timeline, check_epochs
from pruning_core import CheckpointError, Pruning, WeightPruningConfig, checkpoint
from pruning_core.distillation import DetectionDistillation

RESUME = Path("weights/resume.pt")


@dataclass
class Progress:
    """How far a run is: what a resumed run needs besides weights."""

    epoch: int = 0
    batch: int = 0
    """Batches of this epoch that are done. All of them: the epoch waits for its evaluation."""
    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    best_dense: dict[str, float] = field(default_factory=dict)
    dense_metrics: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class Run:
    options: Namespace
    ranks: Ranks
    data: DataSet
    hyp: SimpleNamespace
    timeline: Timeline
    model: adapter.Model
    ema: adapter.Ema
    criterion: Any
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    train_batches: TrainBatches
    val_batches: ValBatches
    pruner: Pruning | None = None
    teacher: adapter.Model | None = None
    distillation: DetectionDistillation | None = None
    start: adapter.Model | None = None
    """The model that ``--weights`` held: evaluated once, as the dense model that the sparse one is measured against."""
    frozen: tuple[str, ...] = ()
    progress: Progress = field(default_factory=Progress)

    @property
    def amp(self) -> torch.dtype | None:
        chosen = self.options.amp
        if chosen == "auto":
            chosen = "fp16" if self.ranks.device.type == "cuda" else "off"
        return {"fp16": torch.float16, "bf16": torch.bfloat16, "off": None}[chosen]


def build(options: Namespace, given: dict[str, Any], ranks: Ranks) -> Run:
    """A new run, or one that goes on."""
    adapter.check_version()
    safe_name(options.name)
    state = None
    if options.resume:
        state = load_resume_state(options, ranks)
        options = resumed_options(options, given, state["options"])
    run = _build(options, ranks, state)
    if state is not None:
        _load(run, state)
    return run


def _build(options: Namespace, ranks: Ranks, state: dict[str, Any] | None) -> Run:
    _check(options, ranks)
    data = read_data(options.data)
    if options.workers is None:
        options.workers = 8 if ranks.device.type == "cuda" else 0
    given_hyp = state["hyp"] if state else read_hyp(options.hyp, ranks.say)
    hyp = adapter.hyperparameters({**given_hyp, "imgsz": options.img})
    torch.manual_seed(options.seed)
    start = adapter.load_model(options.weights, "--weights") if options.weights and not state else None
    model = _model(options, start, data.names, state).to(ranks.device)
    frozen = _freeze(model, options.freeze)
    stride = adapter.largest_stride(model)
    if options.img % stride:
        raise BadInput(
            f"--img: must be a multiple of {stride}, got {options.img}; use {-(-options.img // stride) * stride}"
        )
    batch = options.batch_size // ranks.size
    kind = {"names": data.names, "hyp": hyp, "size": options.img, "stride": stride, "cache": options.cache}
    training = adapter.images(data.train, split="train", batch=batch, **kind)
    validation = adapter.images(data.val, split="val", batch=2 * batch, **kind)
    train_batches = TrainBatches(training, batch, options.workers, ranks, options.seed)
    accumulate = max(round(hyp.nbs / options.batch_size), 1)
    timeline = Timeline(options.epochs, len(train_batches), accumulate, hyp.warmup_epochs, options.cooldown_epochs)
    run = Run(
        options=options,
        ranks=ranks,
        data=data,
        hyp=hyp,
        timeline=timeline,
        model=model,
        ema=adapter.Ema(model),
        criterion=adapter.criterion_of(model, hyp),
        optimizer=_optimizer(options, model, hyp, hyp.weight_decay * options.batch_size * accumulate / hyp.nbs),
        scaler=torch.amp.GradScaler(ranks.device.type, enabled=False),
        train_batches=train_batches,
        val_batches=ValBatches(validation, options.workers, ranks),
        start=start,
        frozen=frozen,
    )
    run.scaler = torch.amp.GradScaler(ranks.device.type, enabled=run.amp is torch.float16)
    if options.do_prune:
        run.pruner = _pruner(run, state["pruner"]["config"] if state else options.pruning_config)
    if options.dist_loss:
        run.teacher = _teacher(run)
        run.distillation = DetectionDistillation(
            kind=options.dist_loss, temperature=options.temperature, feature_weight=options.feature_weight
        )
    return run


def _check(options: Namespace, ranks: Ranks) -> None:
    check_epochs(options.epochs, options.cooldown_epochs, options.do_prune)
    if not options.data:
        raise BadInput(
            "--data: is missing; make a small set with python data/shapes_detection.py --output datasets/shapes"
        )
    if not options.weights and not options.cfg:
        raise BadInput("--weights: is missing; give a checkpoint, or --cfg yolov5n to train from scratch")
    if options.batch_size % ranks.size:
        raise BadInput(
            f"--batch-size: counts all ranks and must divide by their number {ranks.size}, got {options.batch_size}"
        )
    if options.pruning_config and not options.do_prune:
        raise BadInput(
            f"--pruning_config: does nothing without --do_prune, got {options.pruning_config}; add --do_prune"
        )
    if options.dist_loss and not (options.teacher_weights or options.weights):
        raise BadInput(f"--dist_loss: needs a dense teacher, got {options.dist_loss}; give --teacher_weights")
    if options.teacher_weights and not options.dist_loss:
        raise BadInput(
            f"--teacher_weights: does nothing without --dist_loss, got {options.teacher_weights}; add --dist_loss kl"
        )
    if not 0 <= options.feature_weight < float("inf"):
        raise BadInput(f"--feature_weight: must not be negative, got {options.feature_weight}")


def _model(
    options: Namespace, start: adapter.Model | None, names: dict[int, str], state: dict[str, Any] | None
) -> adapter.Model:
    if state is not None:
        return adapter.new_model(state["architecture"], names)
    if start is None:
        return adapter.new_model(options.cfg, names)
    if options.cfg:  # a new head on known features
        fresh = adapter.new_model(options.cfg, names)
        fresh.load(start, verbose=False)
        return fresh
    _same_classes("--weights", options.weights, start, names, "--cfg as well, to begin with a new head")
    return adapter.trainable_copy(start, names)


def _same_classes(option: str, path: str, model: adapter.Model, names: dict[int, str], instead: str) -> None:
    have = adapter.class_names(model)
    if len(have) != len(names):
        raise BadInput(f"{option}: the data have {len(names)} classes, got {len(have)} in {path}; give {instead}")


def _freeze(model: adapter.Model, freeze: list[int]) -> tuple[str, ...]:
    layers = len(model.model)
    numbers = list(range(freeze[0])) if len(freeze) == 1 else freeze
    if any(number >= layers for number in numbers):
        raise BadInput(f"--freeze: the model has layers 0 to {layers - 1}, got {max(numbers)}")
    prefixes = tuple(f"model.{number}." for number in numbers)
    for name, parameter in model.named_parameters():
        if name.startswith(prefixes):
            parameter.requires_grad_(False)
    return prefixes


def _optimizer(options: Namespace, model: nn.Module, hyp: SimpleNamespace, decay: float) -> torch.optim.Optimizer:
    """Weights decay; the scales and shifts of norms, and biases, do not. Biases have their own warm-up."""
    groups: dict[str, list[nn.Parameter]] = {"weight": [], "norm": [], "bias": []}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                norm = isinstance(module, nn.modules.batchnorm._NormBase)
                groups["bias" if name == "bias" else "norm" if norm else "weight"].append(parameter)
    listed = [
        {"params": params, "kind": kind, "weight_decay": decay if kind == "weight" else 0.0}
        for kind, params in groups.items()
        if params
    ]
    if options.optimizer == "SGD":
        return torch.optim.SGD(listed, lr=hyp.lr0, momentum=hyp.momentum, nesterov=True)
    kind = getattr(torch.optim, options.optimizer)
    fused = next(model.parameters()).is_cuda
    return kind(listed, lr=hyp.lr0, betas=(hyp.momentum, 0.999), fused=fused)


def _pruner(run: Run, source: Any) -> Pruning:
    """Begins pruning where the warm-up ends and reaches the target where the cooldown begins."""
    timeline = run.timeline
    try:
        pruners = WeightPruningConfig(source).to_dict()["pruning_configs"]
        for pruner in pruners:
            if pruner["pruning_type"] != "pattern_lock":
                pruner.update(start_step=timeline.pruning_starts, end_step=timeline.pruning_ends)
            if r"\.dfl\." not in pruner["extra_excluded_op_names"]:
                pruner["extra_excluded_op_names"] = [*pruner["extra_excluded_op_names"], r"\.dfl\."]
        made = Pruning(pruners)
        made.model = run.model
        made.optimizer = run.optimizer
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made.on_train_begin(total_steps=timeline.steps)
    except ValueError as error:
        raise BadInput(f"--pruning_config: {error}") from error
    names = [name for name, _ in run.model.named_modules()]
    for warning in caught:
        run.ranks.say(f"--pruning_config: {warning.message}{_head_hint(str(warning.message), names, run.model)}")
    return made


def _head_hint(message: str, names: list[str], model: adapter.Model) -> str:
    """``model.33.m.*`` was the head of the old yolov5 repository: say what it is called in this model."""
    pattern = re.search(r"'(.*)' matches no layer", message)
    if pattern is None or not re.match(r"\^?model\\?\.\d+", pattern[1]):
        return ""
    head = adapter.head_of(model)
    assert any(name.startswith(head) for name in names)
    return f"; the detection head of this model is {head}: to keep it dense write '^{head}.'"


def _teacher(run: Run) -> adapter.Model:
    """Dense, in eval mode: its statistics do not drift and its outputs are those it is known for."""
    options = run.options
    option = "--teacher_weights" if options.teacher_weights else "--weights"
    path = options.teacher_weights or options.weights
    teacher = adapter.load_model(path, option)
    _same_classes(option, path, teacher, run.data.names, "a teacher that was trained on these data")
    if teacher.stride.tolist() != run.model.stride.tolist() or teacher.model[-1].reg_max != run.model.model[-1].reg_max:
        do = "use a yolov5 of the same kind (both with or both without P6)"
        raise BadInput(f"{option}: its head differs from the student's, got strides {teacher.stride.tolist()}; {do}")
    return teacher.to(run.ranks.device).requires_grad_(False).eval()


# ---- going on with a run --------------------------------------------------------------------------------------------


def load_resume_state(options: Namespace, ranks: Ranks) -> dict[str, Any]:
    folder = latest_folder(options.project, str(RESUME)) if options.resume is True else Path(options.resume)
    if folder.suffix == ".pt":  # .../weights/last.pt, as YOLOv5 users write it
        folder = folder.parent.parent
    if not folder.is_dir():
        raise BadInput(f"--resume: no such run, got {str(options.resume)!r}; give its folder, as runs/train/exp")
    if not (folder / RESUME).is_file():
        raise BadInput(f"--resume: nothing to go on with, got {str(folder)!r}; a finished run has no {RESUME}")
    try:
        state = checkpoint.load(folder / RESUME, map_location=ranks.device)
    except CheckpointError as error:
        raise BadInput(f"--resume: {error}") from error
    missing = {"app", "options", "model", "progress"} - state.keys()
    if missing or state["app"] != "yolov5":
        raise BadInput(f"--resume: no state of a yolov5 run, got {str(folder / RESUME)!r}")
    state["options"]["folder"] = str(folder)
    if state["ranks"] != ranks.size:
        ranks.say(
            f"--resume: begun on {state['ranks']} ranks, goes on on {ranks.size}: the weights will differ a little"
        )
    return state


def resumed_options(options: Namespace, given: dict[str, Any], saved: dict[str, Any]) -> Namespace:
    """The options the run was begun with. What is given anew must agree, or be free to change."""
    for name, value in given.items():
        plain = plain_option(value)
        if name not in MAY_CHANGE and plain != saved.get(name):
            spelled = "--" + name.replace("_", "-") if name in ("batch_size", "cos_lr", "sync_bn") else f"--{name}"
            do = "leave it out, or begin a new run without --resume"
            raise BadInput(f"{spelled}: this run was begun with {saved.get(name)!r}, got {plain!r}; {do}")
    merged = {**vars(options), **saved, **{name: given[name] for name in MAY_CHANGE if name in given}}
    return Namespace(**{**merged, "resume": True, "project": Path(merged["project"])})


def plain_option(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def resume_state(run: Run) -> dict[str, Any]:
    """Tensors and plain data; exact at every optimizer step."""
    return {
        "app": "yolov5",
        "ranks": run.ranks.size,
        "options": {name: plain_option(value) for name, value in vars(run.options).items() if name != "folder"},
        "architecture": run.model.yaml,
        "hyp": {key: getattr(run.hyp, key) for key in KEYS},
        "model": run.model.state_dict(),
        "ema": run.ema.ema.state_dict(),
        "ema_updates": run.ema.updates,
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "pruner": run.pruner.state_dict() if run.pruner else None,
        "progress": dict(vars(run.progress)),
        "rng": checkpoint.rng_state(),
    }


def _load(run: Run, state: dict[str, Any]) -> None:
    run.model.load_state_dict(state["model"])
    run.ema.ema.load_state_dict(state["ema"])
    run.ema.updates = state["ema_updates"]
    run.optimizer.load_state_dict(state["optimizer"])
    run.scaler.load_state_dict(state["scaler"])
    run.progress = Progress(**state["progress"])
    try:
        if run.pruner is not None:
            run.pruner.load_state_dict(state["pruner"])
    except ValueError as error:
        raise BadInput(f"--resume: {error}") from error
    checkpoint.load_rng_state({**state["rng"], "cuda": []})


def results_table(run: Run, folder: Path) -> ResultsTable:
    return ResultsTable(folder / "results.csv", run.progress.rows)
