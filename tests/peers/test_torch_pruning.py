"""What Torch-Pruning's tests demand (1.6.1, ``tests/``), anew: its own nets, one torchvision net of each kind that it
prunes, and those that its script lists as failing. ``python -m benchmarks.zoo`` cuts all of torchvision's."""

import copy
import itertools

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.functional import relu

import pruning_core as pc
from pruning_core import ChannelGraph, slim_

WIDTH = 12


def conv(*sizes):
    """Convolutions of one pixel with batch norms, GELU between them."""
    layers = []
    for into, out in itertools.pairwise(sizes):
        layers += [nn.Conv2d(into, out, 1), nn.BatchNorm2d(out), nn.GELU()]
    return nn.Sequential(*layers[:-1])


class Net(nn.Module):
    """Layers by name and a function of them."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def wide_and_deep(m, x):
    return m.last(torch.concat([m.wide(x), m.deep(x)], dim=-1)).sigmoid()


def cascaded(m, x):
    first = torch.cat([m.one(x), m.two(x)], 1)
    return m.out(torch.cat([torch.cat([first, m.three(x)], 1), m.four(x)], 1))


def concat_split(m, x):
    """A split whose sizes are computed from layers, a part of it beside another branch, and a sum with the rest."""
    beside, x = m.beside(x), m.first(x)
    taken = m.second[0].in_channels - m.beside[-1].num_features
    left, right = torch.split(x, (taken, m.first[-1].num_features - taken), 1)
    return m.out(m.second(torch.cat([left, beside], 1)) + right)


def split_and_shared(m, x):
    """Two pieces go through one block, the third through another."""
    x, one, other = m.first(x), m.twice[0].in_channels, m.once[0].in_channels
    a, b, c = torch.split(x, [one, one, other], 1)
    return m.twice(a), m.twice(b), m.once(c)


def along_rows(m, x):
    """Joined and split along another dimension than that of the channels."""
    a, b = m.one(x), m.two(x)
    x = m.after(torch.cat([a, b], dim=2))
    return m.out(torch.split(x, [a.shape[2], b.shape[2]], dim=2)[0])


def reshaped(m, x):
    x = relu(m.first(x)).view(-1, m.up.in_channels, 4, 4)
    return m.out(torch.flatten(relu(m.again(relu(m.up(x)))), 1))


def two_inputs(m, a, b):
    a, b = relu(m.one(a)), relu(m.two(b))
    return a, b, relu(m.both(torch.cat([a, b], 1)))


class ScaleOfNorm(nn.Module):
    """Their custom layer, for which they ask for a pruning function of its own."""

    def __init__(self, width):
        super().__init__()
        self.in_dim, self.scale, self.bias = width, nn.Parameter(torch.rand(width)), nn.Parameter(torch.rand(width))
        self.fc = nn.Linear(width, width)

    def forward(self, x):
        x = torch.div(x, x.pow(2).sum(dim=1, keepdim=True).sqrt())
        return self.fc(x * self.scale + self.bias)


def custom(**more):
    net = Net(lambda m, x: m.out(m.custom(relu(m.first(x)))), first=nn.Linear(20, 32), custom=ScaleOfNorm(32),
              out=nn.Linear(32, 10))  # fmt: skip
    for name, parameter in more.items():
        net.register_parameter(name, parameter)
    return net


def lenet(m, x):
    x = torch.max_pool2d(relu(m.one(x)), 2)
    return m.out(relu(m.fc(torch.max_pool2d(relu(m.two(x)), 2).view(len(x), -1))))


def rows(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


PIXELS = (2, WIDTH, 7, 7)
NETS = {
    "wide and deep": (
        lambda: Net(wide_and_deep, wide=nn.Linear(32, 3), last=nn.Linear(4, 1), deep=nn.Sequential(
            nn.Linear(32, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.2), nn.Linear(24, 16), nn.BatchNorm1d(16),
            nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 1))),
        (rows(2, 32),), 0.5,
    ),
    "cascaded concat": (
        lambda: Net(cascaded, one=conv(WIDTH, WIDTH, WIDTH), two=conv(WIDTH, 2 * WIDTH, 2 * WIDTH),
                    three=conv(WIDTH, 3 * WIDTH), four=conv(WIDTH, 6 * WIDTH), out=nn.Conv2d(12 * WIDTH, 10, 1)),
        (rows(*PIXELS),), 0.5,
    ),
    "concat and split": (
        lambda: Net(concat_split, first=conv(WIDTH, WIDTH, 2 * WIDTH), beside=conv(WIDTH, WIDTH, WIDTH),
                    second=conv(2 * WIDTH, WIDTH), out=nn.Conv2d(WIDTH, 3, 1)),
        (rows(*PIXELS),), 0.5,
    ),
    "split into a shared block": (
        lambda: Net(split_and_shared, first=conv(WIDTH, WIDTH, 4 * WIDTH), twice=conv(WIDTH, WIDTH, 3),
                    once=conv(2 * WIDTH, WIDTH, 3)),
        (rows(*PIXELS),), 0.5,
    ),
    "joined along rows": (
        lambda: Net(along_rows, one=conv(WIDTH, WIDTH, WIDTH), two=conv(WIDTH, WIDTH, WIDTH),
                    after=nn.Conv2d(WIDTH, WIDTH, 1), out=nn.Conv2d(WIDTH, 3, 1)),
        (rows(*PIXELS),), 0.5,
    ),
    "reshape into images": (
        lambda: Net(reshaped, first=nn.Linear(20, 32 * 16), up=nn.ConvTranspose2d(32, 16, 4, 2, 1),
                    again=nn.ConvTranspose2d(16, 8, 4, 2, 1), out=nn.Linear(8 * 256, 10)),
        (rows(2, 20),), 0.5,
    ),
    "two inputs, three outputs": (
        lambda: Net(two_inputs, one=nn.Linear(24, 16), two=nn.Linear(12, 16), both=nn.Linear(32, 20)),
        (rows(2, 24), rows(2, 12)), None,
    ),
    "a layer of one's own": (custom, (rows(2, 20),), 0.5),
    "unused parameters": (lambda: custom(unused=nn.Parameter(torch.rand(10))), (rows(2, 20),), 0.5),
    "one output channel": (
        lambda: nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 2, 2),
                              nn.BatchNorm2d(24), nn.ReLU(), nn.Conv2d(24, 1, 3, 1, 1), nn.BatchNorm2d(1)),
        (rows(2, 3, 16, 16),), 0.5,
    ),
    "lenet": (
        lambda: Net(lenet, one=nn.Conv2d(1, 6, 5), two=nn.Conv2d(6, 16, 5), fc=nn.Linear(256, 84),
                    out=nn.Linear(84, 10)),
        (rows(2, 1, 28, 28),), 0.5,
    ),
}  # fmt: skip


def built(make):
    torch.manual_seed(0)
    model = make().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


@pytest.mark.parametrize("name", NETS)
def test_their_own_nets_are_cut_and_train_on(name):
    make, inputs, left = NETS[name]
    model = built(make)
    graph = ChannelGraph.trace(model, inputs)
    if left is None:
        assert not graph.groups  # both branches are outputs as they are
        return
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(2):  # iteratively, as they do
        done = pc.slim(model, {"channels": 0.7}, inputs, scope="local", optimizer=optimizer)
        assert done.cut.difference < 1e-5 and done.cut.params_after < done.cut.params_before
        model.train()
        given = model(*inputs)
        sum(each.sum() for each in (given if isinstance(given, tuple) else (given,))).backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()


def test_chosen_channels_of_a_layer_go_with_all_that_depends_on_them():
    """Their ``get_pruning_group(...).prune()``; what their pruning function cuts without need, the output, stays."""
    model = custom()
    graph = ChannelGraph.trace(model, rows(2, 20))
    slim_(model, graph.plan({"first.weight:0": [0, 1, 6]}))
    assert model.first.out_features == model.custom.fc.in_features == 29
    assert model.custom.scale.shape == model.custom.bias.shape == (29,)
    assert model.custom.fc.out_features == model.out.in_features == 32


def test_a_part_of_the_outputs_may_go_where_one_asks_for_it():
    model = NETS["two inputs, three outputs"][0]()
    graph = ChannelGraph.trace(model, (rows(2, 24), rows(2, 12)), outputs_may_shrink=True)
    slim_(model, graph.plan({"one.weight:0": [0, 2, 4]}))
    assert [each.shape[1] for each in model(rows(2, 24), rows(2, 12))] == [13, 16, 20]


def test_what_is_left_is_a_multiple_where_one_asks_for_it():
    model = torchvision.models.resnet18()
    pc.slim(model, {"channels": 0.6}, torch.randn(1, 3, 32, 32), round_to=8)
    assert all(each.out_channels % 8 == 0 for each in model.modules() if isinstance(each, nn.Conv2d))


KINDS = {
    "alexnet": 64, "densenet121": 32, "efficientnet_b0": 32, "efficientnet_v2_s": 32, "googlenet": 64,
    "inception_v3": 96, "mnasnet0_5": 32, "mobilenet_v2": 32, "mobilenet_v3_small": 32, "convnext_tiny": 32,
    "regnet_x_400mf": 32, "regnet_y_400mf": 32, "resnet18": 32, "resnext50_32x4d": 32, "squeezenet1_1": 64,
    "vgg11_bn": 32, "vit_b_32": 64, "shufflenet_v2_x0_5": 32, "swin_t": 64,
}  # fmt: skip


def torchvision_net(name):
    size = KINDS[name]
    more = {"image_size": size} if name.startswith("vit") else {}
    more |= {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(name, weights=None, num_classes=10, **more)
    return model, torch.randn(1, 3, size, size)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_each_kind_of_torchvision_loses_half_of_its_multiply_adds(name):
    """No layer to ignore, no attribute to set, no parameter to declare: what their script does for each of these."""
    torch.manual_seed(0)
    model, image = torchvision_net(name)
    dense = copy.deepcopy(model)
    done = pc.slim(model.eval(), {"macs": 0.5}, image)
    assert done.report.macs[1] <= 0.5 * done.report.macs[0]
    assert done.cut.difference < 1e-3 and model(image).shape == dense.eval()(image).shape
