"""``pc.slim``: trace, plan, cut, verify and report in one call; on any error nothing has changed."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations

import pruning_core as pc
from tests.channels.test_planner import BATCH, DATA, IMAGES, net

EXAMPLE = IMAGES[:1]


def test_it_does_what_its_steps_do():
    done = pc.slim(net(), {"macs": 0.5}, EXAMPLE, round_to=4)
    model = net()
    graph = pc.ChannelGraph.trace(model, EXAMPLE)
    plan = pc.plan_channels(graph, {"macs": 0.5}, round_to=4)
    report = pc.ChannelReport.of(graph, plan)
    cut = pc.slim_(model, plan, example_inputs=EXAMPLE)
    assert done.plan == plan
    assert str(done) == f"{report}\n{cut}"
    assert done.report.to_dict() == report.to_dict()
    states = [each.state_dict() for each in (done.model, model)]
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


def test_optimizer_and_averaged_copy_are_cut_along():
    model = net()
    average = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    cross_entropy(model(BATCH[0]), BATCH[1]).backward()
    optimizer.step()
    parameters = list(model.parameters())
    done = pc.slim(model, {"params": 0.5}, EXAMPLE, optimizer=optimizer, ema=average)
    assert done.model is model
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(state["exp_avg"].shape == parameter.shape for parameter, state in optimizer.state.items())
    assert [each.shape for each in average.parameters()] == [each.shape for each in parameters]
    assert done.cut.params_after == sum(each.numel() for each in parameters) <= 0.5 * done.cut.params_before
    optimizer.zero_grad()
    cross_entropy(model(BATCH[0]), BATCH[1]).backward()
    optimizer.step()


@pytest.mark.parametrize("criterion", ["taylor", "snip_momentum", "activation"])
def test_criteria_that_need_data(criterion):
    done = pc.slim(net(), {"channels": 0.7}, EXAMPLE, criterion=criterion, **DATA)
    assert done.model[0].out_channels + done.model[3].out_channels == 67


class Scratch(nn.Module):
    """A width as a number in the model's own code: the trial cut finds it, nothing else does."""

    calls = 0

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        Scratch.calls += 1  # of the copies too
        x = self.first(x).relu()
        x = x * torch.arange(8).to(x)  # not a parameter: it keeps its length
        return self.last(self.second(x).relu())


def test_without_the_trial_the_cut_itself_finds_out():
    model = Scratch()
    before = copy.deepcopy(model.state_dict())
    Scratch.calls = 0
    traced = pc.ChannelGraph.trace(model, torch.randn(2, 3), trial=False)
    assert Scratch.calls == 1  # no code asks for the mode: nothing to see in training
    tried = pc.ChannelGraph.trace(model, torch.randn(2, 3))
    assert Scratch.calls >= 1 + 6
    assert list(tried.groups) == ["second.weight:0"]
    assert list(traced.groups) == ["first.weight:0", "second.weight:0"]
    pc.slim_(copy.deepcopy(model), pc.plan_channels(tried, {"channels": 0.75}), example_inputs=torch.randn(2, 3))
    with pytest.raises(pc.GraphError, match=r"cannot follow the cut at its mul"):
        pc.slim_(model, pc.plan_channels(traced, {"channels": 0.75}))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"flops": 0.5}, EXAMPLE), r"^budget: is one of channels, params, macs, latency, got \{'flops': 0.5\}"),
        (({"macs": 0.001}, EXAMPLE), r"^budget: cannot be met, got macs 0.001; from 0\.\d+ to 1 can be reached"),
        (({"macs": 0.5}, torch.randn(1, 5, 8, 8)), r"expected input\[1, 5, 8, 8\] to have 3 channels"),
    ],
)
def test_a_mistake_changes_nothing(arguments, message):
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises((ValueError, RuntimeError), match=message):
        pc.slim(model, *arguments)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def quiet(make, *arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript and the old norms are deprecated
        return make(*arguments)


class Memory(nn.Module):
    """An LSTM whose biases are ``bias`` of it: two parameters that are views of one tensor, or share its memory."""

    def __init__(self, shared):
        super().__init__()
        self.inner, self.lstm, self.out = nn.Linear(8, 8), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 4)
        whole = torch.zeros(32 if shared else 64)
        self.lstm.bias_ih_l0, self.lstm.bias_hh_l0 = nn.Parameter(whole[:32]), nn.Parameter(whole[-32:])

    def forward(self, x):
        return self.out(self.lstm(self.inner(x))[0])


