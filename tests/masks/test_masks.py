"""Progressive, locked, regularized, per-layer and one-shot masks: the numbers they must show."""

import gc
import math
import sys
import warnings

import pytest
import torch
from torch import nn

from pruning_core import Pruning
from tests.support.loops import loss_of, small_net, sparsity, train


def zeros_of(model):
    return sum(int((p == 0).sum()) for n, p in model.named_parameters() if n.endswith("weight"))


def square_layer(rows=8, columns=8):
    layer = nn.Linear(columns, rows, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(1, rows * columns + 1.0).view(rows, columns))
    return layer


def trace(options, steps):
    """Zeros of an 8x8 layer after each step of a loop whose optimizer changes nothing."""
    layer = square_layer()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    pruner, seen = Pruning(options).attach(layer, optimizer), []
    seen.append(int((layer.weight == 0).sum()))
    for _ in range(steps):
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step()
        seen.append(int((layer.weight == 0).sum()))
    return seen, layer.weight.detach(), pruner


def test_basic_pruning_cuts_whole_units_at_each_update():
    options = {"pruning_type": "magnitude", "pattern": "1xchannel", "sparsity_decay_type": "linear"}
    seen, _, _ = trace(options | {"target_sparsity": 0.75, "end_step": 12, "pruning_frequency": 4}, 13)
    assert seen == [0, 0, 0, 0, 16, 16, 16, 16, 32, 32, 32, 32, 48, 48]


def test_progressive_pruning_cuts_the_doomed_rows_in_four_portions():
    options = {"pruning_type": "magnitude_progressive", "pattern": "1xchannel", "sparsity_decay_type": "linear"}
    seen, _, _ = trace(options | {"target_sparsity": 0.75, "end_step": 12, "pruning_frequency": 4}, 13)
    #        0           4: two rows of eight are doomed   8: two more            12: whole, at once
    assert seen == [0, 0, 0, 0, 4, 8, 12, 16, 20, 24, 28, 32, 48, 48]


def test_progressive_portions_go_by_score_or_by_position():
    options = {"pattern": "1xchannel", "sparsity_decay_type": "linear", "target_sparsity": 0.5, "end_step": 8}
    options |= {"pruning_frequency": 4, "pruning_type": "magnitude_progressive"}
    for order, expected in (("scores", [0, 1, 2, 3]), ("linear", [0, 1, 8, 9])):
        _, weight, _ = trace(options | {"progressive_type": order}, 4)
        # The first portion of the two doomed rows: the four smallest weights, or the first quarter of each row.
        assert (weight == 0).flatten().nonzero().flatten().tolist() == expected


def test_progressive_with_fewer_steps_than_portions():
    options = {"pruning_type": "magnitude_progressive", "pattern": "1xchannel", "sparsity_decay_type": "linear"}
    seen, _, _ = trace(options | {"target_sparsity": 0.75, "end_step": 6, "pruning_frequency": 2}, 6)
    assert seen == [0, 0, 8, 16, 24, 32, 48]
    seen, _, _ = trace(options | {"target_sparsity": 0.75, "end_step": 3}, 3)
    assert seen == [0, 16, 32, 48]


def test_a_clock_that_jumps_over_portions_finishes_them_first():
    layer = square_layer()
    options = {"pruning_type": "magnitude_progressive", "pattern": "1xchannel", "sparsity_decay_type": "linear"}
    pruner = Pruning(options | {"target_sparsity": 0.75, "end_step": 12, "pruning_frequency": 4})
    pruner.model = layer
    pruner.on_train_begin()
    seen = []
    for step in (4, 8, 12):
        pruner.on_step_begin(step)
        seen.append(int((layer.weight == 0).sum()))
        pruner.on_before_optimizer_step()
        pruner.on_after_optimizer_step()
        seen.append(int((layer.weight == 0).sum()))
    #  4: one portion of two rows, 5: two; 8 waits for the step's end, then: both rows and half of two more; 12: whole
    assert seen == [4, 8, 8, 24, 24, 48]


