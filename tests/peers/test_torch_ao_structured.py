"""What torch's own 22 tests of structured pruning demand (test/ao/sparsity/test_structured_sparsifier.py), anew."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.functional import max_pool2d, relu
from torch.nn.utils import parametrize

from pruning_core.compat.torch_ao import (
    BaseStructuredSparsifier,
    CubicSL,
    FakeStructuredSparsity,
    FPGMPruner,
    LambdaSL,
    LSTMSaliencyPruner,
    SaliencyPruner,
)


class OneRow(BaseStructuredSparsifier):
    def update_mask(self, module, tensor_name, **kwargs):
        getattr(module.parametrizations, tensor_name)[0].mask[1] = False


class Third(BaseStructuredSparsifier):
    """Every third row."""

    def update_mask(self, module, tensor_name, **kwargs):
        module.parametrizations[tensor_name][0].mask[::3] = False


class BottomHalf(BaseStructuredSparsifier):
    """The second half of each gate, by a mask that is put in place of the old one's data."""

    def update_mask(self, module, tensor_name, **kwargs):
        for fake in getattr(module.parametrizations, tensor_name):
            if isinstance(fake, FakeStructuredSparsity):
                gates = torch.split(fake.mask, len(fake.mask) // 4)
                for gate in gates:
                    gate[len(gate) // 2 :] = False
                fake.mask.data = torch.cat(gates).data


def linears(bias=False, act=None):
    layers = []
    for i, (into, out) in enumerate([(7, 5), (5, 6), (6, 4), (4, 4)]):
        layers += [nn.Linear(into, out, bias=bool(bias) and (bias == "all" or i % 2 == 0)), *([act()] if act else [])]
    return nn.Sequential(nn.Sequential(*layers), nn.Linear(4, 10, bias=False))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(7, 5), nn.Linear(5, 6), nn.Linear(6, 10)

    def forward(self, x):
        return self.last(relu(self.second(relu(self.first(x)))))


def convolutions(bias=False, act=None, padding=(0, 0, 0), pool=None):
    layers = []
    for (into, out), pad in zip([(1, 12), (12, 16), (16, 8)], padding, strict=True):
        layers += [
            nn.Conv2d(into, out, 3, bias=bias, padding=pad),
            *([act()] if act else []),
            *([pool()] if pool else []),
        ]
    return nn.Sequential(nn.Sequential(*layers), nn.Conv2d(8, 5, 3, bias=False))


class Flattened(nn.Module):
    """Convolutions, pools and a Linear behind a flatten, by modules or by functions."""

    def __init__(self, functional):
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(1, 12, 3), nn.Conv2d(12, 16, 3), nn.Linear(16 * 4, 13)
        self.pool, self.flatten, self.functional = nn.AdaptiveAvgPool2d(2), nn.Flatten(), functional

    def forward(self, x):
        x = max_pool2d(self.first(x), 2) if self.functional else nn.MaxPool2d(2)(self.first(x))
        x = self.pool(self.second(x))
        return self.last(torch.flatten(x, 1) if self.functional else self.flatten(x))


class Recurrent(nn.Module):
    def __init__(self, size=8, layers=1, norm=False):
        super().__init__()
        self.lstm = nn.LSTM(size, size, layers)
        self.norm = nn.LayerNorm(size) if norm else nn.Identity()
        self.linear = nn.Linear(size, size)

    def forward(self, x):
        output, _ = self.lstm(x)
        return self.linear(self.norm(output)), output


ROWS, IMAGE = torch.ones(16, 7), torch.ones(1, 1, 28, 28)
LINEAR = {
    "no bias": linears,
    "some biases": lambda: linears(bias="some"),
    "biases": lambda: linears(bias="all"),
    "activations": lambda: linears(bias="all", act=nn.ReLU),
    "functional": Functional,
}
CONV = {
    "no bias": convolutions,
    "biases": lambda: convolutions(bias=True),
    "activations": lambda: convolutions(bias=True, act=nn.ReLU),
    "pools": lambda: convolutions(bias=True, act=nn.ReLU, pool=lambda: nn.MaxPool2d(2, 1)),
    "padded, then not": lambda: convolutions(bias=True, act=nn.ReLU, padding=(1, 0, 0)),
    "not, then padded": lambda: convolutions(bias=True, act=nn.ReLU, padding=(0, 1, 1)),
    "flattened": lambda: Flattened(False),
    "flattened by functions": lambda: Flattened(True),
}
MODELS = [(made, ROWS) for made in LINEAR.values()] + [(made, IMAGE) for made in CONV.values()]
IDS = [f"linear, {name}" for name in LINEAR] + [f"conv, {name}" for name in CONV]


def step(pruner, model, config=None):
    pruner.prepare(model, config)
    pruner.enable_mask_update = True
    pruner.step()
    return pruner


# ---- constructor, prepare, step (test_constructor, test_prepare_*, test_step_*) --------------------------------------


def test_the_constructor():
    with pytest.raises(TypeError, match=r"BaseStructuredSparsifier.*update_mask"):
        BaseStructuredSparsifier()
    pruner = OneRow(None)
    pruner.prepare(linears(), None)
    assert len(pruner.groups) == 5
    pruner.step()
    pruner = OneRow({"test": 3})
    pruner.prepare(linears(), [{"tensor_fqn": "0.0.weight"}])
    (group,) = pruner.groups
    assert (group["module_fqn"], group["test"]) == ("0.0", 3)


@pytest.mark.parametrize(("made", "x"), MODELS, ids=IDS)
def test_prepare_and_step(made, x):
    model = made()
    shape = model(x).shape
    pruner = OneRow(None)
    pruner.prepare(model, None)
    for group in pruner.groups:
        assert group["tensor_fqn"] in pruner.state
        assert parametrize.is_parametrized(group["module"])
        assert type(group["module"].parametrizations.weight[0]) is FakeStructuredSparsity
        assert group["module"].parametrizations.weight[0].mask.dtype == torch.bool
    assert model(x).shape == shape
    pruner.step()  # updates are enabled from the start, as in torch
    for group in pruner.groups:
        mask = group["module"].parametrizations.weight[0].mask
        assert mask.count_nonzero() == mask.numel() - 1
    assert model(x).shape == shape


# ---- prune (test_prune_linear_*, test_prune_conv2d_*, test_complex_conv2d) -------------------------------------------


@pytest.mark.parametrize("prune_bias", [True, False])
@pytest.mark.parametrize(("made", "x"), MODELS, ids=IDS)
@pytest.mark.filterwarnings("ignore:prune. .* masked rows stay as zeros, since prune_bias=False")
def test_prune(made, x, prune_bias):
    torch.manual_seed(0)
    model = made().eval()
    before = sum(each.numel() for each in model.parameters())
    layers = [name for name, each in model.named_modules() if isinstance(each, nn.Linear | nn.Conv2d)][:-1]
    pruner = step(Third({"prune_bias": prune_bias}), model, [{"tensor_fqn": f"{name}.weight"} for name in layers])
    masked = model(x)
    pruned = pruner.prune()
    assert not any(hasattr(each, "parametrizations") for each in pruned.modules())
    torch.testing.assert_close(pruned(x), masked, rtol=1e-4, atol=1e-5)
    assert sum(each.numel() for each in pruned.parameters()) < before


# ---- LSTM (test_prune_lstm_*) ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_prune_lstm(layers, norm):
    torch.manual_seed(0)
    model = Recurrent(layers=layers, norm=norm).eval()
    dense = copy.deepcopy(model)
    names = [f"lstm.weight_{kind}_l{i}" for i in range(layers) for kind in ("ih", "hh")]
    pruner = step(BottomHalf({"sparsity_level": 0.5}), model, [{"tensor_fqn": name} for name in names])
    x = torch.ones(1, 8)
    masked, hidden = model(x)
    pruned = pruner.prune()
    assert pruned(x)[0].shape == masked.shape
    assert pruned.lstm.hidden_size == 4
    if layers == 1:
        torch.testing.assert_close(pruned(x)[1], hidden[:, :4], rtol=1e-5, atol=1e-7)
    before = dict(dense.named_parameters())
    for name, parameter in pruned.named_parameters():
        assert set(parameter.flatten().tolist()) <= set(before[name].flatten().tolist())


# ---- rules (TestSaliencyPruner, TestFPGMPruner) ----------------------------------------------------------------------


def test_the_saliency_pruner():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2))
    model[0].weight.data = torch.arange(1.0, 5.0)[:, None].repeat(1, 4)
    pruned = step(SaliencyPruner({}), model, [{"tensor_fqn": "0.weight", "sparsity_level": 0.5}]).prune()
    assert torch.equal(pruned[0].weight, torch.tensor([[3.0] * 4, [4.0] * 4]))


