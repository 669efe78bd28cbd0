"""Faults measured in Neural Compressor's pruner, each as something that works here. The numbers are those of the list
in docs/coming-from-neural-compressor.md."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from pruning_core import Pruning, WeightPruningConfig, checkpoint
from tests.support.loops import loss_of, small_net, sparsity, train


def pruned(options, model=None, steps=12, optimizer=torch.optim.SGD, lr=0.1):
    model = model or small_net()
    optimizer = optimizer(model.parameters(), lr=lr)
    with Pruning(options).attach(model, optimizer) as pruner:
        train(model, optimizer, range(steps))
    return model, pruner


def test_01_the_default_configuration_works():
    _, pruner = pruned(None)
    assert pruner.report().groups[0].reached == pytest.approx(0.8, abs=4 / 2000)


def test_02_no_default_is_shared():
    with pytest.raises(ValueError, match="end_step"):
        WeightPruningConfig(start_step=4)
    assert WeightPruningConfig(target_sparsity=0.5, start_step=1, end_step=5).pruners[0].end_step == 5
    options = {"excluded_op_names": []}
    for _ in range(2):
        _, pruner = pruned(options)
        assert len(pruner._groups[0].weights) == 4
    assert options == {"excluded_op_names": []}
    assert WeightPruningConfig().pruners[0].excluded_op_names == []


def test_03_a_head_called_fc_excludes_no_look_alikes_and_no_head_is_excluded():
    class Fc(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2, self.fc = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    pruner = Pruning({"excluded_op_names": ["^fc$"]})
    pruner.model = Fc()
    pruner.on_train_begin()
    assert list(pruner.masks()) == ["fc1.weight", "fc2.weight"]
    pruner = Pruning()
    pruner.model = Fc()
    pruner.on_train_begin()
    assert list(pruner.masks()) == ["fc1.weight", "fc2.weight", "fc.weight"]


def test_04_misspelt_options_are_errors():
    with pytest.raises(ValueError, match=r"target_sparsty: unknown option, got 0\.3; did you mean 'target_sparsity'"):
        WeightPruningConfig([{"target_sparsty": 0.3}])


def test_05_the_schedule_is_checked_at_construction():
    with pytest.raises(ValueError, match="sparsity_decay_type: unknown schedule, got 'expo'"):
        WeightPruningConfig([{"sparsity_decay_type": "expo", "end_step": 10}])


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("kind", ["snip_momentum", "snip", "magnitude"])
def test_06_layers_that_do_not_divide_are_pruned_too(kind, scope):
    """255 output channels, as in YOLO's detection heads, with 4x1 blocks."""
    model = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 255, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model, pruner = pruned({"pruning_type": kind, "pruning_scope": scope, "end_step": 5}, model, 6)
    assert pruner.report().groups[0].reached == pytest.approx(0.8, abs=8 / 18000)  # a block or two
    last = model[1].weight[252:].flatten(1)
    for column in last.T:
        assert (column == 0).all() or (column != 0).all()


@pytest.mark.parametrize("pattern", ["1:4", "2:8", "1:2", "2:4", "3:4"])
def test_07_n_of_m_is_reported_as_it_is(pattern):
    model, pruner = pruned({"pattern": pattern, "end_step": 4}, nn.Sequential(nn.Flatten(), nn.Linear(192, 16)))
    n, m = map(int, pattern.split(":"))
    assert pruner.report().groups[0].reached == sparsity(model[1].weight) == 1 - n / m
    assert set((model[1].weight != 0).unflatten(1, (-1, m)).sum(-1).unique().tolist()) == {n}


def test_08_n_of_m_groups_stay_at_one_kernel_position():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model, pruner = pruned({"pattern": "2:4", "end_step": 4}, model, 6)
    groups = (model[1].weight != 0).permute(0, 2, 3, 1).unflatten(3, (-1, 4)).sum(-1)
    assert (groups == 2).all()
    assert [row.name for row in pruner.report().dense] == ["0.weight"]


def test_09_locking_a_2_of_4_pattern_keeps_the_model():
    model, _ = pruned({"pattern": "2:4", "end_step": 4, "op_names": ["^5$"]})
    before = model[5].weight == 0
    model, _ = pruned({"pruning_type": "pattern_lock", "pattern": "2:4", "op_names": ["^5$"]}, model)
    assert torch.equal(model[5].weight == 0, before)
    assert sparsity(model[5].weight) == 0.5


