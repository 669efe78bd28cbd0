"""Loss scaling, skipped steps, accumulation, fused and several optimizers."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pruning_core import Pruning
from pruning_core.masks import pruning as driver
from tests.support.loops import batch, loss_of, small_net

OPTIONS = {"pattern": "1x1", "end_step": 6, "pruning_frequency": 2}
POISON = (0, 1, 5)


def scaled_run(options, form, *, fused, steps=12, poison=(), dtype=torch.float16, unscale=True):
    """A GradScaler loop; on the poisoned iterations the loss is inf and the step is skipped."""
    torch.manual_seed(0)
    model = small_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=3)
    pruner = Pruning(options)
    if form == "attach":
        pruner.attach(model, optimizer)
    else:
        pruner.model, pruner.optimizer = model, optimizer
        pruner.on_train_begin()
    done = 0
    for iteration in range(steps):
        if form == "hooks":
            pruner.on_step_begin()
        images, labels = batch(done)
        with torch.autocast("cpu", dtype=dtype):
            loss = torch.nn.functional.cross_entropy(model(images).float(), labels)
        scaler.scale(loss * torch.inf if iteration in poison else loss).backward()
        if unscale:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        if form == "hooks":
            pruner.on_before_optimizer_step()
        scaler.step(optimizer)
        if form == "hooks":
            pruner.on_after_optimizer_step()
        scaler.update()
        optimizer.zero_grad()
        done += iteration not in poison
        for name, mask in pruner.masks().items():
            assert not model.get_parameter(name)[~mask].any()
    return model, pruner, done


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("form", ["hooks", "attach"])
def test_skipped_steps_advance_nothing(form, fused, dtype):
    """With three skipped steps among twelve, the run equals one of the nine steps that were made."""
    _, pruner, done = scaled_run(OPTIONS, form, fused=fused, poison=POISON, dtype=dtype)
    assert done == 9
    assert pruner.step == 9
    _, clean_pruner, _ = scaled_run(OPTIONS, form, fused=fused, steps=9, dtype=dtype)
    for name, mask in pruner.masks().items():
        # The loss scale halves at a skip; powers of two change no rounding above the underflow of half precision.
        same = (mask == clean_pruner.masks()[name]).float().mean()
        assert same > 0.97
    assert pruner.report().groups[0].zeros == clean_pruner.report().groups[0].zeros


@pytest.mark.parametrize(("fused", "unscale"), [(False, True), (True, True), (True, False)])
def test_scores_do_not_depend_on_the_loss_scale(fused, unscale):
    """Fused optimizers hand over scaled gradients unless the loop unscales; the score divides the scale out again."""
    options = {"pattern": "1x1", "start_step": 90, "end_step": 99}
    _, scaled, _ = scaled_run(options, "attach", fused=fused, steps=4, unscale=unscale, dtype=torch.bfloat16)
    torch.manual_seed(0)
    model = small_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    plain = Pruning(options).attach(model, optimizer)
    for step in range(4):
        images, labels = batch(step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(images).float(), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()
    for a, b in zip(scaled._groups[0].weights, plain._groups[0].weights, strict=True):
        assert torch.allclose(a.score, b.score, rtol=2e-2, atol=1e-7)


class NoWaiting(TorchDispatchMode):
    """Fails when anything reads a tensor's value, which on an accelerator waits for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a hook waits for the device"
        return func(*args, **(kwargs or {}))


def as_on_a_device(monkeypatch):
    """Verdicts stay tensors, as on an accelerator."""
    monkeypatch.setattr(driver, "_known", lambda flag: flag)


def test_hooks_do_not_wait_for_the_device_between_mask_changes(monkeypatch):
    as_on_a_device(monkeypatch)
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = Pruning({"end_step": 40, "pruning_frequency": 20})
    pruner.model = model
    pruner.on_train_begin()
    for step in range(45):
        loss_of(model, step).backward()
        change = step + 1 in (20, 40)
        with nullcontext() if change else NoWaiting():
            pruner.on_step_begin()
            pruner.on_before_optimizer_step()
        optimizer.step()
        with nullcontext() if change else NoWaiting():
            pruner.on_after_optimizer_step()
        optimizer.zero_grad()
    assert pruner._groups[0].done


@pytest.mark.parametrize("lasso", [{}, {"reg_type": "group_lasso", "reg_coeff": 0.1}], ids=["", "lasso"])
@pytest.mark.parametrize("name", ["magnitude", "gradient", "snip", "snip_momentum"])
def test_the_device_path_equals_the_cpu_path(monkeypatch, name, lasso):
    options = {"pattern": "4x1", "end_step": 7, "pruning_frequency": 3, "pruning_type": name, **lasso}
    options |= {"momentum_decay": 0.9} if name == "snip_momentum" else {}
    a, _, _ = scaled_run(options, "hooks", fused=False, poison=POISON)
    as_on_a_device(monkeypatch)
    b, _, _ = scaled_run(options, "hooks", fused=False, poison=POISON)
    for left, right in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("where", ["one weight", "a bias", "all"])
