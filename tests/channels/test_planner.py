"""Which channels go: scores by hand, budgets that are met, limits that are kept."""

import math
import re
import weakref

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D

from pruning_core.channels import ChannelReport, plan_channels
from pruning_core.channels.effects import MOST_ROWS, Effects
from pruning_core.channels.scores import Data, unit_scores
from pruning_core.criteria import CRITERIA
from pruning_core.graph import ChannelGraph, GraphError, slim_

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
BATCH = (IMAGES, torch.tensor([0, 1, 2, 3]))
NEAR = {"rtol": 1e-5, "atol": 0.0}
BUDGETS = ("params", "macs", "channels")


def net(width=32):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 4),
    )
    for norm in (model[1], model[4]):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    return model


def loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


DATA = {"batches": [BATCH, (IMAGES.flip(0), BATCH[1])], "to_loss": loss}


@pytest.fixture(scope="module")
def graph():
    return ChannelGraph.trace(net(), IMAGES[:1])


@pytest.mark.parametrize("kind", BUDGETS)
@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("criterion", list(CRITERIA))
def test_every_criterion_meets_every_budget(graph, criterion, scope, kind):
    plan = plan_channels(graph, {kind: 0.5}, criterion=criterion, scope=scope, **DATA)
    removed = plan.channels
    left = {
        "params": graph.params(removed) / graph.params(),
        "macs": graph.macs(removed) / graph.macs(),
        "channels": 1 - sum(map(len, removed.values())) / sum(map(len, graph.groups.values())),
    }[kind]
    assert 0.5 - 0.015 < left <= 0.5  # one channel is up to 0.015 of this small net
    again = plan_channels(graph, {kind: 0.5}, criterion=criterion, scope=scope, **DATA)
    assert again == plan
    model = net()
    done = slim_(model, plan, example_inputs=IMAGES[:1])
    assert done.params_after == graph.params(removed)


