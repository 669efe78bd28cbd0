"""A wrong cut cannot hide: not behind a quiet gate, a zero, a vanishing signal, or the rounding of a low precision."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import pruning_core as pc
from pruning_core import ChannelGraph, GraphError, slim_
from pruning_core.graph.cut.copies import WAYS, TrialCuts, Way, shared_copy
from pruning_core.graph.cut.difference import relative_difference
from pruning_core.graph.cut.reference import masked_run
from pruning_core.graph.inputs import as_inputs
from pruning_core.graph.trace.upcast import Upcast, in_double

IMAGE = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


class AcrossChannels(nn.Module):
    """A gate by a convolution that slides along channels: no cut can be right."""

    def __init__(self, loud=1.0):
        super().__init__()
        self.loud = loud
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x):
        gate = self.conv(x.mean((2, 3))[:, None])[:, 0]
        return x * (1 + self.loud * gate)[:, :, None, None]


class Scaled(nn.Module):
    """A residual branch of a certain strength, as with layer scale or ReZero."""

    def __init__(self, inner, strength, size=1):
        super().__init__()
        self.inner, self.strength = inner, nn.Parameter(torch.full((size, 1, 1), strength))

    def forward(self, x):
        return x + self.strength * (self.inner(x) - x)


def net(gate, tail=None):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.SiLU(), gate, tail or nn.Conv2d(16, 8, 1)).eval()


def wrong_plan(tail=None):
    """A plan made for the net without its gate, which fits the one with it in every shape."""
    graph = ChannelGraph.trace(net(nn.Identity(), tail), IMAGE)
    return graph.plan({"0.weight:0": [1, 2, 5, 9, 10, 14]})


def test_a_gate_that_float32_cannot_tell_from_rounding_is_refused():
    model = net(AcrossChannels(1e-3))
    bits = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        GraphError, match=r"^slim_: the cut model does not compute what the masked one does.*e-0[45].*put back"
    ):
        slim_(model, wrong_plan())
    assert all(torch.equal(bits[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("strength", [0.0, 1e-9])
@pytest.mark.parametrize("size", [1, 16])
def test_a_wrong_cut_behind_a_branch_that_is_switched_off_is_refused_in_a_trial(strength, size):
    """``slim_`` itself sees no difference there: today there is none."""
    model = net(Scaled(AcrossChannels(), strength, size))
    plan = ChannelGraph.trace(net(Scaled(nn.Identity(), strength, size)), IMAGE).plan({"0.weight:0": [1, 2, 5, 9, 14]})
    assert slim_(shared_copy(model), plan, example_inputs=IMAGE).difference <= 1e-6
    with pytest.raises(GraphError, match="does not compute what the masked one does"):
        TrialCuts(model, as_inputs(IMAGE))(plan)


def test_a_wrong_cut_deep_under_layers_that_shrink_the_signal_is_refused_in_a_trial():
    def tail():
        torch.manual_seed(1)
        layers = [nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.SiLU()) for _ in range(40)]
        return nn.Sequential(*layers, nn.Conv2d(16, 8, 1))

    model, plan = net(AcrossChannels(), tail()), wrong_plan(tail())
    assert slim_(shared_copy(model), plan, example_inputs=IMAGE).difference <= 1e-6
    with pytest.raises(GraphError, match="does not compute what the masked one does"):
        TrialCuts(model, as_inputs(IMAGE))(plan)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("image", [IMAGE, torch.zeros_like(IMAGE), torch.ones_like(IMAGE)], ids=["noise", "0", "1"])
def test_right_cuts_pass_the_strictest_trial(dtype, image):
    model = net(nn.BatchNorm2d(16)).to(dtype)
    graph = ChannelGraph.trace(model, image.to(dtype))
    trials = TrialCuts(model, as_inputs(image.to(dtype)))
    trials(graph.plan({"0.weight:0": [0, 3, 4]}))
    assert trials.ways == list(WAYS)


class Cells(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.cells, self.last = nn.Linear(6, 12), nn.LSTM(12, 10, batch_first=True), nn.Linear(10, 5)

    def forward(self, x):
        return self.last(self.cells(self.first(x))[0])


class Suspicious(nn.Module):
    """Accepts one precision alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 5)

    def forward(self, x):
        if x.dtype == torch.float64:
            raise TypeError("float64 is not supported")
        return self.last(self.first(x).relu())


SERIES = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cells_that_compare_dtypes_are_proved_with_stored_weights_in_float64(dtype):
    model = Cells().to(dtype)
    series = SERIES.to(dtype)
    graph = ChannelGraph.trace(model, series)
    trials = TrialCuts(model, as_inputs(series))
    plan = graph.plan({name: [0, 3, 4] for name in graph.groups})
    assert len(plan.channels) == 2
    trials(plan)
    assert trials.ways[0] == Way(lively=True, stored=True)
    done = slim_(model, plan)
    assert {each.dtype for each in model.parameters()} == {dtype}
    assert done.in_float64 is None or done.in_float64 < 1e-12
    if dtype == torch.bfloat16:
        assert done.in_float64 is not None and str(done).endswith(f"({done.in_float64:.1e} in float64)")


def test_what_cannot_run_in_float64_is_told():
    model = Suspicious().bfloat16()
    graph = ChannelGraph.trace(model, SERIES.bfloat16())
    assert list(graph.groups) == ["first.weight:0"]
    done = slim_(model, graph.plan({"first.weight:0": [1, 2]}))
    assert done.in_float64 is not None and math.isnan(done.in_float64)
    assert str(done).endswith("(not checked in float64, which the model cannot run in)")