def test_a_non_finite_gradient_changes_no_score(bad, where):
    model = small_net()
    pruner = Pruning({"pattern": "1x1", "start_step": 50, "end_step": 60})
    pruner.model = model
    pruner.on_train_begin()
    loss_of(model, 0).backward()
    pruner.on_before_optimizer_step()
    pruner.on_after_optimizer_step()
    before = copy.deepcopy([weight.score for weight in pruner._groups[0].weights])
    if where == "one weight":
        model[0].weight.grad[0, 0, 0, 0] = bad
    elif where == "a bias":
        model[7].bias.grad[1] = bad
    else:
        for parameter in model.parameters():
            parameter.grad.fill_(bad)
    pruner.on_before_optimizer_step()
    pruner.on_after_optimizer_step()
    for old, weight in zip(before, pruner._groups[0].weights, strict=True):
        assert torch.equal(old, weight.score)
    assert pruner.step == 1


def test_accumulated_micro_batches_change_the_masks_once_per_optimizer_step():
    """The caller counts micro-batches, four per optimizer step; the clock follows the caller's count."""
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = Pruning({"pattern": "1x1", "end_step": 40})
    pruner.model = model
    pruner.on_train_begin()
    changes, previous = 0, pruner.masks()
    for micro in range(48):
        pruner.on_step_begin(local_step=micro)
        loss_of(model, micro).backward()
        if micro % 4 == 3:
            pruner.on_before_optimizer_step()
            optimizer.step()
            pruner.on_after_optimizer_step()
            optimizer.zero_grad()
            changed = sum(not torch.equal(previous[n], m) for n, m in pruner.masks().items()) > 0
            assert changed or micro > 40
            changes += changed
            previous = pruner.masks()
        else:
            assert all(torch.equal(previous[n], m) for n, m in pruner.masks().items())
    assert changes == 10
    assert pruner.report().groups[0].reached == pytest.approx(0.8, abs=1e-3)


def test_accumulation_with_attach_counts_optimizer_steps():
    model = small_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Pruning({"pattern": "1x1", "end_step": 5}).attach(model, optimizer) as pruner:
        for micro in range(24):
            loss_of(model, micro).backward()
            if micro % 4 == 3:
                optimizer.step()
                optimizer.zero_grad()
        assert pruner.step == 6
        assert pruner._groups[0].done


@pytest.mark.parametrize("options", [{"end_step": 6}, {"pruning_type": "gradient", "end_step": 6}])
def test_several_optimizers_equal_one(options):
    def run(split):
        torch.manual_seed(0)
        model = small_net()
        parts = [model[:4].parameters(), model[4:].parameters()] if split else [model.parameters()]
        optimizers = [torch.optim.SGD(part, lr=0.1, momentum=0.9) for part in parts]
        with Pruning(options).attach(model, *optimizers):
            for step in range(8):
                loss_of(model, step).backward()
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
        return model

    for a, b in zip(run(True).parameters(), run(False).parameters(), strict=True):
        assert torch.equal(a, b)


def test_one_shot_snip_waits_until_every_optimizer_has_shown_its_gradients():
    model = small_net()
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (model[:4], model[4:])]
    pruner = Pruning({"pruning_type": "snip", "pattern": "1x1"}).attach(model, *optimizers)
    loss_of(model, 0).backward()
    optimizers[0].step()
    assert all(mask.all() for mask in pruner.masks().values())
    optimizers[1].step()
    assert pruner.report().groups[0].reached == pytest.approx(0.8, abs=1e-3)


def test_an_optimizer_without_pruned_weights_does_not_drive_the_clock():
    model = small_net()
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    weights = [p for n, p in model.named_parameters() if n.endswith("weight")]
    rare, often = torch.optim.SGD(weights, lr=0.1), torch.optim.SGD(biases, lr=0.1)
    pruner = Pruning({"end_step": 6}).attach(model, rare, often)
    for step in range(6):
        loss_of(model, step).backward()
        often.step()
        if step % 2:
            rare.step()
    assert pruner.step == 3


def test_closures_are_observed_inside_the_step():
    def run(with_closure):
        torch.manual_seed(0)
        model = small_net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with Pruning({"end_step": 6}).attach(model, optimizer):
            for step in range(8):

                def closure(step=step, optimizer=optimizer, model=model):
                    optimizer.zero_grad()
                    loss = loss_of(model, step)
                    loss.backward()
                    return loss

                if with_closure:
                    assert optimizer.step(closure).item() > 0
                else:
                    closure()
                    optimizer.step()
        return model

    for a, b in zip(run(True).parameters(), run(False).parameters(), strict=True):
        assert torch.equal(a, b)


def test_accelerate_wraps_the_optimizer():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = small_net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    with Pruning({"pattern": "1x1", "end_step": 5}).attach(model, optimizer) as pruner:
        for micro in range(12):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, micro))
                optimizer.step()
                optimizer.zero_grad()
        assert pruner.step == 6
    assert pruner.report().groups[0].reached == pytest.approx(0.8, abs=1e-3)
