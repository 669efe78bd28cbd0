"""``slim_`` in the middle of training: what it cuts, what it leaves alone, and what it puts back."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from pruning_core.graph import ChannelGraph, GraphError, masked_, slim_, structure
from pruning_core.graph.trace.labels import Axis
from pruning_core.graph.trace.replay import AskedForMode
from tests.support.graph_reference import (
    Calls,
    KeptNorm,
    assert_close,
    assert_same,
    chosen,
    head,
    image,
    params,
    reference,
    run,
    slimmed,
    stem,
)

EXAMPLE = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Two convolutions with norms, a residual one, and two linear layers: three groups."""

    def __init__(self, first=8, second=6, third=7):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, first, 3, padding=1), nn.BatchNorm2d(first)
        self.conv2, self.bn2 = nn.Conv2d(first, second, 3, 2), nn.BatchNorm2d(second)
        self.same = nn.Conv2d(second, second, 1, bias=False)
        self.fc1, self.fc2 = nn.Linear(second * 4, third), nn.Linear(third, 5)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).sigmoid()
        x = self.bn2(self.conv2(x)).relu()
        x = (x + self.same(x)).flatten(1)
        return self.fc2(functional.gelu(self.fc1(x)))


def step(model, optimizer, number, loss_of=functional.cross_entropy):
    generator = torch.Generator().manual_seed(number)
    optimizer.zero_grad()
    images, labels = torch.randn(4, 3, 6, 6, generator=generator), torch.randint(0, 5, (4,), generator=generator)
    loss = loss_of(model(images), labels)
    loss.backward()
    optimizer.step()
    return loss


def planned(model, seed=0, example=EXAMPLE):
    graph = ChannelGraph.trace(model, example)
    return graph.plan(chosen(graph, seed))


def index(value, plan, name):
    """The part of a tensor that a plan keeps, axis by axis."""
    for axis in plan.removed:
        if axis.tensor == name:
            value = value.index_select(axis.dim, torch.tensor(plan.kept(axis)))
    return value


def snapshot(*things):
    """Everything of models and optimizers that must be as it was."""
    found = []
    for each in things:
        found.append(copy.deepcopy(each.state_dict()))
        if isinstance(each, nn.Module):
            found.append({name: copy.deepcopy(parameter.grad) for name, parameter in each.named_parameters()})
            found.append(structure(each))
            found.append([{k: v for k, v in vars(m).items() if not k.startswith("_")} for m in each.modules()])
    return found


# ---- optimizers -----------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "sgd_without_momentum": lambda p: torch.optim.SGD(p, 0.1),
    "adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, foreach=False),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, 0.01, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, 0.01),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_states_are_cut_with_their_parameters_and_training_goes_on_as_that_of_a_small_model(kind):
    model = Net()
    optimizer = OPTIMIZERS[kind](model.parameters())
    for number in range(3):
        step(model, optimizer, number)
    plan, objects = planned(model), [id(each) for each in model.parameters()]
    slim_(model, plan, example_inputs=EXAMPLE, optimizer=optimizer)
    assert [id(each) for each in model.parameters()] == objects
    assert [id(each) for each in optimizer.param_groups[0]["params"]] == objects
    small = Net(model.conv1.out_channels, model.conv2.out_channels, model.fc1.out_features)
    small.load_state_dict(model.state_dict())
    other = OPTIMIZERS[kind](small.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    first = model.conv1.weight.detach().clone()
    for number in range(3, 6):
        step(model, optimizer, number)
        step(small, other, number)
    assert not torch.equal(first, model.conv1.weight)
    assert_same(dict(model.state_dict()), dict(small.state_dict()))


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_states_keep_the_values_of_kept_channels(kind):
    model = Net()
    optimizer = OPTIMIZERS[kind](model.parameters())
    step(model, optimizer, 0)
    dense = {name: dict(optimizer.state[parameter]) for name, parameter in model.named_parameters()}
    plan = planned(model)
    slim_(model, plan, example_inputs=EXAMPLE, optimizer=[optimizer])
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            want = dense[name][key]
            assert_same(value, want if want.dim() == 0 else index(want, plan, name))


def test_a_loss_that_is_still_held_does_not_disturb():
    model = Net()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    held = step(model, optimizer, 0)
    slim_(model, planned(model), example_inputs=EXAMPLE, optimizer=optimizer)
    step(model, optimizer, 1)
    assert held.grad_fn is not None


def test_gradients_that_are_accumulated_lose_what_their_parameters_lose():
    model = Net().double().eval()
    example = EXAMPLE.double()
    plan = planned(model, 0, example)
    model(example).square().sum().backward()
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    slim_(model, plan)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, index(before[name], plan, name))
    model(example).square().sum().backward()  # adds to them
    assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())


