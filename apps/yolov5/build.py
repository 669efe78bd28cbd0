"""From a command line to a run: everything the loop in ``train_prune.py`` needs, checked before anything is written."""

from __future__ import annotations

import math
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from apps.common.errors import BadInput
from apps.common.pruning import read_recipe
from apps.common.ranks import Ranks
from apps.common.run_folder import check_writable, safe_name
from apps.yolov5 import ultralytics_adapter as adapter
from apps.yolov5.arguments import TEMPERATURE
from apps.yolov5.data_set import DataSet, TrainBatches, ValBatches, read_data
from apps.yolov5.hyp import read_hyp
from apps.yolov5.pruning import begin_pruning
from apps.yolov5.resume import begun_with, check_same, find_state, load_state
from apps.yolov5.run import Run
from apps.yolov5.timeline import Timeline, check_epochs
from pruning_core import DetectionDistillation

DEFAULT = "yolov5s.pt"


def build(options: Namespace, given: dict[str, Any], ranks: Ranks) -> Run:
    """A new run, or one that goes on."""
    adapter.check_version()
    safe_name(options.name)
    state = None
    if options.resume:
        state = find_state(options, ranks)
        options = begun_with(options, given, state["options"])
    run = _build(options, ranks, state)
    if state is not None:
        check_same(run, state, given)
        load_state(run, state)
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
    train_batches, val_batches = _batches(options, data, hyp, adapter.largest_stride(model), ranks)
    accumulate = max(round(hyp.nbs / options.batch_size), 1)
    amp = _amp(options.amp, ranks.device)
    run = Run(
        options=options,
        ranks=ranks,
        data=data,
        hyp=hyp,
        timeline=Timeline(options.epochs, len(train_batches), accumulate, hyp.warmup_epochs, options.cooldown_epochs),
        model=model,
        ema=adapter.Ema(model),
        criterion=adapter.criterion_of(model, hyp),
        optimizer=_optimizer(options, model, hyp, hyp.weight_decay * options.batch_size * accumulate / hyp.nbs),
        amp=amp,
        scaler=torch.amp.GradScaler(ranks.device.type, enabled=amp is torch.float16),
        train_batches=train_batches,
        val_batches=val_batches,
        start=start,
        frozen=frozen,
    )
    if options.do_prune:
        run.recipe = read_recipe(state["recipe"] if state else options.pruning_config)
        window = run.timeline.pruning_starts, run.timeline.pruning_ends
        run.pruner = begin_pruning(run.recipe, model, run.optimizer, window, run.timeline.steps, ranks.say)
    if options.dist_loss:
        run.teacher = _teacher(run)
        run.distillation = DetectionDistillation(
            kind=options.dist_loss, temperature=options.temperature, feature_weight=options.feature_weight
        )
    return run


def _batches(
    options: Namespace, data: DataSet, hyp: SimpleNamespace, stride: int, ranks: Ranks
) -> tuple[TrainBatches, ValBatches]:
    if options.img % stride:
        fits = math.ceil(options.img / stride) * stride
        raise BadInput(f"--img: must be a multiple of {stride}, got {options.img}; use {fits}")
    batch = options.batch_size // ranks.size
    kind = {"names": data.names, "hyp": hyp, "size": options.img, "stride": stride, "cache": options.cache}
    training = adapter.images(data.train, split="train", batch=batch, **kind)
    validation = adapter.images(data.val, split="val", batch=2 * batch, **kind)
    hyp.max_det = max(hyp.max_det, training.most_objects, validation.most_objects)
    seeded = TrainBatches(training, batch, options.workers, ranks, options.seed)
    return seeded, ValBatches(validation, options.workers, ranks)


def _amp(kind: str, device: torch.device) -> torch.dtype | None:
    """What autocast computes in; None: everything in fp32."""
    if kind == "auto":
        kind = "fp16" if device.type == "cuda" else "off"
    return {"fp16": torch.float16, "bf16": torch.bfloat16, "off": None}[kind]


def _default_model(options: Namespace, ranks: Ranks) -> None:
    """YOLOv5's default checkpoint where it lies here; else its yaml, since nothing is downloaded."""
    if Path(DEFAULT).is_file():
        options.weights = DEFAULT
        return
    options.cfg = Path(DEFAULT).stem
    ranks.say(f"--weights: none is given and {DEFAULT} is not here; training {options.cfg} from random weights")


def _check(options: Namespace, ranks: Ranks) -> None:
    check_epochs(options.epochs, options.cooldown_epochs, options.do_prune)
    if not options.data:
        raise BadInput(
            "--data: is missing; make a small set with python data/shapes_detection.py --output runs/data/shapes"
        )
    if not options.weights and not options.cfg:
        _default_model(options, ranks)
    options.weights = options.weights and adapter.checkpoint_file(options.weights)
    options.teacher_weights = options.teacher_weights and adapter.checkpoint_file(options.teacher_weights)
    check_writable(options.project, "--project")
    if options.batch_size % ranks.size:
        raise BadInput(
            f"--batch-size: counts all ranks and must divide by their number {ranks.size}, got {options.batch_size}"
        )
    if options.pruning_config and not options.do_prune:
        ranks.say(f"--pruning_config: {options.pruning_config} is not used; this is dense training without --do_prune")
    if options.dist_loss and not (options.teacher_weights or options.weights):
        raise BadInput(
            f"--dist_loss: needs a dense teacher, got {options.dist_loss}; give --weights or --teacher_weights"
        )
    if options.teacher_weights and not options.dist_loss:
        raise BadInput(
            f"--teacher_weights: does nothing without --dist_loss, got {options.teacher_weights}; add --dist_loss kl"
        )
    if not 0 <= options.feature_weight < float("inf"):
        raise BadInput(f"--feature_weight: must not be negative, got {options.feature_weight}")
    if options.feature_weight and not options.dist_loss:
        raise BadInput(f"--feature_weight: does nothing without --dist_loss, got {options.feature_weight}; add it")
    if options.dist_loss == "l2" and options.temperature != TEMPERATURE:
        ranks.say(f"--temperature: {options.temperature:g} is not used: l2 has none, kl has")


def _model(
    options: Namespace, start: adapter.Model | None, names: dict[int, str], state: dict[str, Any] | None
) -> adapter.Model:
    if state is not None:
        return adapter.slim_model(state["architecture"], names, state["structure"])
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
        got = " ".join(map(str, freeze))
        raise BadInput(f"--freeze: the model has {layers} layers, numbered from 0, got {got}; freeze fewer of them")
    prefixes = tuple(f"model.{number}." for number in numbers)
    for name, parameter in model.named_parameters():
        if name.startswith(prefixes):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise BadInput(f"--freeze: leaves nothing to train, got {' '.join(map(str, freeze))}; freeze fewer of them")
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
    ours, theirs = adapter.feature_channels(run.model), adapter.feature_channels(teacher)
    if options.feature_weight and ours != theirs:
        do = "leave it out, or use a teacher of the student's size"
        raise BadInput(
            f"--feature_weight: features of {ours} and {theirs} channels cannot be compared, got {path}; {do}"
        )
    return teacher.to(run.ranks.device).requires_grad_(False).eval()