def around(layer):
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), layer, nn.ReLU(), nn.Linear(8, 4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: around(torch.jit.script(nn.Linear(8, 8))),
            r"^2: is TorchScript, whose operations cannot be",
        ),
        (lambda: around(torch.jit.trace(nn.Linear(8, 8), torch.ones(1, 8))), "^2: is TorchScript"),
        (lambda: torch.jit.script(around(nn.Tanh())), "^model: is TorchScript"),
        (
            lambda: around(parametrizations.orthogonal(nn.Linear(8, 8))),
            "no channel can be removed: meets a weight",
        ),
        (lambda: Memory(shared=True), r"no channel can be removed: its code does not follow \(lstm"),
    ],
    ids=["scripted", "traced", "whole", "orthogonal", "shared biases"],
)
def test_what_cannot_be_cut_says_why_in_one_line(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        pc.slim(quiet(make), {"params": 0.8}, torch.randn(2, 5, 8))
    assert "\n" not in str(caught.value)


def test_a_recurrent_layer_of_views_of_one_bias_is_cut():
    model = Memory(shared=False)
    assert pc.slim(model, {"params": 0.8}, torch.randn(2, 5, 8)).cut.difference < 1e-6
    assert model.lstm.hidden_size < 8


def test_a_misspelt_option_is_named():
    with pytest.raises((TypeError, ValueError), match="rount_to"):
        pc.slim(net(), {"macs": 0.5}, EXAMPLE, rount_to=4)


def test_a_wrong_budget_is_found_before_the_model_runs():
    Scratch.calls = 0
    with pytest.raises(ValueError, match=r"^budget: is the share that is left, above 0 and at most 1, got 50"):
        pc.slim(Scratch(), {"macs": 50}, torch.randn(2, 3))
    assert Scratch.calls == 0


def test_a_plan_from_a_file_needs_an_example(tmp_path):
    model = net()
    graph = pc.ChannelGraph.trace(model, EXAMPLE)
    pc.plan_channels(graph, {"macs": 0.5}).save(tmp_path / "plan.json")
    plan = pc.Plan.load(tmp_path / "plan.json")
    with pytest.raises(pc.GraphError, match=r"^example_inputs: "):
        pc.slim_(model, plan)
    assert pc.slim_(model, plan, example_inputs=EXAMPLE).params_after < graph.params()


def two_layers():
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))


def summed(model, batch):
    return model(batch).sum()


ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("message", "given"),
    [
        (r"model: must be a torch.nn.Module, got NoneType", {"model": lambda: None}),
        (
            r"0.weight: has no numbers, got the meta device; load the weights",
            {"model": lambda: two_layers().to("meta")},
        ),
        (r"budget: the model has no macs on its example, got macs", {"model": nn.ReLU}),
        (r"budget: the model has no params on its example", {"model": nn.ReLU, "budget": {"params": 0.5}}),
        (r"budget: cannot be met, got channels 0.5", {"model": nn.ReLU, "budget": {"channels": 0.5}}),
        (r"budget: is one of .*, got 0.5; for example \{'macs': 0.5\}", {"budget": 0.5}),
        (r"budget: is one of .*, got '0.5'; for example \{'macs': 0.5\}", {"budget": "0.5"}),
        (r"budget: is the share that is left, .*, got '0.5'", {"budget": {"macs": "0.5"}}),
        (r"budget: is the share that is left, .*, got nan", {"budget": {"macs": float("nan")}}),
        (r"example_inputs: holds no example, got shape \(0, 3\)", {"example_inputs": ONES[:0]}),
        (r"optimizer: must be a torch.optim.Optimizer or several, got int", {"optimizer": 3}),
        (r"optimizer: must be a torch.optim.Optimizer or several, got NoneType", {"optimizer": [None]}),
        (r"ema: must be a module or several, got int", {"ema": 3}),
        (r"criterion: batches is empty", {"criterion": "activation", "batches": [], "to_loss": summed}),
        (r"criterion: batches is empty", {"criterion": "taylor", "batches": iter(()), "to_loss": summed}),
        (r"batches: must be a list or a DataLoader, got int", {"criterion": "taylor", "batches": 3, "to_loss": summed}),
        (
            r"to_loss: must return a tensor that depends on the model, got float",
            {"criterion": "taylor", "batches": [ONES], "to_loss": lambda model, batch: 3.0},
        ),
        (
            r"criterion: all gradients are zero, got a loss that no channel changes; give the training loss",
            {"batches": [ONES], "to_loss": lambda model, batch: model(batch).sum() * 0},
        ),
        (
            r"to_loss: must return a tensor that depends on the model, got a tensor without a gradient",
            {"criterion": "fisher", "batches": [ONES], "to_loss": lambda model, batch: model(batch).detach()},
        ),
        (
            r"to_loss: must return the loss alone, got tensors of shapes \(\), \(2, 2\); return output.loss",
            {
                "criterion": "taylor",
                "batches": [ONES],
                "to_loss": lambda model, batch: {"loss": model(batch).sum(), "logits": model(batch)},
            },
        ),
        (
            r"to_loss: must call the model that it is given",
            {"criterion": "activation", "batches": [ONES], "to_loss": lambda model, batch: 3.0},
        ),
    ],
)
def test_one_line_for_what_cannot_be(message, given):
    given = dict(given)
    make, budget = given.pop("model", two_layers), given.pop("budget", {"macs": 0.5})
    with pytest.raises(pc.GraphError, match=f"^{message}") as caught:
        pc.slim(make(), budget, given.pop("example_inputs", ONES), **given)
    assert "\n" not in str(caught.value)