def test_an_optimizer_of_another_model_is_refused():
    model, other = Net(), Net()
    bits = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(GraphError, match=r"^optimizer: holds none of the model's parameters, got a AdamW of another"):
        slim_(model, planned(model), optimizer=OPTIMIZERS["adamw"](other.parameters()))
    assert_same(dict(model.state_dict()), bits)
    both = OPTIMIZERS["adamw"]([*model.parameters(), *other.parameters()])
    slim_(model, planned(model), optimizer=both)


class Compiled(nn.Module):
    """As ``torch.compile`` wraps a model."""

    def __init__(self, model):
        super().__init__()
        self._orig_mod = model

    def forward(self, x):
        return self._orig_mod(x)


@pytest.mark.parametrize("wrap", [nn.DataParallel, Compiled])
def test_what_wraps_a_model_is_seen_through(wrap):
    model = Net()
    graph = ChannelGraph.trace(wrap(model), EXAMPLE)
    assert graph.model is model and "conv1.weight:0" in graph.groups
    masked_(wrap(model), graph.plan({"conv1.weight:0": [0]})).undo()
    slim_(wrap(model), graph.plan({"conv1.weight:0": [0]}), ema=wrap(copy.deepcopy(model)))
    assert len(model.conv1.weight) == 7


def test_a_model_that_is_not_ready_is_refused():
    with pytest.raises(GraphError, match=r"^0\.weight: has no shape yet, got a lazy module; run the model once first"):
        ChannelGraph.trace(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2)), torch.ones(2, 3))
    flat = nn.Module()  # as FSDP keeps all parameters of a block
    flat.register_parameter("_flat_param", nn.Parameter(torch.ones(9)))
    with pytest.raises(GraphError, match=r"^_flat_param: is sharded over ranks \(FSDP"):
        ChannelGraph.trace(flat, torch.ones(2, 3))
    with pytest.raises(GraphError, match=r"^example_inputs: the model's outputs on them are NaN"):
        ChannelGraph.trace(Net(), torch.full_like(EXAMPLE, float("nan")))
    with pytest.raises(GraphError, match=r"^example_inputs: holds no example, got shape \(0, 3\); give at least one"):
        ChannelGraph.trace(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.ones(0, 3))


def test_a_graph_of_a_model_that_has_changed_is_refused():
    model = Net()
    graph = ChannelGraph.trace(model, EXAMPLE)
    slim_(model, graph.plan({"conv1.weight:0": [0]}))
    with pytest.raises(GraphError, match=r"^graph: the model has other parameters than when it was traced"):
        graph.plan({"conv1.weight:0": [0]})


@pytest.mark.parametrize(
    ("dims", "layout"), [(4, torch.channels_last), (5, torch.channels_last_3d), (4, torch.contiguous_format)]
)
def test_weights_and_states_keep_their_memory_format(dims, layout):
    conv = nn.Conv2d if dims == 4 else nn.Conv3d
    model = nn.Sequential(conv(3, 8, 3, padding=1), nn.ReLU(), conv(8, 6, 3), nn.ReLU(), conv(6, 4, 3)).double()
    model, example = model.to(memory_format=layout), torch.randn(2, 3, *[6] * (dims - 2)).double()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    model(example).sum().backward()
    optimizer.step()
    slim_(model, planned(model, 1, example), example_inputs=example, optimizer=optimizer)
    weights = [layer.weight for layer in model if hasattr(layer, "weight")]
    for each in [*weights, *(optimizer.state[weight]["exp_avg"] for weight in weights)]:
        assert each.is_contiguous(memory_format=layout)