def test_progressive_portions_are_an_option():
    options = {"pruning_type": "magnitude_progressive", "pattern": "1xchannel", "progressive_steps": 2}
    options |= {"sparsity_decay_type": "linear", "target_sparsity": 0.5, "end_step": 8, "pruning_frequency": 4}
    assert trace(options, 8)[0] == [0, 0, 0, 0, 8, 8, 16, 16, 32]


def test_pattern_lock_keeps_the_zeros_that_are_there():
    model = small_net()
    with torch.no_grad():
        for module in (model[0], model[5]):
            module.weight[torch.rand_like(module.weight) < 0.6] = 0
    before = {name: p == 0 for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for pattern in ("4x1", "2:4", "1x1", "1xchannel"):
        with Pruning({"pruning_type": "pattern_lock", "pattern": pattern}).attach(model, optimizer):
            train(model, optimizer, range(4))
        for name, p in model.named_parameters():
            if name.endswith("weight"):
                assert torch.equal(p == 0, before[name])


def test_pattern_lock_without_zeros_says_so():
    model = small_net()
    with pytest.warns(UserWarning, match="pattern_lock found no zero weight; nothing is locked"):
        Pruning({"pruning_type": "pattern_lock"}).attach(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_group_lasso_takes_the_golden_step():
    """w -= lr * reg_coeff * w / ||w_unit||, before the optimizer's own step."""
    layer = nn.Linear(2, 4, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 0.0], [4.0, 0.0], [0.0, 0.0], [0.0, 0.0]]))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    options = {"pattern": "4x1", "end_step": 10, "reg_type": "group_lasso", "reg_coeff": 2.0, "target_sparsity": 0.1}
    pruner = Pruning({**options, "sparsity_decay_type": "cube"}).attach(layer, optimizer)
    layer.weight.grad = torch.zeros(4, 2)
    optimizer.step()
    # The first column's norm is 5: its entries shrink by 0.5 * 2 / 5. The second column is zero and stays so.
    assert layer.weight.tolist() == [[pytest.approx(2.4), 0], [pytest.approx(3.2), 0], [0, 0], [0, 0]]
    optimizer.param_groups[0]["lr"] = 3.0  # a step of 6 against a norm of 4: to zero, not past it
    optimizer.step()
    assert layer.weight.abs().sum() == 0
    assert pruner.step == 2


def test_group_lasso_ends_with_the_schedule():
    layer = square_layer()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    options = {"pattern": "4x1", "start_step": 2, "end_step": 4, "reg_type": "group_lasso", "reg_coeff": 1.0}
    Pruning({**options, "target_sparsity": 0.1}).attach(layer, optimizer)
    norms = []
    for _ in range(8):
        layer.weight.grad = torch.zeros_like(layer.weight)
        optimizer.step()
        norms.append(layer.weight[:, 4:].norm().item())
    assert norms[0] == norms[1] > norms[2] > norms[3] > norms[4] == norms[5] == norms[7]


LASSO = {"pattern": "4x1", "end_step": 9, "pruning_frequency": 3, "reg_type": "group_lasso", "reg_coeff": 0.5}


def lasso_run(drive: str, *, others: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = small_net()
    halves = [list(model[0].parameters()), [p for layer in list(model)[1:] for p in layer.parameters()]]
    optimizers = [torch.optim.SGD(half, lr=rate, momentum=0.9) for half, rate in zip(halves, (0.2, 0.01), strict=True)]
    stranger = torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=100.0)
    pruner = Pruning(LASSO)
    if drive == "attach":
        pruner.attach(model, *optimizers)
    else:
        pruner.model = model
        pruner.on_train_begin()
    for step in range(12):
        if drive == "hooks":
            pruner.on_step_begin()
        loss_of(model, step).backward()
        if drive == "hooks":
            pruner.on_before_optimizer_step()
        if others:
            stranger.step()
        for optimizer in optimizers:
            optimizer.step()
        if drive == "hooks":
            pruner.on_after_optimizer_step()
        model.zero_grad()
    return model


