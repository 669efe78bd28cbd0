"""What gets no gradient is not pruned: frozen weights take no part, weights that no gradient reaches are left dense."""

import warnings

import pytest
import torch
from torch import nn

import pruning_core as pc
from pruning_core.criteria import CRITERIA

GRADIENT = [name for name in CRITERIA if CRITERIA[name].needs_gradient and not CRITERIA[name].needs]
WITHOUT = [name for name in CRITERIA if not CRITERIA[name].needs_gradient and not CRITERIA[name].needs]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))


def shares(model):
    return [round(1 - float(layer.weight.count_nonzero()) / layer.weight.numel(), 3) for layer in model[::2]]


def run(model, config, steps=6, loss=lambda model: model(torch.randn(8, 16)).square().mean()):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad] or model.parameters(), lr=0.1)
    pruner = pc.Pruning(config).attach(model, optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        total = loss(model)
        if total.requires_grad:
            total.backward()
        optimizer.step()
    return pruner


@pytest.mark.parametrize("kind", [*GRADIENT, *WITHOUT])
@pytest.mark.parametrize("form", ["", "_progressive"])
@pytest.mark.parametrize("pattern", ["1x1", "4x1"])
def test_a_frozen_layer_takes_no_part(kind, form, pattern):
    model = net()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    config = {"pruning_type": kind + form, "pattern": pattern, "target_sparsity": 0.5, "end_step": 3}
    pruner = run(model, {**config, "max_sparsity_ratio_per_op": 0.98})
    assert torch.equal(model[0].weight, before)
    first, *others = shares(model)
    assert first == 0
    assert sum(others) / 2 == 0.5
    assert set(pruner.masks()) == {"2.weight", "4.weight"}
    (row,) = pruner.report().dense
    assert (row.name, row.note) == ("0.weight", "requires no gradient")
    assert pruner.sparsity == pruner.asked == 0.5


@pytest.mark.parametrize("kind", GRADIENT)
def test_naming_a_frozen_layer_is_an_error_where_gradients_are_needed(kind):
    model = net()
    model[0].requires_grad_(False)
    message = (
        rf"^pruning_configs\[0\]: 0 cannot be pruned: it requires no gradient, and {kind} needs one; "
        r"take it out of op_names, or choose magnitude$"
    )
    with pytest.raises(ValueError, match=message):
        run(model, {"pruning_type": kind, "op_names": ["^0$", "2"]})


@pytest.mark.parametrize("kind", WITHOUT)
def test_a_frozen_layer_that_is_named_can_be_pruned_without_gradients(kind):
    model = net()
    model[0].requires_grad_(False)
    run(model, {"pruning_type": kind, "pattern": "1x1", "target_sparsity": 0.5, "op_names": ["0", "2"]})
    assert sum(shares(model)[:2]) / 2 == 0.5
    assert shares(model)[0] > 0


def test_zeros_of_a_frozen_layer_are_locked():
    """It may be unfrozen later in the run."""
    model = net()
    with torch.no_grad():
        model[0].weight[0] = 0
    model[0].requires_grad_(False)
    pruner = run(model, {"pruning_type": "pattern_lock"})
    assert not pruner.masks()["0.weight"][0].any()


def test_a_model_that_is_frozen_as_a_whole():
    message = (
        r"no layer is left to prune \(0: requires no gradient; 2: requires no gradient; 4: .*requires no gradient\)"
    )
    with pytest.raises(ValueError, match=message):
        run(net().requires_grad_(False), {"pruning_type": "magnitude"})


# ---- a gradient that never comes ------------------------------------------------------------------------------------


def past_the_middle(model):
    """The second layer is not used."""
    return model[4](model[0](torch.randn(8, 16)).relu()).square().mean()


@pytest.mark.parametrize("kind", GRADIENT)
@pytest.mark.parametrize("form", ["", "_progressive"])
@pytest.mark.parametrize("pattern", ["1x1", "4x1", "2:4"])
@pytest.mark.parametrize("scope", ["global", "local"])
def test_a_layer_that_no_gradient_reaches_is_left_dense(kind, form, pattern, scope):
    config = {"pruning_type": kind + form, "pattern": pattern, "target_sparsity": 0.5, "end_step": 4}
    model = net()
    message = r"^pruning_configs\[0\]: no gradient came for 2.weight up to step 4; it is left as it is$"
    with pytest.warns(UserWarning, match=message) as told:
        pruner = run(model, {**config, "pruning_scope": scope}, steps=8, loss=past_the_middle)
    assert len(told) == 1
    first, middle, last = shares(model)
    assert middle == 0
    assert (first + last) / 2 == 0.5
    assert pruner.sparsity == pruner.asked == 0.5
    report = pruner.report()
    assert [row.name for row in report.groups[0].layers] == ["0.weight", "4.weight"]
    assert [(row.name, row.note) for row in report.dense] == [("2.weight", "no gradient came")]


def test_it_joins_when_a_gradient_comes():
    model, step = net(), iter(range(100))
    late = lambda model: past_the_middle(model) if next(step) < 3 else model(torch.randn(8, 16)).square().mean()  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner = run(model, {"pattern": "1x1", "target_sparsity": 0.5, "end_step": 6}, steps=9, loss=late)
    assert set(pruner.masks()) == {"0.weight", "2.weight", "4.weight"}
    assert sum(shares(model)) / 3 == pytest.approx(0.5, abs=0.002)
    assert shares(model)[1] > 0


@pytest.mark.parametrize("kind", ["gradient", "snip"])
def test_a_step_without_a_gradient_does_not_cut(kind):
    """Of an expert that was not chosen in the step before a cut: it stays as it is, the others reach the target."""
    model, step = net(), iter(range(100))
    chosen = lambda model: past_the_middle(model) if next(step) >= 4 else model(torch.randn(8, 16)).square().mean()  # noqa: E731
    config = {"pruning_type": kind, "pattern": "1x1", "target_sparsity": 0.8, "end_step": 6, "pruning_frequency": 3}
    with pytest.warns(UserWarning, match="no gradient came for 2.weight up to step 6"):
        run(model, config, steps=9, loss=chosen)
    first, middle, last = shares(model)
    assert 0 < middle < 0.7
    assert (first + last) / 2 == pytest.approx(0.8, abs=0.003)


def test_resume_knows_what_was_left_out(tmp_path):
    config = {"pattern": "1x1", "target_sparsity": 0.5, "end_step": 6, "pruning_frequency": 2}

    def steps(model, pruner, optimizer, count):
        for _ in range(count):
            optimizer.zero_grad()
            past_the_middle(model).backward()
            optimizer.step()

    def begin(state=None):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        pruner = pc.Pruning(config)
        if state is not None:
            model.load_state_dict(state["model"])
            pruner.load_state_dict(state["pruner"])
        return model, pruner.attach(model, optimizer), optimizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        model, pruner, optimizer = begin()
        steps(model, pruner, optimizer, 5)
        pc.checkpoint.save({"model": model.state_dict(), "pruner": pruner.state_dict()}, tmp_path / "a.pt")
        rng = torch.get_rng_state()
        steps(model, pruner, optimizer, 5)
        whole, report = model.state_dict(), pruner.report().to_dict()
        pruner.detach()
        model, pruner, optimizer = begin(pc.checkpoint.load(tmp_path / "a.pt"))
        torch.set_rng_state(rng)
        steps(model, pruner, optimizer, 5)
    assert all(torch.equal(value, whole[name]) for name, value in model.state_dict().items())
    assert pruner.report().to_dict() == report
    saved = {"model": model.state_dict(), "pruner": pruner.state_dict()}
    pc.checkpoint.save(saved, tmp_path / "b.pt")
    assert [row.name for row in pc.inspect(tmp_path / "b.pt").dense] == ["2.weight"]


@pytest.mark.parametrize("kind", ["gradient", "snip"])
def test_a_score_that_waits_is_not_lost(kind):
    """It is not replaced by zeros, which would go first, where a step without a gradient comes before the cut."""
    model = net()
    pruner = pc.Pruning({"pruning_type": kind, "pattern": "1x1", "start_step": 1, "end_step": 1})
    pruner.model = model
    pruner.on_train_begin()
    model(torch.randn(8, 16)).square().mean().backward()
    pruner.on_before_optimizer_step()
    weights = pruner.state_dict()["groups"][0]["weights"]
    before = {name: weight["score"].clone() for name, weight in weights.items()}
    for group in pruner._groups:
        model.zero_grad()
        for weight in group.weights:
            weight.observe(1.0, None)
    after = pruner.state_dict()["groups"][0]["weights"]
    assert all(torch.equal(after[name]["score"], score) for name, score in before.items())


def test_a_state_of_an_older_version_is_refused():
    model = net()
    pruner = run(model, {"pattern": "1x1", "end_step": 2}, steps=4)
    state = {**pruner.state_dict(), "version": 1}
    with pytest.raises(
        ValueError, match=r"^load_state_dict: version 2 is read here, got 1; use the pruning_core that wrote it$"
    ):
        pruner.load_state_dict(state)
