"""The options that both Transformers apps have: the names of the ``no_trainer`` scripts, and those of pruning."""

from __future__ import annotations

import argparse
from argparse import Namespace
from pathlib import Path
from typing import Any

from apps.common.arguments import Parser, count, not_negative, number, plain, positive
from apps.common.errors import BadInput

SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
DEFAULT_RECIPE = Path(__file__).parents[1] / "recipes/4x1.yaml"
TEMPERATURE = 2.0
FEATURES = 2.0
HALF = 0.5
SECRET = "hub_token"
GONE = {
    "--use_slow_tokenizer": "tokenizers are fast ones; leave it out",
    "--trust_remote_code": "code from the hub is not run; leave it out",
    "--config_name": "the configuration comes with --model_name_or_path; leave it out",
    "--model_type": "the configuration comes with --model_name_or_path; leave it out",
    "--sparsity_warm_epochs": "write --warm_epochs",
    "--resume": "write --resume_from_checkpoint",
    "--do_train": "it always trains; leave it out",
    "--do_eval": "it always evaluates; leave it out",
}
RECIPE_FLAGS = {
    "target_sparsity": "--target_sparsity",
    "pattern": "--pruning_pattern",
    "pruning_type": "--pruning_type",
    "pruning_scope": "--pruning_scope",
    "pruning_frequency": "--pruning_frequency",
}
"""Options of a recipe -> the flags that win over it."""
PRUNING = ("pruning_config", *(flag[2:] for flag in RECIPE_FLAGS.values()), "warm_epochs", "cooldown_epochs")
LEARNING = ("teacher_model_name_or_path", "distill_loss_weight", "temperature", "feature_weight")
MAY_CHANGE = (
    "output_dir",
    "overwrite_output_dir",
    "checkpointing_steps",
    "resume_from_checkpoint",
    "with_tracking",
    "report_to",
    "push_to_hub",
    "hub_model_id",
    "hub_token",
    "preprocessing_num_workers",
    "overwrite_cache",
)
"""Options that a resumed run may be given anew: they do not change its weights."""


def cadence(text: str) -> str:
    if text == "epoch":
        return text
    try:
        return str(count(1)(text))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"must be 'epoch' or a number of optimizer steps, got {text!r}") from None


def folder(text: str) -> str:
    """An empty variable in a script must not begin a new run, nor write into the working folder."""
    if not text:
        raise argparse.ArgumentTypeError("must be a folder, got ''; leave the value or the option out")
    return text


def add_model(made: Parser) -> None:
    model = made.add_argument_group("model")
    model.add_argument("--model_name_or_path", default="", help="folder or hub name to start from (a tiny random BERT)")
    model.add_argument("--tokenizer_name", default="", help="folder or hub name (that of the model)")
    model.add_argument(
        "--ignore_mismatched_sizes",
        action="store_true",
        help="begin with a new head where the model's has another size",
    )


def add_pruning(made: Parser) -> None:
    prune = made.add_argument_group("pruning")
    prune.add_argument("--do_prune", action="store_true", help="prune from --warm_epochs to --cooldown_epochs")
    prune.add_argument("--pruning_config", help="yaml (apps/common/recipes/4x1.yaml); the flags below win over it")
    prune.add_argument("--target_sparsity", type=number, help="share of zeros in the layers that take part")
    prune.add_argument("--pruning_pattern", help="1x1, 4x1 or any NxM, 1xchannel, channelx1, 2:4 or any N:M")
    prune.add_argument("--pruning_type", help="snip_momentum, magnitude, ... (also _progressive); pattern_lock")
    prune.add_argument(
        "--pruning_scope", choices=("global", "local"), help="rank all layers together, or each by itself"
    )
    prune.add_argument(
        "--pruning_frequency", type=count(1), help="optimizer steps between two mask changes (60 changes in all)"
    )
    prune.add_argument("--warm_epochs", type=not_negative, default=0.0, help="first epochs, dense; parts count (0)")
    prune.add_argument(
        "--cooldown_epochs", type=not_negative, help="last epochs, with fixed masks; parts count (half of all)"
    )

    prune.add_argument(
        "--slim_config", help="yaml (apps/common/recipes/slim.yaml): remove whole channels before training begins"
    )

    learn = made.add_argument_group("distillation")
    learn.add_argument("--dist_loss", choices=("l2", "kl"), help="learn from the logits of a dense teacher as well")
    learn.add_argument("--teacher_model_name_or_path", default="", help="the teacher (--model_name_or_path)")
    learn.add_argument(
        "--distill_loss_weight",
        type=positive,
        default=HALF,
        help="its share in the loss; 1: it replaces the task's own (0.5)",
    )
    learn.add_argument("--temperature", type=positive, default=TEMPERATURE, help="of kl (2)")
    learn.add_argument(
        "--feature_weight",
        type=not_negative,
        help="weight of an l2 term on the hidden states beside it (2; 0 for a teacher of another size)",
    )


