"""The clock, the order of the hooks, and what attach leaves behind."""

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch

from pruning_core import Pruning
from pruning_core.masks.clock import Clock
from tests.support.loops import loss_of, small_net, train


def clock_of(*events):
    """Runs ("begin", step) and ("finish", skipped) events and gives ``now`` after each."""
    clock, seen = Clock(), []
    for kind, value in events:
        getattr(clock, kind)(value)
        seen.append(clock.now)
    return seen


def test_without_a_count_finished_steps_are_counted():
    assert clock_of(("begin", None), ("finish", False), ("begin", None), ("finish", False)) == [0, 1, 1, 2]


def test_a_skipped_step_is_none():
    assert clock_of(("finish", False), ("finish", True), ("finish", torch.tensor(True)), ("finish", False)) == [
        1,
        1,
        1,
        2,
    ]


def test_verdicts_on_a_device_are_read_when_asked():
    clock = Clock()
    for skipped in (True, False, True, False, False):
        clock.finish(torch.tensor(skipped))
    assert clock.at_most == 5
    assert clock.now == 3
    assert clock.at_most == 3


def test_a_given_count_is_the_clock():
    assert clock_of(("begin", 100), ("finish", False), ("begin", 101), ("begin", 102), ("finish", False)) == [
        *(100, 101, 101, 102, 103)
    ]


def test_a_count_that_restarts_is_counted_on():
    events = [("begin", 0), ("finish", False), ("begin", 1), ("finish", False), ("begin", 0), ("finish", False)]
    with pytest.warns(
        UserWarning, match="the step went from 1 to 0, as a count within an epoch does; counting on from 2"
    ):
        assert clock_of(*events) == [0, 1, 1, 2, 2, 3]


def test_the_same_count_after_a_finished_step_is_a_restart_after_a_skipped_one_it_is_not():
    with pytest.warns(UserWarning, match="from 0 to 0"):
        assert clock_of(("begin", 0), ("finish", False), ("begin", 0)) == [0, 1, 1]
    for skipped in (True, torch.tensor(True)):
        assert clock_of(("begin", 0), ("finish", skipped), ("begin", 0)) == [0, 0, 0]


def test_a_restarting_count_warns_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        clock_of(*[("begin", 0), ("finish", False)] * 5)
    assert len(caught) == 1


@pytest.mark.parametrize("step", [-1, 2.5, "3", True])
def test_a_count_must_be_a_whole_number(step):
    with pytest.raises(ValueError, match="local_step must be a whole number from 0, got"):
        Clock().begin(step)


def pruner_for(model, options=None):
    pruner = Pruning(options or {"pattern": "1x1", "end_step": 4})
    pruner.model = model
    return pruner


@pytest.mark.parametrize(
    "hook", ["on_step_begin", "on_before_optimizer_step", "on_after_optimizer_step", "on_train_end"]
)
def test_hooks_before_training_begins_say_what_to_do(hook):
    with pytest.raises(RuntimeError, match=f"{hook}: training has not begun.*on_train_begin"):
        getattr(pruner_for(small_net()), hook)()


def test_no_model():
    with pytest.raises(RuntimeError, match=r"on_train_begin: no model to prune; set pruner\.model = model first"):
        Pruning().on_train_begin()


@pytest.mark.parametrize("what", ["report", "masks", "state_dict"])
def test_nothing_to_tell_before_there_are_masks(what):
    with pytest.raises(RuntimeError, match=f"{what}: there are no masks yet; call on_train_begin or attach first"):
        getattr(pruner_for(small_net()), what)()


def test_training_begins_once():
    pruner = pruner_for(small_net())
    pruner.on_train_begin()
    pruner.on_train_begin()  # nothing has happened yet
    pruner.on_step_begin()
    loss_of(pruner.model, 0).backward()
    pruner.on_before_optimizer_step()
    pruner.on_after_optimizer_step()
    with pytest.raises(RuntimeError, match="on_train_begin: training has begun already; call on_train_end"):
        pruner.on_train_begin()
    with pytest.raises(RuntimeError, match="update_items_for_all_pruners: training has begun; call it before"):
        pruner.update_items_for_all_pruners(end_step=9)


