"""From a command line to a run: everything that the loop needs, checked before anything is written."""

from __future__ import annotations

import copy
from argparse import Namespace
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from apps.common.arguments import leave
from apps.common.errors import BadInput
from apps.common.finetune import card, hub, processes, results, slim, state
from apps.common.finetune.arguments import DEFAULT_RECIPE, FEATURES, RECIPE_FLAGS, check
from apps.common.finetune.loop import train
from apps.common.finetune.model import (
    check_length,
    check_vocabulary,
    label_names,
    load_config,
    load_model,
    load_teacher,
    load_tokenizer,
    tiny_bert,
)
from apps.common.finetune.run import App, Data, Run
from apps.common.finetune.timeline import Timeline, timeline
from apps.common.interrupt import Interrupt
from apps.common.pruning import begin_pruning, read_recipe
from apps.common.ranks import Ranks, leave_group
from pruning_core import LogitDistillation, WeightPruningConfig

ReadData = Callable[[Namespace, PreTrainedTokenizerBase], Data]
DEFAULTS = {"learning_rate": 5e-5, "num_train_epochs": 3, "per_device_train_batch_size": 8}
TO_PRUNE = {"learning_rate": 2e-4, "num_train_epochs": 6}
FROM_RANDOM = {"learning_rate": 2e-3, "per_device_train_batch_size": 32}


def start(app: App, options: Namespace, given: dict[str, Any], tokenizer: Any, read_data: ReadData) -> int:
    """The whole run, and its exit code. ``tokenizer()`` makes that of the embedded data; ``read_data`` is the app's."""
    try:
        run = build(app, options, given, tokenizer, read_data)
        folder = results.open_folder(run)
    except BadInput as error:
        leave(str(error))
    with Interrupt() as interrupt:
        try:
            return train(run, folder, interrupt)
        finally:
            leave_group()


def build(app: App, options: Namespace, given: dict[str, Any], tokenizer: Any, read_data: ReadData) -> Run:
    """A new run, or one that goes on."""
    options, saved = _settled(app, options, given)
    accelerator, ranks = processes.begin(options)
    hub.quiet(ranks.first)
    with ranks.together():
        card.check_hub(options)
        recipe = _recipe(options, saved)
        words = _tokenizer(options, tokenizer)
    used = copy.deepcopy(words)  # it remembers how it cut: what is saved with the model does not
    data = _in_turn(ranks, lambda: read_data(options, used))
    with ranks.together():
        if saved:
            state.check_same(saved, data.identity, accelerator)
        add_defaults(options, app.epochs)
        model, new = _model(app, options, words, data)
        _check_length(app, options, model, words, "the model")
    cut = slim.cut(options, saved, ranks, model, data, words)
    with ranks.together():
        parts = _parts(app, options, words, data, ranks, model, new)
    run = _prepared(app, options, accelerator, ranks, data, words, parts)
    with ranks.together():
        _add_pruner(run, recipe)
        _add_teacher(run, parts.teacher)
    if cut is not None:
        run.cut, run.trained_head = cut, False  # what is left knows less than the model did
    if saved is not None:
        with ranks.together():
            state.load(run, saved)
    return run


def _settled(app: App, options: Namespace, given: dict[str, Any]) -> tuple[Namespace, dict[str, Any] | None]:
    """The options of this run, and the checkpoint it goes on from."""
    saved = None
    if options.resume_from_checkpoint:
        saved = state.find(options, app.name)
        options = state.begun_with(options, given, saved)
        if options.output_dir.resolve() != saved["folder"].parent.resolve():
            results.check_folder(options.output_dir, overwrite=options.overwrite_output_dir)
    else:
        results.check_folder(options.output_dir, overwrite=options.overwrite_output_dir)
        options.command = card.command()
    check(options)
    return options, saved


def _in_turn(ranks: Ranks, read: Callable[[], Data]) -> Data:
    """Rank 0 first: it fills the caches that the others read."""
    data = None
    for turn in (True, False):
        with ranks.together():
            if ranks.first is turn:
                data = read()
    assert data is not None
    return data


def _recipe(options: Namespace, saved: dict[str, Any] | None) -> WeightPruningConfig | None:
    if not options.do_prune:
        return None
    if saved is not None:
        return read_recipe(saved["recipe"])
    flags = {name: (flag, getattr(options, flag[2:])) for name, flag in RECIPE_FLAGS.items()}
    given = {name: pair for name, pair in flags.items() if pair[1] is not None}
    return read_recipe(options.pruning_config or DEFAULT_RECIPE, given)


def _tokenizer(options: Namespace, tokenizer: Callable[[], Any]) -> PreTrainedTokenizerBase:
    if options.tokenizer_name:
        return load_tokenizer(options.tokenizer_name, "--tokenizer_name")
    if options.model_name_or_path:
        return load_tokenizer(options.model_name_or_path, "--model_name_or_path")
    return tokenizer()


class _Parts(NamedTuple):
    model: PreTrainedModel
    new: list[str]
    """Weights that the model's file did not have."""
    teacher: PreTrainedModel | None
    batches: DataLoader[Any]
    when: Timeline