def test_the_lstm_saliency_pruner():
    """Gates keep different hidden units: their rows are moved together, which is torch's result, and said aloud."""
    model = Recurrent(2)
    rows = torch.tensor([[1.0, 1], [2, 2], [2, 2], [1, 1], [-1, -1], [-2, -2], [-2, -2], [-1, -1]])
    for kind in ("ih", "hh"):
        getattr(model.lstm, f"weight_{kind}_l0").data = rows.clone()
        getattr(model.lstm, f"bias_{kind}_l0").data = rows[:, 0].clone()
    config = [{"tensor_fqn": "lstm.weight_ih_l0"}, {"tensor_fqn": "lstm.weight_hh_l0"}]
    pruner = step(LSTMSaliencyPruner({"sparsity_level": 0.5}), model, config)
    message = r"^prune: the gates of lstm.weight_ih_l0, lstm.weight_hh_l0 keep different hidden units"
    with pytest.warns(UserWarning, match=message):
        pruned = pruner.prune()
    pruned(torch.ones(1, 2))
    kept = torch.tensor([[2.0, 2], [2, 2], [-2, -2], [-2, -2]])
    assert torch.equal(pruned.lstm.weight_ih_l0, kept)
    assert torch.equal(pruned.lstm.weight_hh_l0, kept[:, :1])
    assert torch.equal(pruned.lstm.bias_ih_l0, kept[:, 0]) and torch.equal(pruned.lstm.bias_hh_l0, kept[:, 0])


