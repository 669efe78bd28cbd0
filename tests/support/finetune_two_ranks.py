"""Several runs of the Transformers apps under one torchrun, whose start takes longer than they do.

``finetune_two_ranks.py plan.json``: a list of {"app", "words", "environment", "interrupt"}. At the end of each run the
ranks compare weights and masks. ``interrupt`` is the batch in which rank 1 alone gets a signal.
"""

import hashlib
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist

from apps.common import arguments
from apps.common.finetune import build, loop, processes, results
from pruning_core.masks.report import SparsityReport
from tests.support import finetune_apps as apps

torch.set_num_threads(1)
finish, losses = results.finish, loop.losses
seen: list[list[tuple[int, ...]]] = []
interrupt = 0


def digest(tensors: dict[str, torch.Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode() + tensors[name].detach().contiguous().numpy().tobytes())
    return total.hexdigest()


def compare_and_finish(run, *rest) -> None:
    mine = [digest(processes.whole_weights(run.bare)), run.progress.metrics, run.scheduler.last_epoch]
    if not processes.sharded(run.accelerator):
        mine.append(digest(run.pruner.masks()))
    everyone: list = [None] * run.ranks.size
    dist.all_gather_object(everyone, mine, group=run.ranks.talk)
    assert all(each == mine for each in everyone), everyone
    run.ranks.say(f"{run.ranks.size} ranks agree")
    if len(seen) == run.timeline.batches * run.timeline.epochs:  # not one that goes on
        check_rows(run)
    finish(run, *rest)


def check_rows(run) -> None:
    """In each epoch the ranks share the rows. What fills the last batch is seen twice."""
    everyone: list = [None] * run.ranks.size
    dist.all_gather_object(everyone, seen, group=run.ranks.talk)
    wanted = Counter(tuple(ids) for ids in run.data.train["input_ids"])
    for epoch in range(run.timeline.epochs):
        begin = epoch * run.timeline.batches
        batches = [batch for each in everyone for batch in each[begin : begin + run.timeline.batches]]
        found = Counter(row for batch in batches for row in batch)
        assert not wanted - found and (found - wanted).total() == 1, (wanted - found, found - wanted)
    run.ranks.say("every training row was seen")


def interrupted(run, batch):
    rows = zip(batch["input_ids"].tolist(), batch["attention_mask"].sum(1).tolist(), strict=True)
    seen.append([tuple(ids[:length]) for ids, length in rows])
    if len(seen) == interrupt and run.ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return losses(run, batch)


results.finish, loop.losses = compare_and_finish, interrupted
results.plot_curves, SparsityReport.plot = (lambda *_, **__: None), (lambda *_: None)
build.leave_group = lambda: None  # the next run goes on in it
arguments.RANK_0_SPEAKS_WITHIN = 0.0  # nobody ends the others here
codes = []
for each in json.loads(Path(sys.argv[1]).read_text()):
    os.environ.update(each["environment"])
    seen.clear()
    interrupt = each["interrupt"]
    codes.append(apps.main(each["app"], each["words"]))
    for name in each["environment"]:
        del os.environ[name]
print(f"exit codes {codes}\n", end="", flush=True)
dist.destroy_process_group()