def _parts(
    app: App,
    options: Namespace,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    ranks: Ranks,
    model: PreTrainedModel,
    new: list[str],
) -> _Parts:
    """What the run is made of, each checked against the others."""
    teacher = _teacher(app, options, model, tokenizer, data)
    # Its own generator: one that all share would be ahead of where a resumed run finds it.
    batches = data.batches(options.per_device_train_batch_size, torch.Generator())
    when = timeline(options, -(-len(batches) // ranks.size))
    if new and options.model_name_or_path:
        ranks.say(f"new weights, not in {options.model_name_or_path}: {', '.join(new)}")
    return _Parts(model, new, teacher, batches, when)


def _check_length(app: App, options: Namespace, model: PreTrainedModel, tokenizer: Any, who: str) -> None:
    check_length(model, tokenizer, getattr(options, app.length), f"--{app.length}", who)


def add_defaults(options: Namespace, epochs_of_tiny: int) -> None:
    """What was not given. Weights move further to replace what is gone; the tiny random BERT learns from nothing."""
    defaults = DEFAULTS | (TO_PRUNE if options.do_prune or options.slim_config else {})
    if not options.model_name_or_path:
        defaults |= {**FROM_RANDOM, "num_train_epochs": epochs_of_tiny}
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def _model(
    app: App, options: Namespace, tokenizer: PreTrainedTokenizerBase, data: Data
) -> tuple[PreTrainedModel, list[str]]:
    name = options.model_name_or_path
    if not name:
        if not data.embedded:
            raise BadInput(
                "--model_name_or_path: is missing; the tiny random BERT knows the words of the embedded data only"
            )
        return app.kind.from_config(tiny_bert(len(tokenizer), **data.config)), ["all"]
    before = label_names(load_config(name, "--model_name_or_path"))
    config = load_config(name, "--model_name_or_path", **data.config)
    model, new = load_model(
        app.kind, name, "--model_name_or_path", config=config, new_sizes=options.ignore_mismatched_sizes
    )
    check_vocabulary(model, tokenizer, name)
    if before != label_names(config) and sorted(before) == sorted(label_names(config)):
        new.append(f"the order of its labels, which was {', '.join(before)}")
    return model, new


def _teacher(
    app: App, options: Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Data
) -> PreTrainedModel | None:
    if not options.dist_loss:
        return None
    name = options.teacher_model_name_or_path or options.model_name_or_path
    option = "--teacher_model_name_or_path" if options.teacher_model_name_or_path else "--model_name_or_path"
    teacher = load_teacher(app.kind, name, option, model, tokenizer)
    _check_length(app, options, teacher, tokenizer, "the teacher")
    if options.feature_weight == 0:
        return teacher
    example = data.example(tokenizer.model_input_names)
    sizes = [_hidden_sizes(each, example) for each in (model, teacher)]
    same = sizes[0] == sizes[1] != []
    if options.feature_weight is None:
        options.feature_weight = FEATURES if same else 0.0
    if options.feature_weight and not same:
        do = "leave it out, or use a teacher of the student's size"
        if options.slim_config:
            do = 'leave it out, or keep the width with layers: {"*embeddings*": 0} in --slim_config'
        raise BadInput(
            f"--feature_weight: hidden states of {_sizes(sizes[0])} and {_sizes(sizes[1])} cannot be compared, "
            f"got {name!r}; {do}"
        )
    return teacher


def _hidden_sizes(model: PreTrainedModel, example: dict[str, torch.Tensor]) -> list[int]:
    """Of a model that was cut the configuration still says the old ones. None of a model that does not give them."""
    with torch.inference_mode():
        states = getattr(model.eval()(**example, output_hidden_states=True), "hidden_states", None)
    return [state.shape[-1] for state in states or ()]


def _sizes(widths: list[int]) -> str:
    return f"{len(widths) - 1} layers of {', '.join(map(str, sorted(set(widths))))}" if widths else "no layer"


def _prepared(
    app: App,
    options: Namespace,
    accelerator: Any,
    ranks: Ranks,
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    parts: _Parts,
) -> Run:
    processes.seed_dropout(options, ranks)
    processes.choose_units(accelerator, parts.model)
    architecture, optimizer = type(parts.model).__name__, _optimizer(options, parts.model, accelerator.device)
    # The schedule counts the optimizer steps that were made, on any number of ranks: Accelerate's own would step once
    # per rank, and also where a fused optimizer skips.
    scheduler = get_scheduler(options.lr_scheduler_type, optimizer, options.num_warmup_steps, parts.when.steps)
    prepared = accelerator.prepare(parts.model, optimizer, parts.batches, *data.validation.values())
    return Run(
        app=app,
        options=options,
        accelerator=accelerator,
        ranks=ranks,
        data=data,
        tokenizer=tokenizer,
        timeline=parts.when,
        model=prepared[0],
        architecture=architecture,
        optimizer=prepared[1],
        scheduler=scheduler,
        train_batches=prepared[2],
        validation=dict(zip(data.validation, prepared[3:], strict=True)),
        trained_head=not parts.new,
    )


def _add_pruner(run: Run, recipe: WeightPruningConfig | None) -> None:
    if recipe is None:
        return
    when, run.recipe = run.timeline, recipe
    window = when.pruning_starts, when.pruning_ends
    run.pruner = begin_pruning(
        recipe, run.bare, run.optimizer, window, when.steps, run.ranks.say, frequency=when.frequency
    )


def _add_teacher(run: Run, teacher: PreTrainedModel | None) -> None:
    if teacher is None:
        return
    options = run.options
    teacher.to(run.ranks.device)  # type: ignore[arg-type]
    run.teacher = teacher
    run.distillation = LogitDistillation(
        kind=options.dist_loss, temperature=options.temperature, feature_weight=options.feature_weight
    )


def _optimizer(options: Namespace, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """Matrices decay; biases and norms do not."""
    decay = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    rest = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": decay, "weight_decay": options.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=options.learning_rate, fused=device.type in ("cuda", "cpu"))