def fpgm_net():
    model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1, bias=False), nn.Conv2d(3, 4, 3, padding=1, bias=False))
    for layer, values in zip(model, ([3.0, 2.0, 0.1], [6.0, 7.0, 0.4, 0.5]), strict=True):
        layer.weight.data = torch.tensor(values)[:, None, None, None].expand_as(layer.weight).clone()
    return model


def test_fpgm_distances():
    distances = FPGMPruner(0.3)._compute_distance(fpgm_net()[0].weight)
    torch.testing.assert_close(distances, 3 * torch.tensor([1.0 + 2.9, 1.0 + 1.9, 2.9 + 1.9]))


def test_the_fpgm_pruner():
    """The filter in the middle goes, not that with the smallest norm."""
    x = torch.ones(1, 1, 32, 32)
    pruned = step(FPGMPruner(0.3), fpgm_net(), [{"tensor_fqn": "0.weight"}]).prune()
    assert pruned(x).shape == (1, 4, 32, 32) and pruned[1].weight.shape == (4, 2, 3, 3)
    assert pruned[0].weight[:, 0, 0, 0].tolist() == [3.0, pytest.approx(0.1)]
    config = [{"tensor_fqn": "0.weight"}, {"tensor_fqn": "1.weight", "sparsity_level": 0.5}]
    pruned = step(FPGMPruner(0.3), fpgm_net(), config).prune()
    assert pruned(x).shape == (1, 2, 32, 32)
    assert pruned[1].weight[:, 0, 0, 0].tolist() == [7.0, pytest.approx(0.4)]
    with pytest.raises(NotImplementedError, match=r"^dist: must be 1, 2 or a function of the rows, got 3"):
        FPGMPruner(0.3, dist=3)


