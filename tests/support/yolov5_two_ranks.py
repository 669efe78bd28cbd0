"""The app under torchrun: its first gradient is the sum over the ranks; at the end weights and masks are the same."""

import copy
import hashlib
import sys

import torch
import torch.distributed as dist

from apps.yolov5 import train_prune
from apps.yolov5.arguments import parser

finish, losses, clip = train_prune.finish, train_prune.losses, torch.nn.utils.clip_grad_norm_
expected: list[torch.Tensor] = []


def digest(tensors: dict[str, torch.Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode() + tensors[name].detach().contiguous().numpy().tobytes())
    return total.hexdigest()


def losses_and_expected(run, net, batch):
    """Of the first batch: every rank's own gradient, computed on a copy without DDP, added up."""
    if not expected:
        alone = copy.deepcopy(run.model)
        losses(run, alone, batch)[0].backward()
        for parameter in alone.parameters():
            expected.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
            dist.all_reduce(expected[-1])
    return losses(run, net, batch)


def compare_and_clip(parameters, max_norm):
    parameters = list(parameters)
    if len(expected) == len(parameters):
        for parameter, wanted in zip(parameters, expected, strict=True):
            if parameter.grad is not None:
                torch.testing.assert_close(parameter.grad, wanted, rtol=1e-3, atol=1e-3)
        expected.append(torch.ones(()))  # compared
        print("gradients agree", flush=True)
    return clip(parameters, max_norm)


def compare_and_finish(run, *rest) -> None:
    weights = dict(run.model.named_parameters())
    average = dict(run.ema.ema.named_parameters())
    mine = [digest(weights), digest(average), digest(run.pruner.masks())]
    everyone: list = [None] * run.ranks.size
    dist.all_gather_object(everyone, mine, group=run.ranks.talk)
    assert all(each == mine for each in everyone), everyone
    run.ranks.say(f"{run.ranks.size} ranks agree")
    finish(run, *rest)


train_prune.finish, train_prune.losses = compare_and_finish, losses_and_expected
torch.nn.utils.clip_grad_norm_ = compare_and_clip
sys.exit(train_prune.main(parser().parse_args(), parser().given()))
