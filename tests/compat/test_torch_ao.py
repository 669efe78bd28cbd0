"""The structured sparsifier: samples of torch.ao's pruner as they are written, and models that theirs refuses."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Optional

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from pruning_core.compat.torch_ao import BaseStructuredSparsifier, default_structured_pruning_patterns
from pruning_core.graph import ChannelGraph, GraphError, apply_structure, slim_, structure

SAMPLE = '''\
from pruning_core.compat.torch_ao import BaseStructuredSparsifier
from pruning_core.compat.torch_ao import _get_default_structured_pruning_patterns
#define model
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.seq = nn.Sequential(
            nn.Linear(700, 500, bias=True), # Alpha
            nn.ReLU(),
            nn.Linear(500, 800, bias=False), # Beta
            nn.ReLU(),
            nn.Linear(800, 600, bias=True), # Gamma
            nn.ReLU(),
        )
        self.linear = nn.Linear(600, 4, bias=False) # Delta

    def forward(self, x):
        x = self.seq(x)
        x = self.linear(x)
        return x

# define config, specify fqn of layers you want to prune and target sparsity level
pruning_config = [
    {"tensor_fqn": "seq.0.weight", "sparsity_level": 0.5},
    {"tensor_fqn": "seq.2.weight", "sparsity_level": 0.5},
    {"tensor_fqn": "seq.4.weight", "sparsity_level": 0.5},
    {"tensor_fqn": "linear.weight", "sparsity_level": 0.5},
]

# define pruner
class SaliencyPruner(BaseStructuredSparsifier):
     """
     Prune filters based on the saliency
     The saliency for a filter is given by the sum of the L1 norms of all of its weights
     """

     def update_mask(self, module, tensor_name, **kwargs):
        # tensor_name will give you the FQN, all other entries in sparse config is present in kwargs
         weights = getattr(module, tensor_name)
         mask = getattr(module.parametrizations, tensor_name)[0].mask

         # use negative weights so we can use topk (we prune out the smallest)
         saliency = -weights.norm(dim=tuple(range(1, weights.dim())), p=1)
         num_to_pick = int(len(mask) * kwargs["sparsity_level"])
         prune = saliency.topk(num_to_pick).indices

         # Set the mask to be false for the rows we want to prune
         mask.data[prune] = False

# define patterns
patterns = _get_default_structured_pruning_patterns()

original = Model()
# any configs passed in here are defaults that are propagated
pruner = SaliencyPruner({"prune_bias": True}, patterns=patterns)
pruner.prepare(original, sparse_config)
pruner.enable_mask_update = True
pruner.step()
pruned_model = pruner.prune()
'''
# The sample's last part is written for the config under another name.
SPARSE_CONFIG = [{"tensor_fqn": f"{name}.weight", "sparsity_level": 0.5} for name in ("seq.0", "seq.2", "seq.4")]
SPARSE_CONFIG.append({"tensor_fqn": "linear.weight", "sparsity_level": 0.5})

PATTERN_SAMPLE = """\
from torch.ao.pruning._experimental.pruner.prune_functions import prune_conv2d_activation_conv2d
from pruning_core.compat.torch_ao import _get_default_structured_pruning_patterns

def prune_conv2d_pool_activation_conv2d(
    c1: nn.Conv2d,
    pool: nn.Module,
    activation: Optional[Callable[[Tensor], Tensor]],
    c2: nn.Conv2d,
) -> None:
    prune_conv2d_activation_conv2d(c1, activation, c2)

# note how the pattern defined in the key will be passed to the pruning function as args
my_patterns = {(nn.Conv2d, nn.MaxPool2d, nn.ReLU, nn.Conv2d): prune_conv2d_activation_conv2d}

pruning_patterns = _get_default_structured_pruning_patterns()
pruning_patterns.update(my_patterns)

