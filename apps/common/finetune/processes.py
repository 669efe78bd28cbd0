"""Accelerate, begun for a run that ``accelerate launch`` or ``torchrun`` started: processes, precision, trackers."""

from __future__ import annotations

import warnings
from argparse import Namespace

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedType,
    FullyShardedDataParallelPlugin,
    parse_flag_from_env,
    set_seed,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from apps.common.errors import BadInput
from apps.common.ranks import TIMEOUT, Ranks


def begin(options: Namespace) -> tuple[Accelerator, Ranks]:
    """The order of the batches is a function of seed and epoch, so that a resumed run sees the same ones."""
    order = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=options.seed)
    trackers = {"log_with": options.report_to, "project_dir": _folder(options)} if options.with_tracking else {}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*no supported trackers")  # said below
            accelerator = Accelerator(
                mixed_precision=options.mixed_precision,
                gradient_accumulation_steps=options.gradient_accumulation_steps,
                dataloader_config=order,
                **trackers,
            )
    except ValueError as error:
        option = "--mixed_precision" if "precision" in str(error) else "--report_to"
        value = options.mixed_precision if option == "--mixed_precision" else options.report_to
        raise BadInput(f"{option}: {' '.join(str(error).split())}, got {value}") from error
    if options.with_tracking and not accelerator.log_with:
        do = "install one, such as tensorboard, or leave --with_tracking out"
        raise BadInput(f"--report_to: no such tracker is installed, got {options.report_to}; {do}")
    _shard_on_cpu(accelerator)
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise BadInput("--mixed_precision: fp16 needs a GPU, got fp16 on the CPU; use bf16 or no")
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA):
        do = "use DDP or FSDP2 (apps/common/accelerate)"
        raise BadInput(f"accelerate: weights and gradients of {accelerator.distributed_type} are out of reach; {do}")
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise BadInput("accelerate: FSDP of the first version keeps flat weights; set fsdp_version: 2")
    set_seed(options.seed)  # the same new head on every rank
    return accelerator, _ranks(accelerator)


def _shard_on_cpu(accelerator: Accelerator) -> None:
    """Accelerate makes DDP of FSDP2 on the CPU, and does not say so. It is what was asked for, and it works."""
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and accelerator.distributed_type == DistributedType.MULTI_CPU:
        for state in (PartialState(), accelerator.state):  # the second is refreshed from the first
            state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()


def choose_units(accelerator: Accelerator, model: PreTrainedModel) -> None:
    """FSDP2 gathers one layer at a time, and the word embeddings by themselves.

    Accelerate takes the latter out of their module after it has sharded that module too, and fails: leave it whole.
    """
    if not sharded(accelerator):
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.transformer_cls_names_to_wrap is not None:
        return
    words = model.get_input_embeddings()
    around = {type(module).__name__ for module in model.modules() if any(each is words for each in module.children())}
    names = getattr(model, "_no_split_modules", None) or ()
    plugin.transformer_cls_names_to_wrap = sorted(name for name in names if name not in around)


def _folder(options: Namespace) -> str:
    return str(options.output_dir or "runs")


def _ranks(accelerator: Accelerator) -> Ranks:
    rank, size, local = accelerator.process_index, accelerator.num_processes, accelerator.local_process_index
    talk = dist.new_group(backend="gloo", timeout=TIMEOUT) if size > 1 else None
    return Ranks(rank, size, local, accelerator.device, talk)


def sharded(accelerator: Accelerator) -> bool:
    """FSDP2: every rank holds a part of each weight."""
    return bool(accelerator.distributed_type == DistributedType.FSDP)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that every rank holds a part of, put together. Every rank must ask for them."""
    state = model.state_dict()
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}


def finite(model: nn.Module) -> bool:
    """Of what this rank holds."""
    held = (each.to_local() if isinstance(each, DTensor) else each for each in model.parameters())
    return all(bool(each.isfinite().all()) for each in held)


def precision(accelerator: Accelerator) -> str:
    return {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)


def skipped(accelerator: Accelerator, scale_before: float | None) -> bool:
    """Whether the scaler left the last optimizer step out, because of gradients that were not finite.

    ``accelerator.optimizer_step_was_skipped`` says no for fused optimizers: they are called, and do nothing.
    The scale falls in both cases, and in no other.
    """
    return scale_before is not None and accelerator.scaler.get_scale() < scale_before


def scale(accelerator: Accelerator) -> float | None:
    return None if accelerator.scaler is None else accelerator.scaler.get_scale()


def seed_dropout(options: Namespace, ranks: Ranks) -> None:
    """Each rank draws its own dropout; the weights are there already."""
    torch.manual_seed(options.seed + ranks.rank)