def test_a_forgotten_hook_is_told():
    pruner = pruner_for(small_net())
    pruner.on_train_begin()
    pruner.on_step_begin()
    with pytest.raises(RuntimeError, match="on_before_optimizer_step was not called in this step"):
        pruner.on_after_optimizer_step()


def test_explicit_hooks_and_attach_do_not_mix():
    model = small_net()
    pruner = Pruning({"end_step": 4}).attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match="attached to the optimizer already"):
        pruner.on_after_optimizer_step()


def test_attach_needs_the_models_own_optimizer():
    model, other = small_net(), small_net()
    with pytest.raises(ValueError, match="attach: needs at least one optimizer, got none"):
        Pruning().attach(model)
    with pytest.raises(ValueError, match="attach: needs torch optimizers, got int"):
        Pruning().attach(model, 3)
    with pytest.raises(ValueError, match="the optimizers hold none of the pruned weights"):
        Pruning().attach(model, torch.optim.SGD(other.parameters(), lr=0.1))


def test_attaching_again_before_the_first_step_replaces_the_hooks():
    model = small_net()
    first, second = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    pruner = Pruning({"end_step": 4}).attach(model, first)
    pruner.attach(model, second)
    assert not first._optimizer_step_post_hooks
    assert len(second._optimizer_step_post_hooks) == 1


def test_with_needs_attach():
    with pytest.raises(RuntimeError, match=r"nothing to drive it; write Pruning\(...\).attach"), Pruning():
        pass


def test_a_frozen_layer_is_named():
    model = small_net()
    optimizer = torch.optim.SGD(list(model.parameters())[2:], lr=0.1)
    with pytest.warns(UserWarning, match="no optimizer holds 0.weight; it is masked but never trained"):
        Pruning({"pruning_type": "magnitude", "pattern": "1x1"}).attach(model, optimizer)
    assert (model[0].weight == 0).any()


def test_a_parameter_replaced_under_the_pruner_is_an_error():
    for replaced in (torch.nn.Parameter(torch.randn(18, 100)), torch.nn.Parameter(torch.randn(18, 192))):
        model = small_net()
        pruner = pruner_for(model)
        pruner.on_train_begin()
        loss_of(model, 0).backward()
        pruner.on_before_optimizer_step()
        model[5].weight = replaced
        with pytest.raises(
            RuntimeError, match=r"5\.weight: the parameter changed under the pruner, from shape \(18, 192\)"
        ):
            pruner.on_after_optimizer_step()


def test_a_layer_replaced_under_the_pruner_is_an_error():
    model = small_net()
    pruner = pruner_for(model)
    pruner.on_train_begin()
    model[5] = torch.nn.Linear(192, 18)
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="5: this layer was replaced or removed under the pruner"):
        pruner.on_before_optimizer_step()
    with pytest.raises(RuntimeError, match="5: this layer was replaced or removed"):
        pruner.report()


def test_a_schedule_longer_than_training_is_told_at_the_beginning_and_at_the_end():
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(
        UserWarning, match=r"pruning_configs\[0\].end_step: 40 lies after the last of 10 optimizer steps"
    ):
        pruner = Pruning({"end_step": 40}).attach(model, optimizer, total_steps=10)
    train(model, optimizer, range(10))
    with pytest.warns(UserWarning, match=r"stopped at step 10 of end_step 40, at sparsity 0\.331 of 0\.8"):
        pruner.on_train_end()


def test_training_that_stops_exactly_at_the_end_reaches_the_target():
    for options in ({"pattern": "1x1"}, {"pruning_type": "snip_momentum_progressive", "pattern": "4x1"}):
        model = small_net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with Pruning({"end_step": 10, "pruning_frequency": 4, **options}).attach(model, optimizer) as pruner:
            train(model, optimizer, range(10))
        assert pruner.report().groups[0].reached == pytest.approx(0.8, abs=4 / 2000)