pruner = SaliencyPruner({}, patterns=pruning_patterns)
"""


class Saliency(BaseStructuredSparsifier):
    """Masks the smallest rows."""

    def update_mask(self, module, tensor_name, sparsity_level=0.5, **kwargs):
        mask = getattr(module.parametrizations, tensor_name)[0].mask
        scores = getattr(module, tensor_name).flatten(1).norm(dim=1)
        mask[scores.argsort()[: int(len(mask) * sparsity_level)]] = False


class Chosen(BaseStructuredSparsifier):
    """Masks the rows that the config names."""

    def update_mask(self, module, tensor_name, rows=(), **kwargs):
        getattr(module.parametrizations, tensor_name)[0].mask[list(rows)] = False


def prepared(model, layers, kind=Saliency, **defaults):
    """A pruner whose masks are set. ``layers``: names, or names with the rows to mask."""
    config = [{"tensor_fqn": f"{name}.weight"} for name in layers]
    if isinstance(layers, dict):
        kind, config = Chosen, [{"tensor_fqn": f"{name}.weight", "rows": rows} for name, rows in layers.items()]
    pruner = kind(defaults)
    pruner.prepare(model, config)
    pruner.enable_mask_update = True
    pruner.step()
    return pruner


def shapes(model):
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def assert_masked_is_pruned(model, pruner, x, **options):
    model.eval()
    masked = model(x)
    assert pruner.prune(**options) is model
    torch.testing.assert_close(model(x), masked)
    assert not any(parametrize.is_parametrized(module) for module in model.modules())


def conv_net():
    """Padding after a bias, a depthwise layer, flattened 4 x 4 maps."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(12 * 16, 10),
        nn.ReLU(),
        nn.Linear(10, 5),
    )


class Residual(nn.Module):
    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (x + self.body(x)).relu()
        return self.head(x.mean((2, 3)))


# ---- the samples ----------------------------------------------------------------------------------------------------


def test_the_sample_gives_the_table_that_it_shows():
    names = {"nn": nn, "sparse_config": SPARSE_CONFIG}
    exec(SAMPLE, names)
    pruned = names["pruned_model"]
    assert pruned is names["original"]
    assert shapes(pruned) == {
        "seq.0.weight": (250, 700),
        "seq.0.bias": (250,),
        "seq.2.weight": (400, 250),
        "seq.4.weight": (300, 400),
        "seq.4.bias": (300,),
        "linear.weight": (2, 300),
    }
    assert sum(parameter.numel() for parameter in pruned.parameters()) == 396150
    assert pruned(torch.randn(3, 700)).shape == (3, 2)


@pytest.mark.parametrize("home", ["torch.ao.pruning._experimental.pruner", "pruning_core.compat.torch_ao"])
def test_the_sample_with_a_pattern_of_its_own(home):
    names = {"nn": nn, "SaliencyPruner": Saliency, "Optional": Optional, "Callable": Callable, "Tensor": Tensor}
    exec(PATTERN_SAMPLE.replace("torch.ao.pruning._experimental.pruner", home), names)
    assert len(names["pruner"].patterns) == 1
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(), nn.Conv2d(8, 4, 3))
    pruner = names["pruner"]
    pruner.prepare(net, [{"tensor_fqn": "0.weight"}])
    pruner.enable_mask_update = True
    pruner.step()
    assert_masked_is_pruned(net, pruner, torch.randn(2, 3, 16, 16))
    assert shapes(net)["4.weight"] == (4, 4, 3, 3)


def test_the_default_patterns_are_a_dict_of_its_own_each_time():
    first = default_structured_pruning_patterns()
    first["mine"] = None
    assert default_structured_pruning_patterns() == {}
    with pytest.raises(ValueError, match=r"^patterns: functions of your own are not called, got 'print' for "):
        Saliency({}, patterns={(nn.Linear,): print})


# ---- what is removed ------------------------------------------------------------------------------------------------


