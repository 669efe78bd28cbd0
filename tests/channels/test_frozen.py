"""Channels of frozen weights stay, unless they are named; what no gradient reaches is not the first to go."""

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.functional import cross_entropy

import pruning_core as pc
from pruning_core.criteria import CRITERIA
from tests.channels.test_planner import DATA, IMAGES, net

NEEDS_GRADIENT = [name for name in CRITERIA if CRITERIA[name].needs_gradient and not CRITERIA[name].needs]


def widths(model):
    return model[0].out_channels, model[3].out_channels


@pytest.mark.parametrize("criterion", list(CRITERIA))
def test_channels_of_a_frozen_layer_stay(criterion):
    model = net()
    model[0].requires_grad_(False)
    done = pc.slim(model, {"channels": 0.8}, IMAGES[:1], criterion=criterion, **DATA)
    first, second = widths(model)
    assert first == 32 and second < 64
    rows = {row.name: row for row in done.report.layers}
    assert (rows["0.weight"].stays, rows["0.weight"].why) == (32, "0.weight requires no gradient")
    assert "32: 0.weight requires no gradient" in str(done)


def test_a_frozen_consumer_keeps_what_it_reads():
    model = net()
    model[8].requires_grad_(False)
    pc.slim(model, {"channels": 0.8}, IMAGES[:1])
    assert widths(model)[1] == 64 and widths(model)[0] < 32


def test_frozen_norms_do_not_matter():
    model = net()
    model[1].requires_grad_(False)
    pc.slim(model, {"channels": 0.5}, IMAGES[:1])
    assert widths(model)[0] < 32


@pytest.mark.parametrize("criterion", NEEDS_GRADIENT)
def test_naming_it_is_an_error_where_gradients_are_needed(criterion):
    model = net()
    model[0].requires_grad_(False)
    message = rf"^op_names: 0 requires no gradient, and {criterion} needs one; take it out, or choose l2$"
    with pytest.raises(ValueError, match=message):
        pc.slim(model, {"channels": 0.8}, IMAGES[:1], criterion=criterion, op_names=["^0$", "^3$"], **DATA)


def test_it_can_be_named_without_gradients():
    model = net()
    model[0].requires_grad_(False)
    pc.slim(model, {"channels": 0.8}, IMAGES[:1], op_names=["^0$"], limits=1.0)
    assert widths(model)[0] < 32


def test_a_model_that_is_frozen_as_a_whole():
    message = (
        r"^budget: cannot be met, got channels 0\.8; from 1\.000 to 1 can be reached with these limits, and 2 groups "
        r"stay because 0\.weight, 3\.weight, 8\.weight require no gradient; call requires_grad_\(True\), or name their "
        r"layers in op_names$"
    )
    with pytest.raises(ValueError, match=message):
        pc.slim(net().requires_grad_(False), {"channels": 0.8}, IMAGES[:1])


def test_in_the_loop():
    """All 100 channels would come from the frozen layer, whose gradients are all zero."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18()
    model.layer1.requires_grad_(False)
    before = [tuple(each.shape) for each in model.layer1.parameters()]
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    batch = torch.randn(2, 3, 64, 64), torch.tensor([0, 1])
    pc.Pruner(model).rebuild_model(batch, lambda model, batch: cross_entropy(model(batch[0]), batch[1]), optimizer, 100)
    assert [tuple(each.shape) for each in model.layer1.parameters()] == before
    assert model.layer4[0].conv1.out_channels < 512


class Branches(nn.Module):
    """The loss below takes the first branch alone."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3))
        self.second = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3))

    def forward(self, x):
        return self.first(x), self.second(x)


@pytest.mark.parametrize("criterion", NEEDS_GRADIENT)
def test_a_branch_without_gradients_is_not_the_first_to_go(criterion):
    torch.manual_seed(0)
    model = Branches()
    data = {"batches": [IMAGES], "to_loss": lambda model, batch: model(batch)[0].square().mean()}
    message = r"^criterion: no gradient came for second\.0\.weight, second\.2\.weight; their channels stay$"
    with pytest.warns(UserWarning, match=message):
        pc.slim(model, {"channels": 0.75}, IMAGES[:1], criterion=criterion, **data)
    assert (model.first[0].out_channels, model.second[0].out_channels) == (8, 16)