def test_float32_is_proved_again_only_where_it_must_be():
    model = net(nn.ReLU())
    done = slim_(model, ChannelGraph.trace(model, IMAGE).plan({"0.weight:0": [1]}))
    assert done.difference <= 1e-6 and done.in_float64 is None and "float64" not in str(done)


class Drift(nn.Module):
    """Rounding alone makes a difference: large numbers cancel."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.plus, self.minus = nn.Linear(6, 64), nn.Linear(64, 5), nn.Linear(64, 5)
        with torch.no_grad():
            self.minus.weight.copy_(self.plus.weight + 1e-3 * torch.randn(5, 64))
            self.minus.bias.copy_(self.plus.bias)

    def forward(self, x):
        x = self.first(x)
        return self.plus(x) - self.minus(x)


def test_rounding_is_told_from_a_fault():
    model = Drift()
    done = slim_(model, ChannelGraph.trace(model, SERIES).plan({"first.weight:0": [1, 5, 9, 60]}))
    assert done.difference > 1e-6 > 1e-9 > done.in_float64
    assert str(done).endswith(f"{done.difference:.1e} ({done.in_float64:.1e} in float64)")


def test_a_trial_leaves_the_model_alone_and_shares_its_memory():
    model = net(nn.BatchNorm2d(16))
    before = {name: (value, value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    shared = shared_copy(model)
    assert all(value.data_ptr() == before[name][1] for name, value in shared.state_dict().items())
    assert not {id(each) for each in model.parameters()} & {id(each) for each in shared.parameters()}
    ChannelGraph.trace(model, IMAGE)
    for name, value in model.state_dict().items():
        assert value.data_ptr() == before[name][1] and torch.equal(value, before[name][2])


def test_ties_are_kept_in_a_shared_copy():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    shared = shared_copy(model)
    assert shared[0].weight is shared[1].weight is not model[0].weight


class Everything(nn.Module):
    """Views, writes in place, factories, casts, complex numbers, float32 inside."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inside = torch.float32
        self.conv, self.norm = nn.Conv1d(6, 8, 3, padding=1), nn.LayerNorm(8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.table, self.out = nn.Embedding(9, 8), nn.Linear(8, 3)
        self.register_buffer("mask", torch.tril(torch.ones(7, 7)))

    def forward(self, x):
        h = self.norm(self.conv(x.mT).mT.to(x.dtype))
        room = torch.zeros(*h.shape, dtype=self.inside)
        room[:, 1:] = h[:, :-1]
        room.add_(self.table(torch.arange(7)))
        turned = torch.view_as_real(
            torch.view_as_complex(room.reshape(*room.shape[:-1], 4, 2))
            * torch.polar(*(torch.arange(1, 5, dtype=self.inside),) * 2)
        )
        h = turned.flatten(2).to(x.dtype)
        h = self.attend(h, h, h, attn_mask=self.mask == 0, need_weights=False)[0]
        return self.out.weight @ functional.softmax(h, -1, dtype=self.inside).to(h.dtype).mT + self.out.bias[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_operations_run_in_float64(dtype):
    """As in a model that is converted to float64 and computes in nothing else."""
    model = Everything().to(dtype).eval()
    plan = ChannelGraph.trace(model, SERIES.to(dtype), trial=False).plan({})
    upcast = Upcast(model, {})
    have = masked_run(model, plan, in_double(as_inputs(SERIES.to(dtype))), upcast).output
    double = shared_copy(model).double()
    double.inside = torch.float64
    with torch.inference_mode():
        want = double(SERIES.to(dtype).double())
    assert have.dtype == torch.float64 and not upcast.rounded and {each.dtype for each in model.parameters()} == {dtype}
    assert relative_difference(want, have) < 1e-15


class Remembers(nn.Module):
    """Writes into a tensor of its own precision."""

    def __init__(self, buffer):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 12), nn.Linear(12, 5)
        self.seen = nn.Buffer(torch.zeros(3, 7, 5)) if buffer else torch.zeros(3, 7, 5)

    def forward(self, x):
        self.seen.copy_(self.last(self.first(x)))
        return self.seen * 1


@pytest.mark.parametrize(("buffer", "way"), [(True, Way(lively=True, stored=True)), (False, Way(upcast=False))])
def test_what_is_rounded_on_the_way_proves_nothing(buffer, way):
    model = Remembers(buffer)
    trials = TrialCuts(model, as_inputs(SERIES))
    graph = ChannelGraph.trace(model, SERIES)
    plan = graph.plan({"first.weight:0": [0]})
    trials(plan)
    assert trials.ways[0] == way


@pytest.mark.parametrize(
    ("want", "have", "apart"),
    [
        ([1.0, -math.inf], [1.0, -math.inf], 0.0),
        ([2.0, -math.inf], [1.0, -math.inf], 0.5),
        ([2.0, torch.finfo(torch.float32).min], [1.0, torch.finfo(torch.float32).min], 0.5),
        ([2.0, math.inf], [2.0, -math.inf], math.inf),
        ([2.0, 1.0], [2.0, math.nan], math.nan),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
    ],
)
def test_masked_logits_do_not_hide_the_others(want, have, apart):
    assert relative_difference(torch.tensor(want), torch.tensor(have)) == pytest.approx(apart, nan_ok=True)


def test_one_call_tells_it_too():
    model = Drift()
    assert str(pc.slim(model, {"channels": 0.9}, SERIES)).endswith("in float64)")


class Cancelled(nn.Module):
    """What is left of a difference is rounding alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(6, 64), nn.Linear(64, 12, bias=False), nn.Linear(12, 12)

    def forward(self, x):
        h = self.first(x)
        once = self.middle(h)
        return once + self.last(self.middle(3 * h) / 3 - once)


def test_rounding_is_not_amplified_in_a_trial():
    assert "first.weight:0" in ChannelGraph.trace(Cancelled(), SERIES).groups