@pytest.mark.parametrize("kind", ["params", "macs"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_a_real_model_meets_its_budget_within_one_percent(resnet, kind, share):
    removed = plan_channels(resnet, {kind: share}).channels
    left = getattr(resnet, kind)(removed) / getattr(resnet, kind)()
    assert 0.99 * share < left <= share


@pytest.fixture(scope="module")
def resnet():
    return ChannelGraph.trace(torchvision.models.resnet18(), torch.randn(1, 3, 64, 64))


@settings(max_examples=25, deadline=None)
@given(st.floats(0.05, 1.0), st.sampled_from([1, 2, 4, 8]), st.floats(0.1, 1.0), st.sampled_from(["global", "local"]))
def test_limits_are_kept(graph, budget, multiple, most, scope):
    try:
        plan = plan_channels(graph, {"params": budget}, round_to=multiple, limits=most, scope=scope)
    except GraphError as error:
        least = float(re.search(r"from ([\d.]+) to 1 can be reached", str(error)).group(1))
        assert least >= budget - 0.001
        return
    assert graph.params(plan.channels) <= budget * graph.params()
    for name, channels in plan.channels.items():
        size = len(graph.groups[name])
        assert (size - len(channels)) % multiple == 0
        assert len(channels) <= most * size
        assert len(channels) < size


def test_layers_that_stay(graph):
    plan = plan_channels(graph, {"channels": 0.6}, limits={r"^0$": 0.0})
    assert {axis.tensor for axis in plan.removed} == {"3.weight", "3.bias", "4.weight", "4.bias", "8.weight"} | {
        "4.running_mean",
        "4.running_var",
    }


def scores_of(graph, criterion):
    return unit_scores(graph, CRITERIA[criterion](), Data(DATA["batches"], loss))


def by_channel(graph, criterion, group):
    scores = scores_of(graph, criterion)
    return torch.tensor([scores[unit] for unit in graph.groups[group].members], dtype=torch.float64)


def normed(values):
    return values.double() / values.double().mean()


def test_l2_and_magnitude_by_hand(graph):
    model = graph.model
    scale, read = model[1].weight.detach(), model[3].weight.detach()
    expected = scale.square() * read.square().sum((0, 2, 3))
    torch.testing.assert_close(by_channel(graph, "l2", "0.weight:0"), normed(expected), **NEAR)
    expected = scale.abs() * read.abs().sum((0, 2, 3))
    torch.testing.assert_close(by_channel(graph, "magnitude", "0.weight:0"), normed(expected), **NEAR)


class WithoutBatchNorm(nn.Module):
    """Two layers make the channels; a depthwise convolution and the scale of a layer norm act on them on the way."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 16, 1), nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise, self.norm = nn.Conv2d(16, 16, 3, groups=16), nn.LayerNorm(16)
        self.out = nn.Linear(16, 4)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)

    def forward(self, x):
        x = self.depthwise((self.first(x) + self.second(x)).relu())
        return self.out(self.norm(x.flatten(2).transpose(1, 2)).mean(1))


def test_magnitude_without_a_batch_norm_by_hand():
    model = WithoutBatchNorm()
    graph = ChannelGraph.trace(model, IMAGES[:1])
    sums = [model.first.weight, model.second.weight, model.depthwise.weight, model.norm.weight, model.out.weight.T]
    first, second, depthwise, norm, read = (normed(each.detach().abs().reshape(16, -1).sum(1)) for each in sums)
    expected = normed((first + second) / 2 * (depthwise + norm) / 2 * read)
    torch.testing.assert_close(by_channel(graph, "magnitude", "first.weight:0"), expected, **NEAR)


def test_magnitude_does_not_depend_on_how_weights_before_a_batch_norm_are_scaled():
    model = net()
    before = by_channel(ChannelGraph.trace(model, IMAGES[:1]), "l2", "0.weight:0")
    with torch.no_grad():
        model[0].weight.mul_(torch.rand(32, 1, 1, 1) + 0.5)
    torch.testing.assert_close(by_channel(ChannelGraph.trace(model, IMAGES[:1]), "l2", "0.weight:0"), before)


def test_norm_scale_by_hand(graph):
    expected = normed(graph.model[1].weight.detach().abs())
    torch.testing.assert_close(by_channel(graph, "bn_scale", "0.weight:0"), expected)


def test_geometric_median_by_hand(graph):
    rows = graph.model[3].weight.detach().flatten(1)
    expected = torch.stack([(rows - row).norm(dim=1).sum() for row in rows])
    torch.testing.assert_close(by_channel(graph, "geometric_median", "3.weight:0"), normed(expected), **NEAR)


def slices(model, make):
    """What goes with the channels of the first convolution, summed by ``make(tensor, dim)``."""
    return [make(each, 0) for each in (model[0].weight, model[0].bias, model[1].weight, model[1].bias)] + [
        make(model[3].weight, 1)
    ]


def test_first_order_scores_by_hand(graph):
    """Each example's channels are multiplied by ones where they are read: the gradient of these says it."""
    model = net()
    change, sizes = [], []
    for images, target in DATA["batches"]:
        model.zero_grad()
        ones = torch.ones(len(images), 32, 1, 1, requires_grad=True)
        cross_entropy(model[3:](model[:3](images) * ones), target).backward()
        change.append(ones.grad.flatten(1))
        sizes.append(slices(model, lambda w, d: w.grad.abs().movedim(d, 0).flatten(1).sum(1)
                            if w.dim() > 1 else w.grad.abs()))  # fmt: skip
    change, sizes = torch.cat(change).double(), torch.stack([torch.stack(each) for each in sizes]).double()
    near = {"rtol": 1e-4, "atol": 1e-7}
    torch.testing.assert_close(by_channel(graph, "taylor", "0.weight:0"), normed(change.abs().mean(0)), **near)
    torch.testing.assert_close(by_channel(graph, "fisher", "0.weight:0"), normed(change.square().mean(0)), **near)
    torch.testing.assert_close(by_channel(graph, "gradient", "0.weight:0"), normed(sizes.sum(0).mean(0)), **near)


READERS = {
    "linear": (lambda: nn.Linear(12, 5), False),
    "convolution": (lambda: nn.Conv1d(12, 5, 3, padding=1), True),
    "transposed convolution": (lambda: nn.ConvTranspose1d(12, 5, 3), True),
    "grouped convolution": (lambda: nn.Conv1d(12, 8, 1, groups=4), True),
    "gpt2": (lambda: Conv1D(5, 12), False),
    "twice": (lambda: Twice(12), False),
    "frozen": (lambda: nn.Linear(12, 5).requires_grad_(False), False),
    "keyword": (lambda: Keyword(12), False),
    "other keyword": (lambda: OtherKeyword(12), False),
}


class OtherName(nn.Linear):
    """As in some libraries: its own forward, with an argument of another name."""

    def forward(self, hidden_states):
        return super().forward(hidden_states)


class Twice(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(width, 5)

    def forward(self, x):
        return self.layer(x) * self.layer(x.flip(1) / 2)


class Keyword(Twice):
    def forward(self, x):
        return self.layer(input=x)


class OtherKeyword(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer = OtherName(width, 5)

    def forward(self, x):
        return self.layer(hidden_states=x)


@pytest.mark.parametrize("name", READERS)
def test_whatever_reads_channels_says_how_the_loss_of_each_example_changes(name):
    make, channels_first = READERS[name]

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.reader, self.ones = nn.Linear(6, 12), make(), None

        def forward(self, x):
            x = self.first(x).tanh()
            if self.ones is not None:
                x = x * self.ones
            return self.reader(x.transpose(1, 2) if channels_first else x)

    x = torch.randn(6, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = Tokens().double()
    single = name in ("grouped convolution", "gpt2", "other keyword")  # read from the weight, of a batch as a whole
    batches = [each[None] for each in x] if single else [x[:4], x[4:]]
    found = {}
    graph = ChannelGraph.trace(model, x[:1])
    for criterion in ("taylor", "fisher"):
        data = Data(batches, lambda model, batch: model(batch).square().sum())
        scores = unit_scores(graph, CRITERIA[criterion](), data)
        group = graph.groups["first.weight:0"]
        found[criterion] = torch.tensor([scores[unit] for unit in group.members], dtype=torch.float64)
    model.ones = torch.ones(6, 1, 12, dtype=torch.float64, requires_grad=True)
    model(x).square().sum().backward()
    change = model.ones.grad[:, 0]
    if name == "grouped convolution":  # channels of four groups go together
        change = change.view(6, 4, 3).sum(1)
    torch.testing.assert_close(found["taylor"], normed(change.abs().mean(0)), rtol=1e-9, atol=0.0)
    torch.testing.assert_close(found["fisher"], normed(change.square().mean(0)), rtol=1e-9, atol=0.0)


def test_many_rows_are_kept_apart_in_few_parts():
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    graph = ChannelGraph.trace(model, torch.randn(1, 6, dtype=torch.float64))
    axes = [axis for group in graph.groups.values() for axis in group.axes]
    with Effects(graph, axes) as effects:
        model(torch.randn(5000, 6, dtype=torch.float64)).square().sum().backward()
        assert list(effects._examples) == [MOST_ROWS]
        effects.add(CRITERIA["taylor"](), {})
    found = effects.scores(1)
    assert all(found.known[unit] and found.values[unit] > 0 for unit in graph.where)


def test_the_default_criterion_is_the_best_for_what_is_given(graph):
    weights, data = plan_channels(graph, {"macs": 0.5}), plan_channels(graph, {"macs": 0.5}, **DATA)
    assert weights == plan_channels(graph, {"macs": 0.5}, criterion="l2") and weights.criterion == "l2"
    assert data == plan_channels(graph, {"macs": 0.5}, criterion="taylor", **DATA) and data.criterion == "taylor"
    assert "ranked by l2, which sees no data and is weak" in str(ChannelReport.of(graph, weights))
    assert "which sees no data" not in str(ChannelReport.of(graph, data))
    with pytest.raises(GraphError, match=r"^criterion: a gradient needs data"):
        plan_channels(graph, {"macs": 0.5}, batches=[BATCH])


def test_activation_by_hand(graph):
    model = net().eval()
    read = torch.cat([model[:3](batch[0]) for batch in DATA["batches"]]).abs().mean((0, 2, 3)).detach()
    torch.testing.assert_close(by_channel(graph, "activation", "0.weight:0"), normed(read), **NEAR)


def test_gradients_of_the_loop_stay(graph):
    model = graph.model
    marks = {}
    for name, parameter in model.named_parameters():
        parameter.grad = marks[name] = torch.full_like(parameter, 7.0)
    scores_of(graph, "taylor")
    assert all(parameter.grad is marks[name] for name, parameter in model.named_parameters())
    model.zero_grad()


def test_a_latency_that_is_met():
    model = nn.Sequential(nn.Linear(64, 4096), nn.ReLU(), nn.Linear(4096, 64))
    example = torch.randn(64, 64)
    graph = ChannelGraph.trace(model, example)
    plan = plan_channels(graph, {"latency": 0.6})
    assert 0.05 <= graph.macs(plan.channels) / graph.macs() <= 0.8


def test_equal_scores_are_spread_over_the_model(graph):
    model = net()
    for norm in (model[1], model[4]):
        nn.init.ones_(norm.weight)
    graph = ChannelGraph.trace(model, IMAGES[:1])
    plan = plan_channels(graph, {"channels": 0.5}, criterion="bn_scale")
    shares = [len(plan.channels[name]) / len(group) for name, group in graph.groups.items()]
    assert all(math.isclose(share, 0.5, abs_tol=0.04) for share in shares)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": {"flops": 0.5}}, r"^budget: is one of channels, params, macs, latency, got \{'flops': 0.5\}"),
        ({"budget": {"macs": 0.5, "params": 0.5}}, "^budget: is one of"),
        ({"budget": {"macs": 0}}, "^budget: is the share that is left, above 0 and at most 1, got 0"),
        ({"budget": {"macs": 50}}, "^budget: is the share that is left"),
        ({"budget": {"params": 0.001}}, r"^budget: cannot be met, got params 0.001; from 0\.\d+ to 1 can be reached"),
        ({"scope": "layer"}, "^scope: wrong value, got 'layer'; it must be 'global' or 'local'"),
        ({"round_to": 0}, r"^round_to: out of range, got 0; it must be greater than or equal to 1"),
        ({"limits": 1.5}, r"^limits: must lie between 0 and 1, the least first, got 1\.5; for example 0\.5"),
        ({"limits": {"conv9": 0.5}}, r"^limits: matches no layer that takes part, got 'conv9'; known: 0, 1, 3"),
        ({"limits": {"0": 2}}, r"^limits: 0 must lie between 0 and 1, the least first, got 2"),
        ({"limits": {"0": "half"}}, r"^limits: 0 must be the share that may go, or \[at least, at most\], got 'half'"),
        ({"limits": {"(": 0.5}}, r"^limits: not a regular expression"),
        ({"op_names": ["conv9"]}, r"^op_names\[0\]: matches no Conv or Linear layer, got 'conv9'"),
        ({"op_names": "0"}, r"^op_names: must be a list of names, got '0'; write \['0'\]"),
        ({"pruning_op_types": ["Con"]}, r"^pruning_op_types\[0\]: unknown layer type, got 'Con'"),
        ({"budget": 0.5}, r"^budget: is one of channels, params, macs, latency, got 0\.5"),
        ({"budget": {"macs": "half"}}, r"^budget: is the share that is left, above 0 and at most 1, got 'half'"),
        ({"criterion": "taylor"}, "^criterion: a gradient needs data, got none; give batches and to_loss"),
        ({"criterion": "taylor", "to_loss": loss}, "^criterion: batches is empty"),
        ({"criterion": "activation"}, "^criterion: activation needs data"),
        ({"criterion": "tailor"}, "did you mean 'taylor'"),
    ],
)
def test_options_that_are_refused(graph, options, message):
    options = {"budget": {"macs": 0.5}, **options}
    with pytest.raises(ValueError, match=message):
        plan_channels(graph, options.pop("budget"), **options)


def test_a_score_that_is_not_finite():
    model = net()
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = math.nan
    graph = ChannelGraph.trace(net(), IMAGES[:1])
    graph.stored.names["0.weight"].data = model[0].weight.data
    with pytest.raises(GraphError, match=r"^criterion: a score is not finite"):
        plan_channels(graph, {"macs": 0.5})


@pytest.mark.parametrize("criterion", ["taylor", "fisher", "gradient", "snip", "snip_momentum"])
def test_gradients_of_one_batch_are_gone_before_the_next(criterion):
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    graph = ChannelGraph.trace(model, torch.ones(1, 3))
    seen, alive = [], []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda each: seen.append(weakref.ref(each.grad)))

    def to_loss(model, batch):
        alive.append(sum(ref() is not None for ref in seen))
        return model(batch).square().sum()

    batches = [torch.randn(2, 3) for _ in range(4)]
    plan_channels(graph, {"channels": 0.5}, criterion=criterion, batches=batches, to_loss=to_loss)
    assert len(seen) == 16 and alive == [0, 0, 0, 0]
    assert all(ref() is None for ref in seen)


class FusedGate(nn.Module):
    """Gate and value come from one layer."""

    def __init__(self):
        super().__init__()
        self.both, self.down = nn.Linear(8, 96), nn.Linear(48, 4)

    def forward(self, x):
        gate, value = self.both(x).chunk(2, dim=-1)
        return self.down(gate.sigmoid() * value)


@pytest.mark.parametrize("uniform", [False, True])
def test_every_layer_keeps_a_multiple(uniform):
    torch.manual_seed(0)
    model = FusedGate()
    graph = ChannelGraph.trace(model, torch.randn(2, 8))
    slim_(model, plan_channels(graph, {"macs": 0.45}, round_to=8, uniform=uniform))
    assert (model.both.out_features, model.down.in_features) == (32, 16)