# ---- state, masks of the config, schedulers --------------------------------------------------------------------------


class Remembers(OneRow):
    def update_mask(self, module, tensor_name, **kwargs):
        super().update_mask(module, tensor_name)
        state = self.state[kwargs["tensor_fqn"]]
        state["calls"] = state.get("calls", 0) + 1


def test_what_update_mask_keeps_in_the_state():
    pruner = step(Remembers(), linears())
    pruner.step()
    assert pruner.state["0.0.weight"]["calls"] == 2
    saved = pickle.loads(pickle.dumps(pruner.state_dict()))  # noqa: S301
    assert saved["state"]["0.0.weight"]["calls"] == 2
    other = Remembers()
    other.prepare(linears())
    other.load_state_dict(saved)
    other.step()
    assert other.state["0.0.weight"]["calls"] == 3
    assert not other.state["0.0.weight"]["mask"][1]


def test_a_mask_that_is_written_into_the_state():
    class Writes(BaseStructuredSparsifier):
        def update_mask(self, module, tensor_name, tensor_fqn, **kwargs):
            self.state[tensor_fqn]["mask"] = torch.arange(len(getattr(module, tensor_name))) > 1

    model = linears()
    step(Writes(), model, [{"tensor_fqn": "0.0.weight"}]).prune()
    assert model[0][0].weight.shape == (3, 7)


def test_the_mask_of_a_config_entry():
    model = linears()
    mask = torch.tensor([True, False, True, False, True])
    pruner = OneRow()
    pruner.prepare(model, [{"tensor_fqn": "0.0.weight", "mask": mask}])
    assert torch.equal(pruner.state["0.0.weight"]["mask"], mask)
    pruner.prune()
    assert model[0][0].weight.shape == (3, 7)
    with pytest.raises(ValueError, match=r"^0.0.weight: its mask must be boolean, one value for each of 5 rows, got"):
        OneRow().prepare(linears(), [{"tensor_fqn": "0.0.weight", "mask": torch.ones(5)}])


def test_the_parametrization_of_a_config_entry():
    class Half(FakeStructuredSparsity):
        def forward(self, tensor):
            return super().forward(tensor) / 2

    model = linears()
    weight = model[0][0].weight.detach().clone()
    OneRow().prepare(model, [{"tensor_fqn": "0.0.weight", "parametrization": Half}])
    assert torch.equal(model[0][0].weight, weight / 2)


def torch_schedulers():
    from torch.ao.pruning import CubicSL as Cubic
    from torch.ao.pruning import LambdaSL as Lambda

    return Lambda, Cubic


@pytest.mark.parametrize("theirs", [False, True])
def test_a_scheduler_sets_the_level(theirs):
    scheduler = torch_schedulers()[0] if theirs else LambdaSL
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    pruner = SaliencyPruner({"sparsity_level": 0.5})
    pruner.prepare(model, [{"tensor_fqn": "0.weight"}, {"tensor_fqn": "1.weight", "sparsity_level": 0.25}])
    schedule = scheduler(pruner, sl_lambda=lambda epoch: epoch / 2)
    reached = []
    for _ in range(3):
        pruner.step()
        reached.append([8 - int(pruner.state[f"{i}.weight"]["mask"].sum()) for i in range(2)])
        schedule.step()
    assert reached == [[0, 0], [2, 1], [4, 2]]
    assert schedule.get_last_sl() == [0.75, 0.375]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"init_sl": 0.1, "init_t": 2, "delta_t": 2, "total_t": 3},
        {"initially_zero": True, "init_t": 3, "init_sl": 0.2},
    ],
)
def test_the_cubic_scheduler_is_torchs(arguments):
    levels = []
    for scheduler in (CubicSL, torch_schedulers()[1]):
        pruner = OneRow({"sparsity_level": 0.8})
        pruner.prepare(linears())
        schedule = scheduler(pruner, **arguments)
        levels.append([])
        for _ in range(12):
            levels[-1].append(schedule.get_last_sl())
            pruner.step()
            schedule.step()
    torch.testing.assert_close(torch.tensor(levels[0]), torch.tensor(levels[1]))