@pytest.mark.parametrize("others", [False, True])
def test_group_lasso_under_explicit_hooks_takes_the_rate_of_the_optimizer_that_steps(others):
    """Two optimizers with rates of their own, and one that holds none of the weights: all as under ``attach``."""
    given, seen = lasso_run("attach"), lasso_run("hooks", others=others)
    assert zeros_of(given) > 0
    assert all(torch.equal(a, b) for a, b in zip(given.parameters(), seen.parameters(), strict=True))


def test_group_lasso_under_explicit_hooks_without_a_step_of_an_optimizer():
    model = small_net()
    pruner = Pruning(LASSO)
    pruner.model = model
    pruner.on_train_begin()
    loss_of(model, 0).backward()
    pruner.on_before_optimizer_step()
    expected = (
        r"reg_type: group_lasso reads the learning rate from the optimizer that holds the pruned weights, got no step "
        r"of one between on_before_optimizer_step and on_after_optimizer_step; set pruner\.optimizer before training"
    )
    with pytest.raises(RuntimeError, match=expected):
        pruner.on_after_optimizer_step()


def test_group_lasso_leaves_no_hook_behind():
    """The hook on all optimizers ends with the step, or with the pruner when the loop breaks off."""
    hooks = sys.modules["torch.optim.optimizer"]._global_optimizer_pre_hooks
    before = dict(hooks)
    lasso_run("hooks")
    assert hooks == before
    model = small_net()
    pruner = Pruning(LASSO)
    pruner.model = model
    pruner.on_train_begin()
    for _ in range(2):  # the second time the hook of the first is in place still
        loss_of(model, 0).backward()
        pruner.on_before_optimizer_step()
        assert len(hooks) == len(before) + 1
    del pruner
    gc.collect()
    assert hooks == before


def test_group_lasso_that_waits_when_the_run_ends_shrinks_nothing():
    hooks = sys.modules["torch.optim.optimizer"]._global_optimizer_pre_hooks
    before = dict(hooks)
    model = small_net()
    pruner = Pruning(LASSO | {"end_step": 0})
    pruner.model = model
    pruner.on_train_begin()
    loss_of(model, 0).backward()
    pruner.on_before_optimizer_step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the target is not reached
        pruner.on_train_end()
    gc.collect()
    assert hooks == before


def test_a_step_that_is_skipped_for_its_gradients_shrinks_nothing():
    model = small_net()
    dense = [p.detach().clone() for p in model.parameters()]
    pruner = Pruning(LASSO | {"start_step": 0})
    pruner.model = model
    pruner.on_train_begin()
    loss_of(model, 0).backward()
    model[0].weight.grad[0] = float("inf")
    pruner.on_before_optimizer_step()
    pruner.on_after_optimizer_step()
    assert all(torch.equal(a, b) for a, b in zip(dense, model.parameters(), strict=True))
    assert pruner.step == 0


def test_snip_at_initialization_cuts_as_soon_as_a_gradient_is_there():
    model = small_net()
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    pruner = Pruning({"pruning_type": "snip", "pattern": "1x1", "target_sparsity": 0.5})
    pruner.model = model
    pruner.on_train_begin()
    pruner.on_step_begin(0)
    assert zeros_of(model) == 0
    loss_of(model, 0).backward()
    pruner.on_before_optimizer_step()
    scores = {n: (p * p.grad).abs().flatten() for n, p in dense.items() for p2 in [model.get_parameter(n)]
              for p.grad in [p2.grad] if n.endswith("weight")}  # fmt: skip
    everything = torch.cat(list(scores.values()))
    assert zeros_of(model) == math.floor(everything.numel() * 0.5 + 0.5)
    cut = torch.cat([(model.get_parameter(n) == 0).flatten() for n in scores])
    assert everything[cut].max() <= everything[~cut].min()