def test_a_chain_of_convolutions_with_everything_between():
    net = conv_net()
    pruner = prepared(net, ["0", "5", "10"])
    assert_masked_is_pruned(net, pruner, torch.randn(2, 3, 16, 16))
    weights = {name: shape for name, shape in shapes(net).items() if name.endswith("weight")}
    assert weights == {
        "0.weight": (4, 3, 3, 3),
        "3.weight": (4, 1, 3, 3),
        "5.weight": (6, 4, 3, 3),
        "10.weight": (5, 6 * 16),
        "12.weight": (5, 5),
    }
    assert net[3].groups == 4 and net[10].in_features == 96


def test_without_a_config_all_linear_and_convolution_layers_are_pruned():
    net = nn.Sequential(nn.Conv1d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 62, 8), nn.ReLU(), nn.Linear(8, 4))
    pruner = Saliency()
    pruner.prepare(net)
    assert [group["tensor_fqn"] for group in pruner.groups] == ["0.weight", "3.weight", "5.weight"]
    pruner.enable_mask_update = True
    pruner.step()
    pruner.prune()
    assert [tuple(net[i].weight.shape) for i in (0, 3, 5)] == [(3, 3, 3), (4, 3 * 62), (2, 4)]


def test_without_the_last_layer_the_outputs_stay():
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    assert_masked_is_pruned(net, prepared(net, ["0"]), torch.randn(3, 6))
    assert shapes(net)["2.weight"] == (4, 4)


def test_the_last_rows_go_from_the_output():
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    pruner = prepared(net, {"0": [1, 2], "2": [0, 3]})
    x = torch.randn(2, 5, 6)
    masked = net(x)
    assert torch.equal(masked[..., [0, 3]], torch.zeros(2, 5, 2))
    pruner.prune()
    torch.testing.assert_close(net(x), masked[..., [1, 2]])


def test_after_a_batch_norm_the_next_layer_reads_zero():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    nn.init.uniform_(net[1].bias, 0.5, 1.0)
    pruner = prepared(net, {"0": [0, 5]})
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        hidden = net[:3](x)
        hidden[:, [0, 5]] = 0
        wanted = net[3](hidden)
    pruner.prune()
    torch.testing.assert_close(net(x), wanted)
    assert net[1].running_mean.shape == (6,)


def test_rows_of_a_norm_go_with_its_layer():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    nn.init.uniform_(net[1].bias, 0.5, 1.0)
    assert_masked_is_pruned(net, prepared(net, {"1": [0, 5]}), torch.randn(2, 3, 16, 16))
    assert net[0].out_channels == 6


def test_a_recurrent_layer():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(6, 8, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x)[0])

    net = Net()
    pruner = Chosen({"rows": [row + 8 * gate for gate in range(4) for row in (1, 3)]})
    pruner.prepare(net, [{"tensor_fqn": "lstm.weight_ih_l0"}])
    pruner.enable_mask_update = True
    pruner.step()
    pruner.prune()
    assert net.lstm.hidden_size == 6 and shapes(net)["head.weight"] == (3, 6)
    net(torch.randn(2, 5, 6)).sum().backward()


# ---- coupled rows ---------------------------------------------------------------------------------------------------


def test_a_residual_sum_loses_what_both_masks_say():
    net = Residual()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_masked_is_pruned(net, prepared(net, {"stem": [1, 6], "body": [1, 6]}), torch.randn(2, 3, 8, 8))
    assert shapes(net)["body.weight"] == (6, 6, 3, 3) and shapes(net)["head.weight"] == (4, 6)


def test_where_masks_disagree_rows_stay_as_zeros():
    net = Residual()
    pruner = prepared(net, {"stem": [1, 2, 6], "body": [1, 5]})
    message = r"got 3 masked rows that stay as zeros: stem.weight with kept rows of body.weight \(2\); body.weight with"
    with pytest.warns(UserWarning, match=message):
        assert_masked_is_pruned(net, pruner, torch.randn(2, 3, 8, 8))
    assert shapes(net)["body.weight"] == (7, 7, 3, 3)
    assert [not row.any() for row in net.stem.weight] == [i in (1, 5) for i in range(7)]  # rows 2 and 6 before
    assert [not row.any() for row in net.body.weight] == [i == 4 for i in range(7)]
    assert net.stem.bias[1] == 0 and net.body.bias[4] == 0