def test_a_scheduler_needs_levels():
    pruner = OneRow()
    with pytest.raises(TypeError, match=r"^sparsifier: has no groups, got OneRow; prepare\(model, config\) one first"):
        LambdaSL(pruner, sl_lambda=float)
    pruner.prepare(linears())
    with pytest.raises(ValueError, match=r"^0.0.weight: has no sparsity_level, got .*; put one into its config"):
        LambdaSL(pruner, sl_lambda=float)
    pruner = OneRow({"sparsity_level": 0.5})
    pruner.prepare(linears())
    with pytest.raises(ValueError, match=r"^sl_lambda: needs one value, or 5: one per group, got 2; give 5"):
        LambdaSL(pruner, sl_lambda=[float, float])
    schedule = LambdaSL(pruner, sl_lambda=lambda epoch: 0.5)
    assert schedule.state_dict()["last_epoch"] == 0
    schedule.load_state_dict({"last_epoch": 7})
    assert schedule.last_epoch == 7


def test_nothing_of_torch_ao_is_needed():
    """It is deprecated: these names must live on when it is gone."""
    import subprocess
    import sys

    code = (
        "import sys; sys.modules['torch.ao.pruning'] = None; from pruning_core.compat.torch_ao import *; "
        "from pruning_core.compat.torch_ao.prune_functions import prune_conv2d_activation_conv2d; "
        "print('torch.ao.pruning.sparsifier.base_sparsifier' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_the_names_for_patterns_are_not_called():
    from pruning_core.compat.torch_ao.prune_functions import prune_linear

    with pytest.raises(RuntimeError, match=r"^prune_linear: is a name for patterns, got a call; pruner.prune\(\)"):
        prune_linear(nn.Linear(2, 2))


# ---- beyond torch's tests -------------------------------------------------------------------------------------------


def gates_apart(names=("ih", "hh")):
    """Masks that keep another hidden unit in each gate."""

    class Apart(BaseStructuredSparsifier):
        def update_mask(self, module, tensor_name, **kwargs):
            mask = getattr(module.parametrizations, tensor_name)[0].mask
            mask[[0, 5, 2 + 8, 3 + 12]] = False  # units 0, 1, 2, 3 of the four gates

    torch.manual_seed(0)
    model = Recurrent(4)
    return step(Apart(), model, [{"tensor_fqn": f"lstm.weight_{name}_l0"} for name in names]), model


def test_squash_mask_moves_no_rows():
    pruner, model = gates_apart()
    masked = model.lstm.weight_ih_l0.detach().clone(), model.lstm.weight_hh_l0.detach().clone()
    pruner.squash_mask()
    assert torch.equal(model.lstm.weight_ih_l0, masked[0]) and torch.equal(model.lstm.weight_hh_l0, masked[1])


def test_gates_of_one_weight_alone_stay():
    """Rows of the other weight would not move along: masks disagree, and rows stay as zeros."""
    pruner, model = gates_apart(names=["ih"])
    x = torch.randn(3, 4)
    masked = model(x)[0]
    with pytest.warns(UserWarning, match=r"^prune: masks of coupled rows disagree, got 4 masked rows"):
        pruner.prune()
    assert model.lstm.hidden_size == 4
    torch.testing.assert_close(model(x)[0], masked)


def test_what_a_parametrization_computes_is_what_is_left():
    class Half(FakeStructuredSparsity):
        def forward(self, tensor):
            return super().forward(tensor) / 2

    model = linears()
    pruner = step(OneRow(), model, [{"tensor_fqn": "0.0.weight", "parametrization": Half}])
    masked = model(ROWS)
    pruner.prune()
    assert model[0][0].weight.shape == (4, 7)
    torch.testing.assert_close(model(ROWS), masked)