def test_a_late_one_shot_cut_uses_the_scores_so_far():
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    with Pruning({"start_step": 3, "end_step": 3, "pattern": "1x1"}).attach(model, optimizer):
        train(model, optimizer, range(5), after=lambda step: seen.append(zeros_of(model) > 0))
    assert seen == [False, False, True, True, True]


def test_several_pruners_each_with_their_layers_and_the_first_one_wins():
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    configs = [
        {"op_names": ["^0$", "^2$"], "pattern": "1x1", "target_sparsity": 0.9, "end_step": 4},
        {"pattern": "4x1", "target_sparsity": 0.5, "end_step": 6},
    ]
    with Pruning(configs).attach(model, optimizer) as pruner:
        train(model, optimizer, range(8))
    first, second = pruner.report().groups
    assert [row.name for row in first.layers] == ["0.weight", "2.weight"]
    assert [row.name for row in second.layers] == ["5.weight", "7.weight"]
    assert first.reached == pytest.approx(0.9, abs=1e-3)
    assert second.reached == pytest.approx(0.5, abs=1e-3)


def test_equal_minimum_and_maximum_give_every_layer_the_same_share():
    model = small_net()
    options = {"min_sparsity_ratio_per_op": 0.75, "max_sparsity_ratio_per_op": 0.75, "target_sparsity": 0.75}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Pruning({"pattern": "1x1", "end_step": 4, **options}).attach(model, optimizer) as pruner:
        train(model, optimizer, range(5))
    for row in pruner.report().groups[0].layers:
        assert row.reached == pytest.approx(0.75, abs=1.5 / row.weights)


def test_scores_are_dropped_when_they_no_longer_matter():
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Pruning({"end_step": 4}).attach(model, optimizer) as pruner:
        train(model, optimizer, range(3))
        assert all(weight.score is not None for weight in pruner._groups[0].weights)
        train(model, optimizer, range(3, 6))
        assert all(weight.score is None for weight in pruner._groups[0].weights)


def test_last_step_criteria_gather_only_just_before_a_change(monkeypatch):
    from pruning_core.criteria import Snip

    calls = []
    score = Snip.score
    monkeypatch.setattr(Snip, "score", lambda self, w, g: calls.append(1) or score(self, w, g))
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"pruning_type": "snip", "end_step": 10, "pruning_frequency": 5, "op_names": ["^5$"]}
    with Pruning(options).attach(model, optimizer):
        train(model, optimizer, range(20))
    assert len(calls) == 2  # steps 4 and 9


def test_unreachable_targets_are_refused_when_training_begins():
    layer = nn.Linear(4, 2)  # 1xchannel: two units, and the last one always stays
    with pytest.raises(ValueError, match=r"pruning_configs\[0\].max_sparsity_ratio_per_op: 0.98 .* leaves room for 4"):
        Pruning({"pattern": "1xchannel", "target_sparsity": 0.95}).attach(
            nn.Sequential(layer, nn.Linear(2, 1)), torch.optim.SGD(layer.parameters(), lr=0.1)
        )