def test_parameter_groups_and_frozen_parameters():
    model = Net()
    model.bn1.weight.requires_grad_(False)
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.SGD([{"params": trained[:3], "lr": 0.1}, {"params": trained[3:]}], 0.01, momentum=0.9)
    step(model, optimizer, 0)
    slim_(model, planned(model), example_inputs=EXAMPLE, optimizer=optimizer)
    assert [len(group["params"]) for group in optimizer.param_groups] == [3, len(trained) - 3]
    assert [name for name, each in model.named_parameters() if not each.requires_grad] == ["bn1.weight"]
    step(model, optimizer, 1)


# ---- averaged copies, gradients -------------------------------------------------------------------------------------


def test_averaged_copies_are_cut_too():
    model = Net().double()
    averaged, other = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for parameter in averaged.parameters():
            parameter.mul_(0.5)
    plan, dense = planned(model, 0, EXAMPLE.double()), dict(averaged.state_dict())
    slim_(model, plan, example_inputs=EXAMPLE.double(), ema=[averaged, other])
    for name, value in averaged.state_dict().items():
        assert_same(value, index(dense[name], plan, name))
    assert structure(averaged) == structure(model) == structure(other)
    assert averaged.conv1.out_channels == model.conv1.out_channels
    assert_close(run(other.eval(), EXAMPLE.double()), run(model.eval(), EXAMPLE.double()))


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.norm = stem(), nn.BatchNorm2d(8), nn.LayerNorm(8)
        self.mlp, self.out = nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x):
        x = self.norm(self.bn(self.conv(x)).flatten(2).transpose(1, 2))
        return self.out(self.mlp(x).sigmoid())


@pytest.mark.parametrize("kind", [Net, Normed])
def test_gradients_are_those_of_the_masked_model_in_training_mode(kind):
    model, example = kind().double().train(), EXAMPLE.double()
    plan = planned(model, 1, example)
    masked, slim = reference(model, plan), slimmed(model, plan, example)
    for each in (masked, slim):
        each(example).square().sum().backward()
    known = {name.replace("norm.norm", "norm"): parameter.grad for name, parameter in masked.named_parameters()}
    assert any(isinstance(each, KeptNorm) for each in masked.modules()) == (kind is Normed)
    got = [parameter.grad.flatten() for parameter in slim.parameters()]
    want = [index(known[name], plan, name).flatten() for name, _ in slim.named_parameters()]
    assert_close([torch.cat(got)], [torch.cat(want)])
    for name, buffer in slim.named_buffers():
        assert_close([buffer], [index(masked.get_buffer(name), plan, name)])


class WithAux(nn.Module):
    """A head that only training uses."""

    def __init__(self):
        super().__init__()
        self.stem, self.aux, self.out = stem(), nn.Sequential(nn.Conv2d(8, 6, 1), nn.ReLU(), head(6)), head()

    def forward(self, x):
        x = self.stem(x).sigmoid()
        return (self.out(x), self.aux(x)) if self.training else self.out(x)


def test_a_head_that_only_training_uses_is_cut_with_the_rest():
    model, example = WithAux().double().eval(), EXAMPLE.double()
    graph = ChannelGraph.trace(model, example)
    assert not graph.notes
    assert {name: len(group) for name, group in graph.groups.items()} == {"stem.weight:0": 8, "aux.0.weight:0": 6}
    plan = graph.plan(chosen(graph, 1))
    slim = slimmed(model, plan, example)
    assert slim.aux[0].in_channels == slim.stem.out_channels == len(plan.kept(Axis("stem.weight", 0)))
    assert_close(run(slim.train(), example), run(reference(model, plan).train(), example))