def test_a_layer_that_is_not_configured_has_no_vote():
    net = Residual(norm=True)
    prepared(net, ["stem"]).prune()
    assert shapes(net)["body.weight"] == (4, 4, 3, 3) and shapes(net)["norm.weight"] == (4,)


def test_rows_of_one_layer_may_be_coupled():
    """Each group of a grouped convolution loses the same."""
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1, groups=2))
    with pytest.warns(UserWarning, match=r"0.weight with kept rows of 0.weight \(1\)"):
        assert_masked_is_pruned(net, prepared(net, {"0": [1, 5, 2]}), torch.randn(2, 3, 4, 4))
    assert net[0].out_channels == 6 and net[2].groups == 2


def test_pieces_of_a_chunk_stay_of_one_size():
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(6, 8)
            self.left, self.right = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            left, right = self.up(x).relu().chunk(2, -1)
            return self.left(left) + self.right(right)

    net = Gated()
    with pytest.warns(UserWarning, match=r"up.weight with pieces that must stay of one size \(1\)"):
        assert_masked_is_pruned(net, prepared(net, {"up": [0, 1, 6]}), torch.randn(2, 6))
    assert (net.left.in_features, net.right.in_features) == (3, 3)


# ---- biases ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act", [nn.ReLU, nn.Sigmoid, nn.GELU, nn.Tanh])
def test_without_prune_bias_what_a_row_gives_goes_into_the_next_bias(act):
    net = nn.Sequential(nn.Linear(6, 8), act(), nn.Linear(8, 8, bias=False), act(), nn.Linear(8, 4))
    pruner = prepared(net, ["0", "2"], prune_bias=False)
    assert_masked_is_pruned(net, pruner, torch.randn(3, 6))
    assert shapes(net)["2.weight"] == (4, 4) and shapes(net)["2.bias"] == (4,)


def test_constants_go_through_norms_pools_and_flattening():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.Sigmoid(),
        nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        nn.ReLU(),
        nn.AvgPool2d(2, padding=1),
        nn.Flatten(),
        nn.Linear(8 * 16, 4),
    ).eval()
    for norm in (net[1].running_mean, net[1].bias):
        nn.init.uniform_(norm, 0.1, 1.0)
    nn.init.uniform_(net[3].bias, 0.1, 1.0)
    assert_masked_is_pruned(net, prepared(net, ["0", "3"], prune_bias=False), torch.randn(2, 3, 8, 8))
    assert shapes(net)["7.weight"] == (4, 4 * 16)


def test_each_layer_says_for_itself_whether_its_bias_goes():
    net = nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    pruner = Chosen({"rows": [1, 2]})
    pruner.prepare(net, [{"tensor_fqn": "0.weight", "prune_bias": False}, {"tensor_fqn": "2.weight"}])
    pruner.enable_mask_update = True
    pruner.step()
    assert net[0].bias[1] != 0 and net[2].bias[1] == 0
    assert_masked_is_pruned(net, pruner, torch.randn(3, 6))


class MeanOverChannels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.up(x)))


REFUSED = {
    "norm": (lambda: (MeanOverChannels(), ["up"]), r"down: with prune_bias=False .* got inputs that change"),
    "sum": (lambda: (Residual(), ["body"]), r"with prune_bias=False .* got inputs that change"),
    "groups": (
        lambda: (nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1, groups=2)), {"0": [0, 4]}),
        r"1.weight: with prune_bias=False .* got a consumer Conv2d; set prune_bias=True",
    ),
}