@pytest.mark.parametrize("pattern", ["2:4", "1x1"])
def test_10_progressive_works_for_every_pattern_and_reports_its_sparsity(pattern):
    options = {"pruning_type": "snip_momentum_progressive", "pattern": pattern, "target_sparsity": 0.5}
    model, pruner = pruned({**options, "end_step": 8, "pruning_frequency": 4, "op_names": ["^5$"]})
    assert pruner.report().groups[0].reached == sparsity(model[5].weight) == 0.5


@pytest.mark.parametrize("schedule", ["linear", "cos", "exp", "cube", "cubic"])
def test_11_frequency_1_reaches_the_target(schedule):
    _, pruner = pruned({"pattern": "1x1", "end_step": 10, "sparsity_decay_type": schedule}, steps=10)
    group = pruner.report().groups[0]
    assert group.zeros == math.floor(0.8 * group.weights + 0.5)


@pytest.mark.parametrize("target", [0.3, 0.8])
def test_12_a_frequency_above_the_span_does_not_zero_the_model(target):
    options = {"pattern": "1x1", "end_step": 10, "pruning_frequency": 1000, "target_sparsity": target}
    _, pruner = pruned(options)
    group = pruner.report().groups[0]
    assert group.zeros == math.floor(target * group.weights + 0.5)


def test_13_ties_do_not_overshoot():
    model = nn.Sequential(nn.Linear(50, 40), nn.Linear(40, 40))
    with torch.no_grad():
        for layer in model:
            layer.weight[:24] = 0  # 60 percent of the scores are equal
    pruner = Pruning({"pruning_type": "magnitude", "pattern": "1x1", "target_sparsity": 0.1})
    pruner.model = model
    pruner.on_train_begin()
    pruner.on_step_begin()
    cut = sum(int((~mask).sum()) for mask in pruner.masks().values())
    assert cut == 360


def test_14_magnitude_has_no_sign():
    layer = nn.Linear(100, 100)
    pruner = Pruning({"pruning_type": "magnitude", "pattern": "1x1", "target_sparsity": 0.5})
    pruner.model = layer
    positive = layer.weight > 0
    pruner.on_train_begin()
    pruner.on_step_begin()
    mask = pruner.masks()["weight"]
    assert mask[positive].float().mean() == pytest.approx(0.5, abs=0.03)
    assert mask[~positive].float().mean() == pytest.approx(0.5, abs=0.03)


def test_15_group_lasso_with_dead_blocks_stays_finite():
    model = small_net()
    with torch.no_grad():
        model[5].weight[:8] = 0
    options = {"end_step": 12, "reg_type": "group_lasso", "parameters": {"reg_coeff": 1e-4}}
    model, _ = pruned(options, model)
    assert all(p.isfinite().all() and p.abs().max() < 10 for p in model.parameters())


@pytest.mark.parametrize(("pattern", "axis"), [("1xchannel", 0), ("channelx1", 1)])
def test_16_channel_patterns_cut_channels_of_convolutions(pattern, axis):
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    options = {"pattern": pattern, "pruning_type": "magnitude", "target_sparsity": 0.5, "pruning_scope": "local"}
    pruner = Pruning(options)
    pruner.model = model
    pruner.on_train_begin()
    pruner.on_step_begin()
    for layer in (model[0], model[1]):
        channels = layer.weight.transpose(0, axis).flatten(1)
        dead = (channels == 0).all(1)
        assert dead.any()
        assert (channels[~dead] != 0).all()
        assert dead.float().mean() == 0.5


def test_17_a_global_option_does_not_lose_against_a_hidden_local_one():
    config = WeightPruningConfig([{"op_names": ["a"]}], pruning_type="snip_momentum_progressive")
    assert config.pruners[0].pruning_type == "snip_momentum_progressive"