# ---- what must not change -------------------------------------------------------------------------------------------


class Caching(Net):
    """Keeps what it computed, counts its calls, and makes a buffer when it first runs."""

    def __init__(self):
        super().__init__()
        self.calls, self.last = 0, None
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        self.seen += 1
        self.last = super().forward(functional.dropout(x, 0.5, self.training))
        self.made = self.last + 1
        self.seen = self.seen.clone()
        return self.last


def test_neither_trace_nor_slim_leave_anything_behind():
    model = Caching().train()
    model.bn2.eval()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    step(model, optimizer, 0)
    hooks = model.fc1.register_forward_hook(lambda *_: None)
    before, random, seen, last = snapshot(model, optimizer), torch.get_rng_state(), model.seen, model.last
    classes, modes = [type(each) for each in model.modules()], [each.training for each in model.modules()]
    attributes = set(vars(model))
    graph = ChannelGraph.trace(model, EXAMPLE)
    assert_same(snapshot(model, optimizer), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.seen is seen and model.last is last and set(vars(model)) == attributes
    assert [type(each) for each in model.modules()] == classes
    assert [each.training for each in model.modules()] == modes
    assert sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in model.modules()) == 1
    assert torch.backends.mha.get_fastpath_enabled()
    hooks.remove()
    slim_(model, graph.plan(chosen(graph, 0)), example_inputs=EXAMPLE, optimizer=optimizer)
    assert torch.equal(torch.get_rng_state(), random)
    assert (
        model.calls == 1
        and model.seen is seen
        and model.last is last
        and set(vars(model)) - attributes <= {"_pruning_core_structure"}
    )
    assert [each.training for each in model.modules()] == modes
    step(model, optimizer, 1)


def test_a_plan_that_keeps_everything_changes_no_bit():
    model = Net()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    step(model, optimizer, 0)
    before, memory = snapshot(model, optimizer), [each.data_ptr() for each in model.state_dict().values()]
    plan = ChannelGraph.trace(model, EXAMPLE).plan({})
    assert not plan
    done = slim_(model, plan, example_inputs=EXAMPLE, optimizer=optimizer)
    assert done.params_before == done.params_after == params(model)
    after = snapshot(model, optimizer)
    assert after[2]["kept"] == {}
    after[2] = None
    assert_same(after, before)
    assert [each.data_ptr() for each in model.state_dict().values()] == memory


