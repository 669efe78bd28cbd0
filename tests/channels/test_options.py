"""Which channels may go: layers by name and type, limits, criteria that masks have too; the same messages."""

import re

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from pruning_core.channels import Pruner, plan_channels
from pruning_core.graph import ChannelGraph
from tests.channels.test_planner import DATA, IMAGES, NEAR, by_channel, loss, net, normed, slices


class Residual(nn.Module):
    """The channels of ``stem`` and ``second`` are summed: they go together."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 20, 3, padding=1)
        self.first = nn.Conv2d(20, 20, 3, padding=1)
        self.second = nn.Conv2d(20, 20, 3, padding=1)
        self.head = nn.Linear(20, 4)

    def forward(self, x):
        x = self.stem(x)
        return self.head((x + self.second(self.first(x).relu())).mean((2, 3)))


@pytest.fixture(scope="module")
def graph():
    return ChannelGraph.trace(net(), IMAGES[:1])


@pytest.fixture(scope="module")
def residual():
    torch.manual_seed(0)
    return ChannelGraph.trace(Residual(), IMAGES[:1])


def gone(graph, **options):
    """The share of each group that a plan for as little as possible takes; of half of the channels where it can."""
    plan = plan_channels(graph, {"channels": options.pop("left", 0.5)}, **options)
    shares = {name: len(plan.channels.get(name, ())) / len(group) for name, group in graph.groups.items()}
    return {name.partition(".")[0]: share for name, share in shares.items()}


# ---- limits ---------------------------------------------------------------------------------------------------------


def test_at_least_and_at_most(graph):
    shares = gone(graph, limits={r"^0$": [0.75, 1.0], r"^8$": [0.0, 0.5]})  # 8 reads the channels of 3
    assert shares["0"] >= 0.75
    assert shares["3"] <= 0.5
    assert gone(graph, limits={r"^0$": [0.25, 0.25]}, left=0.75)["0"] == 0.25


def test_the_last_pattern_counts_for_a_layer(graph):
    assert gone(graph, limits={".*": 0.95, r"^0$": 0.0}, left=0.8)["0"] == 0
    assert gone(graph, limits={r"^0$": 0.0, r"^[03]$": 0.6})["0"] <= 0.6  # 3 reads what 0 makes
    with pytest.raises(ValueError, match=r"^budget: cannot be met"):
        gone(graph, limits={r"^0$": 0.9, ".*": 0.0})


def test_layers_that_go_together_have_the_narrowest_limits(residual):
    assert gone(residual, limits={"stem": 0.0, "second": 0.9}, left=0.7)["stem"] == 0
    assert gone(residual, limits={"second": 0.9, "stem": 0.0}, left=0.7)["stem"] == 0
    message = (
        "limits: nothing fits second, stem, whose channels go together, got at least 0.5 and at most 0.25; widen one"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        gone(residual, limits={"stem": 0.25, "second": [0.5, 0.9]})


# ---- layers ---------------------------------------------------------------------------------------------------------


def test_named_layers_alone(graph):
    shares = gone(graph, op_names=[r"^3$"], left=0.8)
    assert shares["0"] == 0 < shares["3"]


def test_a_group_goes_when_all_that_make_it_are_named(residual):
    assert gone(residual, op_names=["stem", "first"], left=0.9)["stem"] == 0
    assert gone(residual, op_names=["stem", "second"], left=0.9)["stem"] > 0


def test_excluded_layers_stay_whole(graph, residual):
    shares = gone(graph, excluded_op_names=[r"^0$"], left=0.8)
    assert shares["0"] == 0 < shares["3"]
    assert gone(residual, excluded_op_names=["head"], left=0.9) == {"stem": 0, "first": pytest.approx(0.2)}
    with pytest.raises(ValueError, match=r"^budget: cannot be met"):
        gone(graph, excluded_op_names=[r"^3$"])  # 3 makes one group and reads the other


def test_types_of_layers():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 16), nn.ReLU(), nn.Linear(16, 4)
    )
    graph = ChannelGraph.trace(model, IMAGES[:1])
    shares = gone(graph, pruning_op_types=["Linear"], left=0.8)
    assert shares["0"] == 0 < shares["3"]
    shares = gone(graph, pruning_op_types=["Conv2d"], left=0.8)
    assert shares["3"] == 0 < shares["0"]


# ---- the criteria of masks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("criterion", "factor"), [("snip", 1.0), ("snip_momentum", 0.9)])
def test_snip_by_hand(graph, criterion, factor):
    """The factor of snip_momentum is the same for all: the order of channels is that of snip, summed over batches."""
    model = net()
    sums = 0
    for batch in DATA["batches"]:
        model.zero_grad()
        loss(model, batch).backward()
        parts = slices(model, lambda w, d: factor * (w * w.grad).detach().abs().movedim(d, 0).flatten(1).sum(1)
                       if w.dim() > 1 else factor * (w * w.grad).detach().abs())  # fmt: skip
        sums = sums + torch.stack(parts).double().mean(0)
    torch.testing.assert_close(by_channel(graph, criterion, "0.weight:0"), normed(sums), **{**NEAR, "rtol": 1e-4})


# ---- the pruner of the loop -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"round_to": 0}, r"^round_to: out of range, got 0; it must be greater than or equal to 1"),
        ({"limits": 2.0}, r"^limits: must lie between 0 and 1, the least first, got 2\.0; for example 0\.5"),
        ({"limits": {"nonsense.*": 0}}, r"^limits: matches no layer that takes part, got 'nonsense\.\*'; known: 0, 1"),
        ({"op_names": ["nonsense"]}, r"^op_names\[0\]: matches no Conv or Linear layer, got 'nonsense'"),
        ({"op_names": "0"}, r"^op_names: must be a list of names, got '0'"),
        ({"criterion": "tailor"}, r"^criterion: unknown.*did you mean 'taylor'"),
    ],
)
def test_mistakes_in_the_loop(options, message):
    """As in ``plan_channels``; what needs the graph is found in the first call, before anything changes."""
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=message):
        Pruner(model, **options).rebuild_model((IMAGES, torch.arange(4)), _to_loss, optimizer, 4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def _to_loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


def test_the_loop_keeps_to_its_layers():
    model = net()
    pruner = Pruner(model, excluded_op_names=[r"^8$"], round_to=4)
    pruner.rebuild_model((IMAGES, torch.arange(4)), _to_loss, torch.optim.SGD(model.parameters(), lr=0.1), 6)
    assert (model[0].out_channels, model[3].out_channels) == (28, 64)