def test_attach_leaves_nothing_behind():
    model = small_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    keys, attributes = list(model.state_dict()), {n: set(vars(m)) for n, m in model.named_modules()}
    state = set(vars(optimizer))
    storage = [p.data_ptr() for p in model.parameters()]
    with Pruning({"end_step": 3}).attach(model, optimizer) as pruner:
        train(model, optimizer, range(5))
        assert [p.data_ptr() for p in model.parameters()] == storage, "masks are applied in place"
        pickle.loads(pickle.dumps(model))  # noqa: S301
        copy.deepcopy((model, optimizer))
        assert list(model.state_dict()) == keys
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert set(vars(optimizer)) == state
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    for module in model.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
    gone = weakref.ref(pruner)
    del pruner
    gc.collect()
    assert gone() is None


def test_an_exception_takes_the_hooks_away_and_passes():
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(KeyboardInterrupt), Pruning({"end_step": 9}).attach(model, optimizer):
        raise KeyboardInterrupt
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0")
def test_a_compiled_model_trains_on_masked_weights():
    model = small_net()
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(compiled.parameters(), lr=0.1)
    with Pruning({"end_step": 3, "op_names": ["^0$", "^7$"]}).attach(compiled, optimizer) as pruner:
        train(compiled, optimizer, range(5))
    assert list(pruner.masks()) == ["0.weight", "7.weight"]
    assert torch.equal(compiled(torch.ones(1, 3, 8, 8)), model(torch.ones(1, 3, 8, 8)))


def test_user_functions_run_with_the_hooks_live(capsys):
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = Pruning({"pattern": "1x1", "end_step": 4})
    pruner.model = model

    def train_func(trained):
        assert trained is model
        for step in range(6):
            pruner.on_step_begin(step)
            loss_of(trained, step).backward()
            pruner.on_before_optimizer_step()
            optimizer.step()
            pruner.on_after_optimizer_step()
            optimizer.zero_grad()

    pruner.train_func = train_func
    pruner.eval_func = lambda evaluated: round(sum((p == 0).sum().item() for p in evaluated.parameters()))
    assert pruner() is model
    assert pruner.metrics["before"] == 0
    assert pruner.metrics["after"] > 1000
    out = capsys.readouterr().out
    assert "reached 80.0" in out
    assert f"metric: before 0, after {pruner.metrics['after']}" in out


def test_user_functions_may_call_on_train_begin_themselves():
    model = small_net()
    pruner = Pruning({"pruning_type": "magnitude"})
    pruner.model = model

    def train_func(trained):
        pruner.on_train_begin()
        pruner.on_step_begin(0)
        pruner.on_train_end()

    pruner.train_func = train_func
    pruner()
    assert pruner._groups[0].done


def test_user_functions_that_are_missing():
    with pytest.raises(RuntimeError, match="train_func: not set"):
        pruner_for(small_net())()
    pruner = Pruning()
    pruner.train_func = print
    with pytest.raises(RuntimeError, match="model: not set"):
        pruner()


def test_ema_copies_are_masked_by_name():
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    with Pruning({"end_step": 4}).attach(model, optimizer) as pruner:
        train(model, optimizer, range(6), after=lambda step: ema.update_parameters(model))
        assert pruner.mask_(ema.module) is ema.module
        for name, mask in pruner.masks().items():
            assert not ema.module.get_parameter(name)[~mask].any()
            assert ema.module.get_parameter(name)[mask].any()
        with pytest.raises(ValueError, match=r"mask_: 0\.weight is not in that model, got nothing; pass a copy"):
            pruner.mask_(torch.nn.Linear(2, 2))


def test_moving_the_model_takes_the_masks_along():
    model = small_net()
    pruner = pruner_for(model, {"pruning_type": "magnitude"})
    pruner.on_train_begin()
    pruner.on_step_begin()
    model.double()
    pruner.on_after_optimizer_step()
    for name, mask in pruner.masks().items():
        assert not model.get_parameter(name)[~mask].any()