@pytest.mark.parametrize(("dtype", "apart"), [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_the_difference_from_the_masked_model_is_told(dtype, apart):
    model = Net().to(dtype)
    done = slim_(model, planned(model, 0, EXAMPLE.to(dtype)), example_inputs=EXAMPLE.to(dtype))
    assert 0 <= done.difference <= apart
    assert str(done).startswith(f"{params(Net()):,} -> {params(model):,} parameters (")
    assert f"{done.difference:.1e}" in str(done)


def test_reading_widths_computes_no_weight_in_training_mode():
    """A spectral norm takes a step of its power iteration whenever its weight is read."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4), nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)))
    before = {name: value.clone() for name, value in model.named_buffers()}
    example = torch.randn(2, 6)
    slim_(model, ChannelGraph.trace(model, example).plan({"0.weight:0": [1]}))
    assert model.training and before
    assert_same(dict(model.named_buffers()), before)


def test_two_cuts_are_one():
    model = Net().double().eval()
    graph = ChannelGraph.trace(model, EXAMPLE.double())
    first = {name: [0, 3] for name in graph.groups}
    second = {name: [1, len(group) - 1] for name, group in graph.groups.items()}
    both = {name: first[name] + second[name] for name in first}
    once = slimmed(model, graph.plan(both), EXAMPLE.double())
    twice = slimmed(model, graph.plan(first), EXAMPLE.double())
    again = ChannelGraph.trace(twice, EXAMPLE.double())
    then = {name: [0, len(group) - 1] for name, group in again.groups.items()}
    slim_(twice, again.plan(then), example_inputs=EXAMPLE.double())
    assert_same(dict(twice.state_dict()), dict(once.state_dict()))
    assert_same(run(twice, EXAMPLE.double()), run(once, EXAMPLE.double()))
    assert structure(twice) == structure(once)


# ---- what is put back -----------------------------------------------------------------------------------------------


def lying(model, x):
    """Once told to, reads the width that it had before."""
    y = model.a(x).sigmoid()
    if model.lie == "view":
        y = y.reshape(y.shape[0], 8, 6, 6)
    if model.lie == "value":
        y = y.roll(1, 1)
    if model.lie == "scale":
        y = y / y.shape[1]
    if model.lie == "operation" and y.shape[1] < 8:
        y = y.relu()
    return y if model.lie == "shape" else model.out(y)


MESSAGES = {
    "view": r"the model: cannot follow the cut at its (view|reshape)",
    "value": r"slim_: the cut model does not compute what the masked one does",
    "scale": r"the model: cannot follow the cut at its div \(div gets other numbers than the dense model's\)",
    "operation": r"cannot follow the cut at its .*it runs relu where the dense model runs conv2d",
    "shape": r"slim_: an output changed its shape from \(2, 8, 6, 6\) to \(2, \d, 6, 6\)",
}


@pytest.mark.parametrize("lie", MESSAGES)
def test_a_model_whose_code_does_not_follow_is_put_back_bit_by_bit(lie):
    model = Calls(lying, {"a": stem(), "out": head()}, {"lie": ""})
    averaged, optimizer = copy.deepcopy(model), OPTIMIZERS["adamw"](model.parameters())
    model(EXAMPLE).sum().backward()
    optimizer.step()
    plan = planned(model)
    model.lie = lie
    before, memory = snapshot(model, averaged, optimizer), [each.data_ptr() for each in model.parameters()]
    with pytest.raises(GraphError, match=MESSAGES[lie] + ".*put back as it was"):
        slim_(model, plan, example_inputs=EXAMPLE, optimizer=optimizer, ema=averaged)
    assert_same(snapshot(model, averaged, optimizer), before)
    assert [each.data_ptr() for each in model.parameters()] == memory


def test_an_optimizer_that_cannot_be_cut_puts_everything_back_other_optimizers_too():
    model = Net()
    parameters = list(model.parameters())
    first, second = OPTIMIZERS["adamw"](parameters[:4]), OPTIMIZERS["sgd"](parameters[4:])
    step(model, first, 0)
    second.step()
    second.state[model.fc1.weight]["momentum_buffer"] = torch.zeros(11)
    averaged, plan = copy.deepcopy(model), planned(model)
    before = snapshot(model, averaged, first, second)
    message = r"optimizer: fc1.weight: momentum_buffer has shape \(11,\), .*; make the optimizer anew after slim_"
    with pytest.raises(GraphError, match=message):
        slim_(model, plan, example_inputs=EXAMPLE, optimizer=[first, second], ema=averaged)
    assert_same(snapshot(model, averaged, first, second), before)


def test_a_copy_of_another_shape_is_refused_before_anything_is_cut():
    model, other = Net(), Net(4)
    before = snapshot(model, other)
    with pytest.raises(GraphError, match=r"plan: is for another model: conv1.weight has shape \(4, 3, 3, 3\)"):
        slim_(model, planned(model), example_inputs=EXAMPLE, ema=other)
    assert_same(snapshot(model, other), before)


# ---- inputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("example", [(EXAMPLE,), {"x": EXAMPLE}, ((), {"x": EXAMPLE}), EXAMPLE])
def test_inputs_as_one_tensor_a_tuple_keywords_or_both(example):
    assert len(ChannelGraph.trace(Net(), example).groups) == 3


def test_inputs_that_the_model_cannot_run_are_refused_with_the_module_that_raised():
    message = (
        r"example_inputs: the model cannot run them in evaluation mode \(RuntimeError: .*, in conv1\); give inputs"
    )
    with pytest.raises(GraphError, match=message):
        ChannelGraph.trace(Net(), torch.randn(2, 4, 6, 6))


def failing(m, x):
    if m.training:
        raise NotImplementedError("no loss without targets")
    return m.out(m.a(x))


def test_a_model_that_cannot_train_on_these_inputs_is_traced_in_evaluation_mode_with_a_note():
    model = Calls(failing, {"a": stem(), "out": head()}, {})
    graph = ChannelGraph.trace(model, EXAMPLE)
    assert len(graph.groups) == 1
    assert len(graph.notes) == 1
    assert graph.notes[0].startswith("traced in evaluation mode only: example_inputs: the model cannot run them in tra")
    with pytest.raises(GraphError, match=r"training mode .*no loss without targets"):
        ChannelGraph.trace(model, EXAMPLE, EXAMPLE)


def test_a_cut_model_is_exported():
    model, example = Net().double().eval(), EXAMPLE.double()
    slim = slimmed(model, planned(model, 0, example), example)
    exported = torch.export.export(slim, (example,))
    assert_close([exported.module()(example).detach()], run(slim, example))


def test_half_of_every_group_of_a_resnet():
    models = pytest.importorskip("torchvision.models")
    model, example = models.resnet18().eval(), image(3, 64)(1)
    graph = ChannelGraph.trace(model, example)
    removed = graph.restored({name: range(len(group) // 2) for name, group in graph.groups.items()})
    assert slim_(model, graph.plan(removed), example_inputs=example).params_after == params(model) == 3_055_880


def test_it_says_when_there_was_nothing_to_compare():
    """A detector that finds nothing: its shapes were followed, no number was."""

    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

        def forward(self, x):
            found = self.inner(x)
            return found[found[:, 0] > 1e9]

    model, rows = Silent(), torch.randn(3, 4)
    graph = ChannelGraph.trace(model, rows)
    (name,) = graph.groups
    done = slim_(model, graph.plan({name: [0, 3]}), example_inputs=rows)
    assert done.compared == 0
    assert str(done).endswith("outputs hold no numbers: shapes alone were compared with the masked model")


class Moody(nn.Module):
    """Another layer in training mode, its own or that of its dropout; or the same in both."""

    def __init__(self, ask):
        super().__init__()
        self.first, self.extra, self.last = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.norm, self.drop, self.ask = nn.BatchNorm1d(8), nn.Dropout(0.5), ask

    def forward(self, x):
        x = self.drop(self.norm(self.first(x)))
        if (self.ask == "own" and self.training) or (self.ask == "child's" and self.drop.training):
            x = self.extra(x)
        return self.last(x)


@pytest.mark.parametrize("ask", ["own", "child's", ""])
def test_training_mode_is_looked_at_where_something_asks_for_it(ask):
    graph = ChannelGraph.trace(Moody(ask), torch.randn(4, 3))
    assert len(graph.traces) == 1 + bool(ask)
    assert ("extra.weight" in graph.untraced()) != bool(ask)
    assert "training" not in vars(nn.Module)


def test_a_hook_that_asks_is_seen():
    """Spectral norm of old iterates in training mode."""
    model = nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 8)), nn.ReLU(), nn.Linear(8, 2))
    asked = AskedForMode()
    with asked:
        model.eval()(torch.randn(2, 3))
    assert asked.names == {"torch.nn.utils.spectral_norm"}


@pytest.mark.parametrize(("shape", "small"), [((1, 3, 224, 224), (1, 3, 64, 64)), ((1, 3, 96, 96), None)])
def test_a_trial_runs_on_smaller_images_with_the_same_labels(shape, small):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    graph = ChannelGraph.trace(model, torch.randn(shape))
    (images,), _ = graph.small[0]
    assert tuple(images.shape) == (small or shape)
    assert graph.small[1].labels is graph.labels and (graph.small[1] is graph.traces[0]) == (small is None)
    flat = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 126 * 126, 2))
    (images,), _ = ChannelGraph.trace(flat, torch.randn(1, 3, 128, 128)).small[0]
    assert images.shape[-1] == 128  # it cannot run on less
