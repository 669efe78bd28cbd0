"""Channels that go while a model trains."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from pruning_core.channels import Pruner
from pruning_core.graph import GraphError
from tests.support import ROOT

WORKER = ROOT / "tests/support/channels_two_ranks.py"


def net():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.BatchNorm2d(24),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 4),
    )  # fmt: skip


def batches(count):
    """Four colours, which can be learned."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        label = torch.randint(0, 4, (32,), generator=generator)
        image = torch.randn(32, 3, 8, 8, generator=generator) + torch.eye(4)[label][:, :3, None, None] * 2
        yield image, label


def to_loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


def test_in_the_loop():
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    parameters = list(model.parameters())
    pruner = Pruner(model, False)
    sizes, losses = [], []
    for step, batch in enumerate(batches(60)):
        if step in (20, 30, 40):
            pruner.rebuild_model(batch, to_loss, optimizer, 6)
            sizes.append(model[0].out_channels + model[3].out_channels)
            continue
        optimizer.zero_grad()
        loss = to_loss(model, batch)  # still held when the model is cut
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sizes == [34, 28, 22]
    assert all(mine is first for mine, first in zip(model.parameters(), parameters, strict=True))
    assert all(state["exp_avg"].shape == parameter.shape for parameter, state in optimizer.state.items())
    assert losses[-1] < 0.3 < losses[0]


def test_the_least_important_go():
    """Channels that nothing reads change no loss: they go first."""
    model = net()
    with torch.no_grad():
        model[3].weight[:, [2, 5, 11]] = 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kept = model[0].weight.detach()[[i for i in range(16) if i not in (2, 5, 11)]]
    done = Pruner(model).rebuild_model(next(batches(1)), to_loss, optimizer, 3)
    assert torch.equal(model[0].weight, kept)
    assert done.params_after < done.params_before


def test_what_the_function_returns_is_summed():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Pruner(model).rebuild_model(next(batches(1)), lambda model, batch: {"out": model(batch[0])}, optimizer, 5)
    assert model[0].out_channels + model[3].out_channels == 35


@pytest.mark.parametrize(
    ("function", "count", "message"),
    [
        (to_loss, 0, "^prune_num: must be at least 1, got 0"),
        (to_loss, 39, "^prune_num: only 37 channels of this model can go within these limits, got 39"),
        (lambda model, batch: torch.zeros(()), 3, "^to_loss_fn: must call the model that it is given"),
        (lambda model, batch: (model(batch[0]), None)[1], 3, "^to_loss: must return a tensor"),
    ],
)
def test_what_is_refused(function, count, message):
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises((GraphError, RuntimeError), match=message):
        Pruner(model).rebuild_model(next(batches(1)), function, torch.optim.SGD(model.parameters(), lr=0.1), count)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_no_process_group():
    with pytest.raises(GraphError, match=r"^distributed: there is no process group, got True"):
        Pruner(net(), True)


@pytest.mark.slow
def test_two_ranks(tmp_path):
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(WORKER)]
    done = subprocess.run(
        [*command, str(tmp_path)], check=False, env=environment, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["structure"] == second["structure"]
    assert sum(sum(last - start + 1 for start, last in kept["at"])
               for name, kept in first["structure"]["kept"].items() if name.endswith("bias:0")) == 48 - 14  # fmt: skip
    assert all(torch.equal(value, second["state"][name]) for name, value in first["state"].items())
    assert first["seen"] != second["seen"]
    for mine, theirs in zip(first["grads"], second["grads"], strict=True):
        for (got, alone), (_, other) in zip(mine, theirs, strict=True):
            torch.testing.assert_close(got, (alone + other) / 2)
    for mine, theirs in zip(first["by_hand"], second["by_hand"], strict=True):  # the wrapper, its module
        assert mine["state"]["0.weight"].shape == (21, 6) and mine["state"]["2.weight"].shape == (23, 21)
        assert all(torch.equal(value, theirs["state"][name]) for name, value in mine["state"].items())
        for (got, alone), (_, other) in zip(mine["pairs"], theirs["pairs"], strict=True):
            torch.testing.assert_close(got, (alone + other) / 2)
    for each in (first, second):
        assert [text.partition(",")[0] for text in each["refused"]] == [
            "plan: differs between the ranks; make it on one rank and broadcast it",
            "model: wrapped with a process group of its own",
            "0.weight: is sharded over ranks (FSDP",
        ]