def add_training(made: Parser) -> None:
    loop = made.add_argument_group("training")
    loop.add_argument("--per_device_train_batch_size", type=count(1), help="per rank (8; 32 for the tiny random BERT)")
    loop.add_argument("--per_device_eval_batch_size", type=count(1), default=8, help="per rank (8)")
    loop.add_argument("--learning_rate", type=positive, help="highest (5e-5; pruned or slim 2e-4; the tiny BERT 2e-3)")
    loop.add_argument("--weight_decay", type=not_negative, default=0.0, help="not of biases and norms (0)")
    loop.add_argument("--max_grad_norm", type=positive, default=1.0, help="gradients are clipped to it (1)")
    loop.add_argument("--num_train_epochs", type=count(1), help="(3; pruned or slim 6; the tiny BERT what it needs)")
    loop.add_argument("--max_train_steps", type=count(1), help="optimizer steps, in place of --num_train_epochs")
    loop.add_argument("--gradient_accumulation_steps", type=count(1), default=1, help="batches per step (1)")
    loop.add_argument("--lr_scheduler_type", choices=SCHEDULERS, default="linear", help="(linear)")
    loop.add_argument(
        "--num_warmup_steps", type=count(0), help="of the learning rate (0; a tenth for the tiny random BERT)"
    )
    loop.add_argument("--mixed_precision", choices=("no", "bf16", "fp16"), help="(what accelerate is configured to)")
    loop.add_argument("--seed", type=count(0, 2**32 - 1), default=0, help="(0)")


def add_output(made: Parser, runs: str) -> None:
    place = made.add_argument_group("output")
    place.add_argument("--output_dir", type=lambda text: Path(folder(text)), help=f"(runs/{runs}/exp, exp2, ...)")
    place.add_argument("--overwrite_output_dir", action="store_true", help="write over the run that is in it")
    place.add_argument("--checkpointing_steps", type=cadence, help="save the whole state every N steps, or 'epoch'")
    place.add_argument(
        "--resume_from_checkpoint", nargs="?", type=folder, const=True, help="go on: its folder (the latest)"
    )
    place.add_argument("--with_tracking", action="store_true", help="log to --report_to")
    place.add_argument("--report_to", default="all", help="tensorboard, wandb, ...: what is installed (all)")
    place.add_argument("--push_to_hub", action="store_true", help="upload the folder when training is done")
    place.add_argument("--hub_model_id", help="(the name of the folder)")
    place.add_argument("--hub_token", help="(that of `hf auth login`)")


def public(options: Namespace) -> dict[str, Any]:
    """As files and trackers hold them, without the token."""
    return {name: plain(value) for name, value in vars(options).items() if name != SECRET}


def check(options: Namespace) -> None:
    """What can be said without looking at any file."""
    if not options.do_prune:
        _useless(options, PRUNING, "--do_prune", "--do_prune")
    if not options.dist_loss:
        _useless(options, LEARNING, "--dist_loss", "--dist_loss kl")
    if options.dist_loss and not (options.teacher_model_name_or_path or options.model_name_or_path):
        do = "give --teacher_model_name_or_path"
        raise BadInput(f"--dist_loss: needs a trained teacher, got {options.dist_loss}; {do}")
    if options.distill_loss_weight > 1:
        do = "use 1 for it alone, 0.5 for half"
        raise BadInput(
            f"--distill_loss_weight: is the teacher's share in the loss, got {options.distill_loss_weight}; {do}"
        )
    if options.dist_loss == "l2" and options.temperature != TEMPERATURE:
        raise BadInput(f"--temperature: l2 has none, got {options.temperature:g}; leave it out or use --dist_loss kl")
    if options.pruning_type == "pattern_lock" and options.target_sparsity is not None:
        raise BadInput(
            f"--target_sparsity: pattern_lock keeps today's zeros, got {options.target_sparsity}; leave it out"
        )
    if options.hub_model_id and not options.push_to_hub:
        raise BadInput(f"--hub_model_id: does nothing without --push_to_hub, got {options.hub_model_id}; add it")
    if options.hub_token and not options.push_to_hub:
        raise BadInput("--hub_token: does nothing without --push_to_hub, got a token; add it")
    if options.report_to != "all" and not options.with_tracking:
        raise BadInput(f"--report_to: does nothing without --with_tracking, got {options.report_to}; add it")


def _useless(options: Namespace, names: tuple[str, ...], switch: str, add: str) -> None:
    defaults = {"warm_epochs": 0.0, "distill_loss_weight": HALF, "temperature": TEMPERATURE}
    for name in names:
        value = getattr(options, name)
        if value not in (None, "", defaults.get(name)):
            raise BadInput(f"--{name}: does nothing without {switch}, got {value}; add {add}")


def add_rows(data: argparse._ArgumentGroup) -> None:
    """What is read of the data, and how."""
    data.add_argument("--max_train_samples", type=count(1), help="the first N training rows only")
    data.add_argument("--max_eval_samples", type=count(1), help="the first N validation rows only")
    data.add_argument("--pad_to_max_length", action="store_true", help="pad all rows alike (to the longest of a batch)")
    data.add_argument("--preprocessing_num_workers", type=count(1), help="processes that tokenize (1)")
    data.add_argument("--overwrite_cache", action="store_true", help="tokenize anew")