def test_18_the_clock_counts_optimizer_steps_and_copies_are_masked():
    """Accumulation over four micro-batches: with attach, or with the caller's own count, the target is reached."""
    for explicit in (False, True):
        model = small_net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        pruner = Pruning({"pattern": "1x1", "end_step": 60 if explicit else 15})
        if explicit:
            pruner.model = model
            pruner.on_train_begin()
        else:
            pruner.attach(model, optimizer)
        ema = copy.deepcopy(model)
        for micro in range(60):
            if explicit:
                pruner.on_step_begin(micro)
            loss_of(model, micro).backward()
            if micro % 4 == 3:
                if explicit:
                    pruner.on_before_optimizer_step()
                optimizer.step()
                if explicit:
                    pruner.on_after_optimizer_step()
                optimizer.zero_grad()
                for mine, theirs in zip(ema.parameters(), model.parameters(), strict=True):
                    mine.data.lerp_(theirs.data, 0.1)
        assert pruner.report().groups[0].reached == pytest.approx(0.8, abs=1e-3)
        pruner.mask_(ema)
        for name, mask in pruner.masks().items():
            assert not ema.get_parameter(name)[~mask].any()


def test_19_a_fractional_frequency_is_an_error():
    with pytest.raises(ValueError, match=r"pruning_frequency: must be a whole number, got 2\.5"):
        WeightPruningConfig({"pruning_frequency": 2.5})


def test_20_criterion_type_is_not_ignored():
    assert WeightPruningConfig({"criterion_type": "magnitude"}).pruners[0].pruning_type == "magnitude"
    with pytest.raises(ValueError, match="pruning_type: is the same option as criterion_type, got both; keep one"):
        WeightPruningConfig({"criterion_type": "magnitude", "pruning_type": "snip"})


@pytest.mark.parametrize("interrupted", [20, 30, 45])
def test_21_resuming_ends_at_the_target(interrupted, tmp_path):
    def begin():
        torch.manual_seed(0)
        model = small_net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return model, optimizer, Pruning({"pattern": "1x1", "end_step": 40}).attach(model, optimizer)

    model, optimizer, pruner = begin()
    train(model, optimizer, range(interrupted))
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "pruner": pruner.state_dict()}
    checkpoint.save(state, tmp_path / "c.pt")
    train(model, optimizer, range(interrupted, 60))
    resumed, optimizer, again = begin()
    state = checkpoint.load(tmp_path / "c.pt")
    resumed.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    again.load_state_dict(state["pruner"])
    trace = []
    train(resumed, optimizer, range(interrupted, 60), after=lambda step: trace.append(again.report().groups[0].zeros))
    assert trace == sorted(trace)  # nothing regrows
    assert again.report().groups[0].reached == pytest.approx(0.8, abs=1e-3)
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_22_the_model_pickles_and_copies_without_its_pruner():
    model = small_net()
    size = len(pickle.dumps(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Pruning({"end_step": 4}).attach(model, optimizer):
        train(model, optimizer, range(5))
        assert len(pickle.dumps(model)) == pytest.approx(size, rel=0.05)
        copied = copy.deepcopy(model)
        assert copied.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("pattern", ["1x1", "4x1"])
@pytest.mark.parametrize("everywhere", [False, True])
def test_23_one_infinite_gradient_poisons_nothing(pattern, everywhere):
    def run(poisoned):
        torch.manual_seed(0)
        model = small_net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        pruner = Pruning({"pattern": pattern, "end_step": 10})
        pruner.model = model
        pruner.on_train_begin()
        for step in range(15):
            pruner.on_step_begin()
            loss_of(model, step).backward()
            if poisoned and step == 4:
                for parameter in model.parameters() if everywhere else [model[5].weight]:
                    parameter.grad.view(-1)[0] = torch.inf
            pruner.on_before_optimizer_step()
            if not (poisoned and step == 4):  # as a GradScaler does
                optimizer.step()
            pruner.on_after_optimizer_step()
            optimizer.zero_grad()
        return pruner.report().groups[0]

    clean, poisoned = run(False), run(True)
    assert poisoned.zeros == pytest.approx(clean.zeros, abs=4)
    for a, b in zip(clean.layers, poisoned.layers, strict=True):
        assert a.reached == pytest.approx(b.reached, abs=0.1)


@pytest.mark.filterwarnings("ignore:.*no gradient came for unused.weight")
def test_unused_parameters_do_not_crash_any_criterion():
    for kind in ("gradient", "snip", "snip_momentum", "magnitude"):
        model = small_net()
        model.add_module("unused", nn.Linear(4, 4))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with Pruning({"pruning_type": kind, "end_step": 3, "pattern": "1x1"}).attach(model, optimizer) as pruner:
            for step in range(4):
                optimizer.zero_grad()
                images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
                model[:8](images).square().sum().backward()
                optimizer.step()
        assert pruner.report().groups[0].reached == pytest.approx(0.8, abs=1e-3)