def test_n_of_m_lists_the_layers_it_cannot_fit():
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Pruning({"pattern": "2:4", "end_step": 2}).attach(model, optimizer) as pruner:
        train(model, optimizer, range(3))
    report = pruner.report()
    assert [row.name for row in report.groups[0].layers] == ["5.weight"]
    assert sparsity(model[5].weight) == 0.5
    notes = {row.name: row.note for row in report.dense}
    assert notes["0.weight"] == "its 3 input channels are not a multiple of 4 (pattern 2:4)"
    assert "5 input channels" in notes["2.weight"]
    assert "18 input channels" in notes["7.weight"]
    with pytest.raises(ValueError, match="0 cannot be pruned: its 3 input channels are not a multiple of 4"):
        Pruning({"pattern": "2:4", "op_names": ["^0$"]}).attach(model, optimizer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions(dtype):
    model = small_net().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Pruning({"pattern": "1x1", "end_step": 3}).attach(model, optimizer) as pruner:
        for step in range(5):
            for i, parameter in enumerate(model.parameters()):
                generator = torch.Generator().manual_seed(100 * step + i)
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
            optimizer.step()
    assert pruner.report().groups[0].reached == pytest.approx(0.8, abs=1e-3)


def test_channels_last_weights_are_masked_in_place():
    model = small_net().to(memory_format=torch.channels_last)
    strides = [p.stride() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Pruning({"end_step": 3}).attach(model, optimizer) as pruner:
        train(model, optimizer, range(5))
    assert [p.stride() for p in model.parameters()] == strides
    assert pruner.report().groups[0].reached == pytest.approx(0.8, abs=4 / 2000)


def test_what_a_pruner_answers():
    """Two pruners with their own windows: done when both are, asked and sparsity over all their weights."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 16, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    one = {"pattern": "1x1", "pruning_type": "magnitude", "target_sparsity": 0.5}
    pruner = Pruning([{**one, "op_names": ["^0$"]}, {**one, "op_names": ["^1$"], "start_step": 2, "end_step": 2}])
    assert (pruner.done, pruner.asked, pruner.sparsity, pruner.pruners, pruner.sharded) == (False, 0.0, 0.0, (), False)
    with pruner.attach(model, optimizer):
        assert [(config.start_step, names, weights) for config, names, weights in pruner.pruners] == [
            (0, ("0.weight",), 64),
            (2, ("1.weight",), 128),
        ]
        for step in range(3):
            assert pruner.done == (step >= 2)
            expected = 0.5 if step >= 2 else 0.5 * 64 / 192
            assert pruner.asked == pytest.approx(expected)
            assert (
                pruner.sparsity
                == pytest.approx(expected)
                == 1 - (sum(mask.sum().item() for mask in pruner.masks().values()) / 192)
            )
            optimizer.step()


def test_limits_of_single_layers():
    """A limit by name binds in the global ranking; the total stays exact."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False))
    with torch.no_grad():
        model[0].weight.mul_(0.01)  # would go first
        model[2].weight.mul_(100)  # would stay
    config = {"pattern": "1x1", "pruning_type": "magnitude", "target_sparsity": 0.5}
    limits = {"^0$": 0.2, "^2$": [0.4, 0.6]}
    pruner = Pruning({**config, "limits": limits})
    pruner.model = model
    pruner.on_train_begin()
    pruner.on_step_begin()
    zeros = [int((layer.weight == 0).sum()) for layer in model]
    assert sum(zeros) == 150
    assert zeros[0] == 20 and zeros[2] == 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limits": 0.5}, r"limits: must be a mapping of layers, got 0\.5; one for all is max_sparsity_ratio_per_op"),
        ({"limits": {"0": 2}}, r"limits: 0 must lie between 0 and 1, the least first, got 2"),
        ({"limits": {"0": [0.5, 0.1]}}, r"limits: 0 must lie between 0 and 1, the least first, got \[0\.5, 0\.1\]"),
        (
            {"limits": {"0": [0.9, 1.0]}},
            r"limits: 0 must lose at least 0\.9, got target_sparsity 0\.8; lower the least",
        ),
        ({"limits": {"(": 0.5}}, r"limits: not a regular expression"),
        ({"limits": {3: 0.5}}, r"limits: names must be strings, got 3"),
        ({"limits": {"0": "half"}}, r"limits: 0 must be the share that may go, or \[at least, at most\], got 'half'"),
        (
            {"limits": {"encoder": 0.5}},
            r"pruning_configs\[0\]\.limits: matches no layer that takes part, got 'encoder'",
        ),
        ({"limits": {"0": 0.5}}, r"max_sparsity_ratio_per_op: 0\.5 of every layer leaves room for"),
        ({"limits": {"0": 0.5}, "pruning_scope": "local"}, r"max_sparsity_ratio_per_op: 0\.5 of every layer leaves"),
    ],
)
def test_limits_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        pruner = Pruning({"pattern": "1x1", **options})
        pruner.model = nn.Sequential(nn.Linear(8, 8))
        pruner.on_train_begin()