def test_rows_before_zero_padding_stay_and_others_go():
    """Beside padded zeros no constant can be folded: these rows stay as zeros, with their bias, and the others go."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3),
        nn.ReLU(),
        nn.Conv2d(4, 2, 1),
    )
    for layer in net[::2]:
        nn.init.uniform_(layer.bias, 0.1, 1.0)
    pruner = prepared(net, ["0", "2", "4"], prune_bias=False)
    x = torch.randn(2, 3, 12, 12)
    masked = net(x)
    message = (
        r"^prune: 4 masked rows stay as zeros, since prune_bias=False keeps their bias and a consumer pads zeros "
        r"beside it: 0.weight, which 2 pads \(4\); set prune_bias=True to remove them$"
    )
    with pytest.warns(UserWarning, match=message):
        pruner.prune(x)
    assert [layer.out_channels for layer in net[::2]] == [8, 3, 2, 2]
    torch.testing.assert_close(net(x), masked)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_constant_is_refused_and_all_stays(name):
    made, message = REFUSED[name]
    net, layers = made()
    pruner = prepared(net, layers, prune_bias=False)
    assert_refused(net, pruner, message)


def test_what_else_reads_a_constant_is_seen_in_the_outputs():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.up(x).sigmoid()
            return self.down(x) / x.norm(dim=-1, keepdim=True)

    net = Net()
    assert_refused(net, prepared(net, ["up"], prune_bias=False), r"prune: with prune_bias=False .* apart, so something")


# ---- refusals -------------------------------------------------------------------------------------------------------


def assert_refused(net, pruner, message, **options):
    """The error, and a model that is what it was, with its masks, and can go on."""
    before = {name: (value, value.clone()) for name, value in net.state_dict(keep_vars=True).items()}
    with pytest.raises(GraphError, match=message):
        pruner.prune(**options)
    after = net.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    for name, (tensor, value) in before.items():
        assert after[name] is tensor and torch.equal(tensor, value)
    assert structure(net) is None
    pruner.step()


class Frozen(nn.Module):
    """A residual sum with the input, and a softmax over the last rows."""

    def __init__(self) -> None:
        super().__init__()
        self.same, self.up, self.last, self.unused = (nn.Linear(*pair) for pair in [(6, 6), (6, 8), (8, 4), (2, 2)])

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.up(x + self.same(x)).relu()).sort(-1).values


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"same": [2, 3]}, r"same.weight: masked rows cannot be removed \(.*\), got 2 such rows, the first is 2; keep"),
        ({"last": [0]}, r"last.weight: masked rows cannot be removed \(a sort over channels"),
        ({"unused": [0]}, r"unused.weight: masked rows cannot be removed \(no operation uses it on these inputs"),
        ({"up": range(8)}, r"up.weight: its mask prunes every row, got 8 of 8; keep one at least"),
    ],
)
def test_rows_that_must_stay_are_refused_and_all_stays(layers, message):
    net = Frozen()
    assert_refused(net, prepared(net, layers | {"up": layers.get("up", [1, 2])}), message)


def test_after_a_refusal_the_same_masks_can_be_mended():
    net = Frozen()
    pruner = prepared(net, {"last": [0], "up": [1, 2]})
    assert_refused(net, pruner, "last.weight")
    net.last.parametrizations.weight[0].mask.fill_(True)
    pruner.enable_mask_update = False
    assert_masked_is_pruned(net, pruner, torch.randn(2, 6))
    assert shapes(net)["last.weight"] == (4, 6)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("0.weight", "config: must be a list of dicts, got '0.weight'; write"),
        (["0.weight"], "config: each entry is a dict with a tensor_fqn, got '0.weight'; name the tensor"),
        ([{"sparsity_level": 0.5}], "config: each entry is a dict with a tensor_fqn, got"),
        ([{"tensor_fqn": "0.wieght"}], "tensor_fqn: must name a parameter with rows, got '0.wieght'; did you mean"),
        ([{"tensor_fqn": "7.weight"}], "tensor_fqn: must name a parameter with rows, got '7.weight'"),
        ([{"tensor_fqn": "0.weight"}, {"tensor_fqn": ".0.weight"}], "0.weight: is configured twice, got 0.weight"),
        ([{"tensor_fqn": "0.weight", "prune_bias": 0.5}], "0.weight: prune_bias must be True or False, got 0.5; write"),
        ([{"tensor_fqn": "0.weight", "module_fqn": "2"}], "0.weight: its config contradicts its name, got module_fqn="),
        ([{"tensor_fqn": "3.weight"}], "3.weight: has a parametrization, got _Orthogonal"),
    ],
)
def test_a_wrong_config_is_refused(config, message):
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4), parametrizations.orthogonal(nn.Linear(4, 4)))
    pruner = Saliency()
    with pytest.raises(ValueError, match=message):
        pruner.prepare(net, config)
    assert not parametrize.is_parametrized(net[0]) and not net._forward_hooks
    pruner.prepare(net, [{"tensor_fqn": "0.weight"}])


def test_wrong_arguments_and_a_wrong_order_are_refused():
    with pytest.raises(ValueError, match=r"patterns: must be a dict, got \[\]; leave it out"):
        Saliency({}, patterns=[])
    with pytest.raises(ValueError, match=r"defaults: must be a dict, got 0.5; leave it out"):
        Saliency(0.5)
    with pytest.raises(TypeError, match="update_mask"):
        BaseStructuredSparsifier({})
    pruner, net = Saliency(), nn.Linear(4, 4)
    for name in ("prune", "squash_mask"):
        with pytest.raises(ValueError, match=f"{name}: there is no model with masks, got none; call prepare"):
            getattr(pruner, name)()
    pruner.prepare(net)
    with pytest.raises(ValueError, match=r"prepare: masks are on already, got 1 tensors with one; call prune\(\) or"):
        pruner.prepare(net)


def test_a_mask_must_be_one_of_rows():
    class Elements(BaseStructuredSparsifier):
        def update_mask(self, module, tensor_name, **kwargs):
            getattr(module.parametrizations, tensor_name)[0].mask = torch.ones(8, 6)

    pruner = Elements()
    pruner.prepare(nn.Sequential(nn.Linear(6, 8)))
    pruner.enable_mask_update = True
    message = r"0.weight: its mask must be boolean, .* got torch.float32 of shape \(8, 6\); write into"
    with pytest.raises(ValueError, match=message):
        pruner.step()


def test_prune_without_a_masked_row_says_so():
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    before = shapes(net)
    pruner = Saliency()
    pruner.prepare(net)
    pruner.enable_mask_update = False
    pruner.step()
    with pytest.warns(UserWarning, match="prune: nothing was removed, got masks without a pruned row; set enable"):
        pruner.prune()
    assert shapes(net) == before


# ---- example inputs -------------------------------------------------------------------------------------------------


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.up, self.down = nn.Embedding(9, 6), nn.Linear(6 + 2, 8), nn.Linear(8, 4)

    def forward(self, words: Tensor, *, more: Tensor) -> Tensor:
        assert words.max() > 5, "these words it cannot read"
        return self.down(self.up(torch.cat([self.words(words).mean(1), more], 1)).relu())


def test_inputs_are_made_like_those_of_a_run():
    net = TwoInputs()
    pruner = prepared(net, ["up"])
    net(torch.randint(6, 9, (5, 3)), more=torch.randn(5, 2))
    pruner.prune()
    assert shapes(net)["down.weight"] == (4, 4) and not net._forward_hooks


def test_a_model_that_takes_one_batch_size_is_traced_with_it():
    class Fixed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.view(7, 6))

    net = Fixed(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    pruner = prepared(net, ["0"])
    net(torch.randn(7, 6))
    pruner.prune()
    assert shapes(net)["2.weight"] == (4, 4)


def test_inputs_that_cannot_be_guessed_are_asked_for():
    net = TwoInputs()
    pruner = prepared(net, ["up"])
    assert_refused(net, pruner, r"example_inputs: could not be guessed for TwoInputs, got TypeError: .*; run the model")
    pruner.prune(example_inputs=((torch.tensor([[6, 7]]),), {"more": torch.randn(1, 2)}))
    assert shapes(net)["down.weight"] == (4, 4)


@pytest.mark.parametrize("size", [28, 64])
def test_the_size_of_an_image_is_found_by_trying(size):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * (size - 2) ** 2, 3))
    prepared(net, ["0"]).prune()
    assert net[3].in_features == 2 * (size - 2) ** 2


@pytest.mark.parametrize("first", [nn.Embedding(9, 6), nn.LSTM(6, 6)])
def test_words_and_sequences_are_guessed(first):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.up, self.down = first, nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.down(self.up(x[0] if isinstance(x, tuple) else x).relu())

    net = Net()
    prepared(net, ["up"]).prune()
    assert shapes(net)["down.weight"] == (4, 4)


def test_a_prepared_model_can_be_copied():
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    pruner = prepared(net, ["0"])
    other = copy.deepcopy(net)
    x = torch.randn(2, 6)
    assert torch.equal(other(x), net(x))
    pruner.prune()
    assert shapes(other)["0.parametrizations.weight.original"] == (8, 6)


# ---- the masked model -----------------------------------------------------------------------------------------------


def test_masked_rows_read_as_zero_and_get_no_gradient():
    net = nn.Sequential(nn.Linear(6, 4))
    parameters = list(net.parameters())
    with torch.no_grad():
        net[0].weight[1] = float("nan")
    prepared(net, {"0": [1, 3]})
    assert torch.equal(net[0].weight[[1, 3]], torch.zeros(2, 6)) and torch.equal(net[0].bias[[1, 3]], torch.zeros(2))
    net(torch.randn(5, 6)).square().sum().backward()
    for parameter in parameters:
        gone = torch.tensor([not row.any() for row in parameter.grad])
        assert gone.tolist() == [False, True, False, True]


def test_parameters_and_their_order_outlive_the_masks_and_training_goes_on():
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    names, parameters = list(shapes(net)), list(net.parameters())
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    pruner = prepared(net, ["0"])
    x = torch.randn(5, 6)
    for _ in range(2):
        net(x).square().sum().backward()
        optimizer.step()
    pruner.prune(optimizer=optimizer)
    assert list(shapes(net)) == names
    assert all(now is before for now, before in zip(net.parameters(), parameters, strict=True))
    assert optimizer.state[net[0].weight]["exp_avg"].shape == (4, 6)
    before = net[0].weight.clone()
    optimizer.zero_grad()
    net(x).square().sum().backward()
    optimizer.step()
    assert (net[0].weight != before).all()


def test_one_pruner_prunes_again_and_a_fresh_model_becomes_as_slim():
    def made():
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))

    net, pruner = made(), Saliency({"sparsity_level": 0.25})
    for width in (6, 5):
        pruner.prepare(net, [{"tensor_fqn": "0.weight"}, {"tensor_fqn": "2.weight"}])
        pruner.enable_mask_update = True
        pruner.step()
        assert pruner.prune()[0].out_features == width
    fresh = made()
    apply_structure(fresh, structure(net))
    fresh.load_state_dict(net.state_dict())
    x = torch.randn(3, 6)
    assert torch.equal(fresh(x), net(x))


def test_squash_mask_leaves_zeros_and_what_it_is_asked_to_keep():
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    pruner = prepared(net, ["0", "2"], sparsity_level=0.5, note="x")
    x = torch.randn(3, 6)
    masked, before = net(x), net[0].parametrizations.weight.original
    with pytest.raises(ValueError, match=r"0.weight: no such entry to keep, got 'level'; name one of its config"):
        pruner.squash_mask(("level",))
    pruner.squash_mask(("sparsity_level",), {"2": ("note",)})
    assert torch.equal(net(x), masked) and net[0].weight is before
    assert int((net[0].weight == 0).all(1).sum()) == 4 and int((net[0].bias == 0).sum()) == 4
    assert net[0].sparse_params == {"sparsity_level": 0.5}
    assert net[2].sparse_params == {"sparsity_level": 0.5, "note": "x"}


def test_the_state_of_a_pruner_is_saved_and_loaded():
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    other = copy.deepcopy(net)
    pruner = prepared(net, ["0"], sparsity_level=0.25)
    state = copy.deepcopy(pruner.state_dict())
    assert state["groups"] == [{"tensor_fqn": "0.weight", "sparsity_level": 0.25}]
    again = Saliency()
    again.prepare(other, [{"tensor_fqn": "0.weight"}])
    again.load_state_dict(state)
    assert torch.equal(again.state["0.weight"]["mask"], pruner.state["0.weight"]["mask"])
    assert torch.equal(other[0].bias, net[0].bias) and again.groups[0]["sparsity_level"] == 0.25
    with pytest.raises(ValueError, match=r"state_dict: must be one of a pruner, got OrderedDict without its entries"):
        again.load_state_dict(net.state_dict())
    third = Saliency({"prune_bias": False})
    third.prepare(nn.Sequential(nn.Linear(6, 8)))
    with pytest.raises(ValueError, match=r"0.weight: the state is of another prune_bias, got True; prepare so"):
        third.load_state_dict(state)
    state["state"]["2.weight"] = {"mask": torch.ones(4, dtype=torch.bool)}
    with pytest.raises(ValueError, match=r"state_dict: is of other tensors, got \['2.weight'\] on one side only; prep"):
        again.load_state_dict(state)
    again.load_state_dict(state, strict=False)
    state["state"]["0.weight"]["mask"] = torch.ones(3, dtype=torch.bool)
    with pytest.raises(
        ValueError, match=r"0.weight: the state is of another model, got a mask \(3,\) for \(8,\); load"
    ):
        again.load_state_dict(state, strict=False)


# ---- outputs that may shrink ----------------------------------------------------------------------------------------


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.last, self.codes = nn.Linear(6, 8), nn.Linear(8, 4, bias=False), nn.Parameter(torch.randn(3, 2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.up(x).relu()
        return {"hidden": x.view(len(x), 2, -1), "last": self.last(x), "codes": self.codes}


def test_outputs_shrink_only_where_a_trace_lets_them():
    x = torch.randn(3, 6)
    assert not ChannelGraph.trace(TwoOutputs(), x).groups
    net = TwoOutputs()
    graph = ChannelGraph.trace(net, x, outputs_may_shrink=True)
    assert {name: len(group) for name, group in graph.groups.items()} == {"up.weight:0": 4, "last.weight:0": 4}
    reason = [why for axis, _, why in graph.frozen() if axis.tensor == "codes"]
    assert len(reason) == 2 and all("is an output" in why for why in reason)


def test_the_sparsifier_prunes_a_model_with_several_outputs():
    net = TwoOutputs()
    pruner = prepared(net, {"up": [1, 5], "last": [3]}, prune_bias=False)
    nn.init.uniform_(net.up.bias, 0.1, 1.0)
    x = torch.randn(3, 6)
    masked = net(x)
    pruner.prune()
    torch.testing.assert_close(net(x)["last"], masked["last"][:, :3])
    torch.testing.assert_close(net(x)["hidden"], masked["hidden"][..., [0, 2, 3]])


def test_the_kept_part_of_shrunken_outputs_is_compared():
    x = torch.randn(3, 6)
    net = TwoOutputs()
    graph = ChannelGraph.trace(net, x, outputs_may_shrink=True)
    plan = graph.plan({"up.weight:0": [0], "last.weight:0": [1, 2]})
    before = net(x)
    with pytest.raises(GraphError, match=r"an output changed its shape from .* put back as it was"):
        slim_(net, replace(plan, outputs_may_shrink=False))
    assert slim_(net, plan).difference < 1e-6
    after = net(x)
    torch.testing.assert_close(after["hidden"], before["hidden"][..., 1:])
    torch.testing.assert_close(after["codes"], before["codes"])
    assert after["last"].shape == (3, 2)
