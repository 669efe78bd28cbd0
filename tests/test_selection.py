"""Which weights take part, and how each is read: groups, output channels, kernel positions, input channels."""

import copy
import itertools
import re
import subprocess
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from transformers.pytorch_utils import Conv1D

from pruning_core import Pruning
from pruning_core.criteria import fold_lines
from pruning_core.patterns import parse_pattern
from pruning_core.selection import Layout, Target, family, is_transformers_conv1d, targets_of, unwrap
from tests.support import ROOT


class Case(NamedTuple):
    """A layer, an input that covers its kernel exactly once, and the stored index of (g, o, position, i)."""

    make: Callable[[], nn.Module]
    x: tuple[int, ...]
    axis: int
    shape: tuple[int, int, int, int]
    index: Callable[[int, int, tuple[int, ...], int], tuple[int, ...]]


def conv(make, x, shape):
    return Case(make, x, 1, shape, lambda g, o, k, i: (g * shape[1] + o, i, *k))


def transposed(make, x, shape):
    return Case(make, x, 1, shape, lambda g, o, k, i: (g * shape[3] + i, o, *k))


CASES = {
    "Linear": Case(lambda: nn.Linear(6, 4), (3, 6), -1, (1, 4, 1, 6), lambda g, o, k, i: (o, i)),
    "Conv1D": Case(lambda: Conv1D(4, 6), (3, 6), -1, (1, 4, 1, 6), lambda g, o, k, i: (i, o)),
    "Conv1d": conv(lambda: nn.Conv1d(3, 4, 5), (2, 3, 5), (1, 4, 5, 3)),
    "Conv2d": conv(lambda: nn.Conv2d(3, 4, (2, 3)), (2, 3, 2, 3), (1, 4, 6, 3)),
    "Conv3d": conv(lambda: nn.Conv3d(3, 2, (2, 1, 3)), (2, 3, 2, 1, 3), (1, 2, 6, 3)),
    "Conv1d grouped": conv(lambda: nn.Conv1d(6, 4, 3, groups=2), (2, 6, 3), (2, 2, 3, 3)),
    "Conv2d grouped": conv(lambda: nn.Conv2d(6, 9, 2, groups=3), (2, 6, 2, 2), (3, 3, 4, 2)),
    "Conv3d grouped": conv(lambda: nn.Conv3d(4, 4, 2, groups=2), (2, 4, 2, 2, 2), (2, 2, 8, 2)),
    "Conv2d depthwise": conv(lambda: nn.Conv2d(5, 5, 3, groups=5), (2, 5, 3, 3), (5, 1, 9, 1)),
    "Conv2d depthwise x2": conv(lambda: nn.Conv2d(3, 6, 2, groups=3), (2, 3, 2, 2), (3, 2, 4, 1)),
    "Conv2d channels last": conv(
        lambda: nn.Conv2d(3, 4, (2, 3)).to(memory_format=torch.channels_last), (2, 3, 2, 3), (1, 4, 6, 3)
    ),
    "ConvTranspose1d": transposed(lambda: nn.ConvTranspose1d(3, 4, 5), (2, 3, 1), (1, 4, 5, 3)),
    "ConvTranspose2d": transposed(lambda: nn.ConvTranspose2d(3, 4, (2, 3)), (2, 3, 1, 1), (1, 4, 6, 3)),
    "ConvTranspose3d": transposed(lambda: nn.ConvTranspose3d(3, 2, (2, 1, 3)), (2, 3, 1, 1, 1), (1, 2, 6, 3)),
    "ConvTranspose1d grouped": transposed(lambda: nn.ConvTranspose1d(6, 4, 3, groups=2), (2, 6, 1), (2, 2, 3, 3)),
    "ConvTranspose2d grouped": transposed(lambda: nn.ConvTranspose2d(6, 9, 2, groups=3), (2, 6, 1, 1), (3, 3, 4, 2)),
    "ConvTranspose2d depthwise": transposed(lambda: nn.ConvTranspose2d(4, 4, 2, groups=4), (2, 4, 1, 1), (4, 1, 4, 1)),
}


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


def only_target(module: nn.Module) -> Target:
    (target,) = targets_of("layer", module)
    assert target.name == "layer.weight"
    assert target.parameter is module.weight
    return target


def channel(x: Tensor, axis: int, c: int) -> Tensor:
    return x.select(axis, c)


def disturbed(x: Tensor, axis: int, c: int) -> Tensor:
    x = x.clone()
    channel(x, axis, c).add_(1 + torch.rand_like(channel(x, axis, c)))
    return x


# ---- layouts ------------------------------------------------------------------------------------------------------


def test_the_view_by_explicit_indices(case):
    module = case.make()
    target = only_target(module)
    weight = module.weight.detach()
    view = target.layout.view(weight)
    assert target.layout.shape(weight.shape) == tuple(view.shape) == case.shape
    groups, outs, positions, ins = case.shape
    kernel = list(itertools.product(*(range(length) for length in weight.shape[2:])))
    assert len(kernel) == positions
    for g, o, (p, k), i in itertools.product(range(groups), range(outs), enumerate(kernel), range(ins)):
        assert view[g, o, p, i] == weight[case.index(g, o, k, i)]


def test_store_is_the_inverse_of_view(case):
    weight = case.make().weight.detach()
    layout = only_target(case.make()).layout
    view = layout.view(weight)
    assert torch.equal(layout.store(view, weight.shape), weight)
    assert torch.equal(layout.store(view.contiguous(), tuple(weight.shape)), weight)
    x = torch.randn(case.shape)
    assert torch.equal(layout.view(layout.store(x, weight.shape)), x)


def test_ties_go_in_the_order_in_which_the_weight_is_stored(case):
    weight = case.make().weight.detach()
    layout = only_target(case.make()).layout
    in_order = layout.stored_order(layout.view(weight))
    rows = in_order.flatten(0, 1) if weight.dim() > 2 else in_order.flatten(0, 1).squeeze(-1)
    assert torch.equal(rows.reshape(weight.shape), weight)
    x = torch.randn(case.shape)
    assert torch.equal(layout.from_stored_order(layout.stored_order(x)), x)


def test_the_view_writes_through(case):
    module = case.make()
    weight = module.weight.detach()
    view = only_target(module).layout.view(weight)
    assert view.data_ptr() == module.weight.data_ptr()
    view.zero_()
    assert not module.weight.any()


@torch.no_grad()
def test_the_output_does_not_depend_on_a_zeroed_input_channel(case):
    groups, _, _, ins = case.shape
    x = torch.randn(case.x)
    for g, i in itertools.product(range(groups), range(ins)):
        module = case.make()
        c = g * ins + i
        other = (c + 1) % (groups * ins)
        assert not torch.equal(module(disturbed(x, case.axis, c)), module(x))
        only_target(module).layout.view(module.weight)[g, :, :, i] = 0
        assert torch.equal(module(disturbed(x, case.axis, c)), module(x))
        assert not torch.equal(module(disturbed(x, case.axis, other)), module(x))


@torch.no_grad()
def test_a_zeroed_output_channel_is_its_bias(case):
    groups, outs, _, _ = case.shape
    x = torch.randn(case.x)
    for g, o in itertools.product(range(groups), range(outs)):
        module = case.make()
        module.bias.normal_()
        before = module(x)
        only_target(module).layout.view(module.weight)[g, o] = 0
        after = module(x)
        for c in range(groups * outs):
            if c == g * outs + o:
                assert torch.equal(channel(after, case.axis, c), module.bias[c].expand_as(channel(after, case.axis, c)))
                assert not torch.equal(channel(after, case.axis, c), channel(before, case.axis, c))
            else:
                assert torch.allclose(channel(after, case.axis, c), channel(before, case.axis, c), atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in CASES if name not in ("Linear", "Conv1D")])
def test_kernel_positions_are_where_the_kernel_has_them(name):
    """A convolution over one kernel's worth of input reads input position p with kernel position p; a transposed one
    writes it to output position p."""
    case = CASES[name]
    x = torch.randn(case.x)
    for p in range(case.shape[2]):
        module = case.make()
        only_target(module).layout.view(module.weight)[:, :, p] = 0
        if "Transpose" in name:
            y = module(x).flatten(2)
            at_bias = (y == module.bias.view(1, -1, 1)).flatten(0, 1).all(0)
            assert at_bias.tolist() == [q == p for q in range(case.shape[2])]
        else:
            for q in range(case.shape[2]):
                changed = x.clone()
                changed.flatten(2)[:, :, q] += 1
                assert torch.equal(module(changed), module(x)) is (p == q)


def attention(**options) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(8, 2, batch_first=True, **options).eval()


def test_attention_is_read_as_three_projections():
    module = attention()
    (target,) = targets_of("attn", module)
    assert (target.name, target.layout) == ("attn.in_proj_weight", Layout(groups=3))
    view = target.layout.view(module.in_proj_weight.detach())
    assert tuple(view.shape) == target.layout.shape(module.in_proj_weight.shape) == (3, 8, 1, 8)
    for g, o, i in itertools.product(range(3), range(8), range(8)):
        assert view[g, o, 0, i] == module.in_proj_weight[g * 8 + o, i]
    assert torch.equal(target.layout.store(view, (24, 8)), module.in_proj_weight)


def test_attention_with_own_sizes_has_three_weights():
    module = attention(kdim=5, vdim=6)
    targets = targets_of("attn", module)
    assert [(t.name, t.layout.shape(t.parameter.shape)) for t in targets] == [
        ("attn.q_proj_weight", (1, 8, 1, 8)),
        ("attn.k_proj_weight", (1, 8, 1, 5)),
        ("attn.v_proj_weight", (1, 8, 1, 6)),
    ]
    for t in targets:
        assert t.parameter is getattr(module, t.attribute)
        assert torch.equal(t.layout.store(t.layout.view(t.parameter), t.parameter.shape), t.parameter)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"kdim": 5, "vdim": 6}], ids=["one weight", "own sizes"])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
def test_attention_does_not_depend_on_a_zeroed_input_channel(options, which):
    sizes = (8, options.get("kdim", 8), options.get("vdim", 8))
    x = [torch.randn(2, 4, size) for size in sizes]
    for i in range(sizes[which]):
        module = attention(**options)
        targets = targets_of("attn", module)
        changed = [disturbed(each, -1, i) if j == which else each for j, each in enumerate(x)]
        assert not torch.allclose(module(*changed)[0], module(*x)[0], atol=1e-4)
        target, g = (targets[0], which) if len(targets) == 1 else (targets[which], 0)
        target.layout.view(target.parameter)[g, :, :, i] = 0
        assert torch.allclose(module(*changed)[0], module(*x)[0], atol=1e-6)


# ---- families -----------------------------------------------------------------------------------------------------


class MyLinear(nn.Linear):
    pass


class MyConv1D(Conv1D):
    pass


@pytest.mark.parametrize(
    "module, kind",
    [
        *((case.make(), "Linear" if name in ("Linear", "Conv1D") else "Conv") for name, case in CASES.items()),
        (MyLinear(2, 2), "Linear"),
        (MyConv1D(2, 2), "Linear"),
        (attention(), "Linear"),
        (attention().out_proj, "Linear"),
        (nn.LazyLinear(3), "Linear"),
        (nn.LazyConv2d(3, 1), "Conv"),
        (nn.Embedding(3, 3), None),
        (nn.Bilinear(2, 2, 2), None),
        (nn.LSTM(2, 2), None),
        (nn.LayerNorm(3), None),
        (nn.BatchNorm2d(3), None),
        (nn.Sequential(nn.Linear(2, 2)), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else value,
)
def test_family(module, kind):
    assert family(module) == kind


def test_another_class_named_conv1d_is_none_of_ours():
    impostor = type("Conv1D", (nn.Module,), {})()
    assert not is_transformers_conv1d(impostor)
    assert is_transformers_conv1d(MyConv1D(2, 2))


# ---- selecting ----------------------------------------------------------------------------------------------------


def named(**layers: nn.Module) -> nn.Module:
    return nn.Sequential(OrderedDict(layers))


def linears(*names: str) -> nn.Module:
    return named(**{name: nn.Linear(4, 4) for name in names})


def began(model: nn.Module, *configs: dict) -> Pruning:
    pruner = Pruning([{"pattern": "1x1", **config} for config in configs or ({},)])
    pruner.model = model
    pruner.on_train_begin()
    return pruner


def selected(model: nn.Module, **options) -> list[str]:
    return list(began(model, options).masks())


def spared(pruner: Pruning) -> dict[str, str]:
    return {each.layer: each.reason for group in pruner._groups for each in group.skipped}


def problem(model: nn.Module, *configs: dict) -> str:
    with pytest.raises(ValueError) as caught:
        began(model, *configs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def bert() -> nn.Module:
    layer = nn.ModuleDict({"query": nn.Linear(4, 4), "dense": nn.Linear(4, 4)})
    encoder = nn.ModuleDict({"embeddings": nn.Embedding(5, 4), "layer": nn.ModuleList([layer, copy.deepcopy(layer)])})
    pooler = nn.ModuleDict({"dense": nn.Linear(4, 4)})
    return nn.ModuleDict({"bert": nn.ModuleDict({"encoder": encoder, "pooler": pooler}), "classifier": nn.Linear(4, 2)})


EVERYTHING = [
    "bert.encoder.layer.0.query.weight",
    "bert.encoder.layer.0.dense.weight",
    "bert.encoder.layer.1.query.weight",
    "bert.encoder.layer.1.dense.weight",
    "bert.pooler.dense.weight",
    "classifier.weight",
]


def test_no_layer_is_excluded_behind_the_users_back():
    """Neural Compressor drops the last linear layer, and every layer whose name the head's name matches."""
    assert selected(bert()) == EVERYTHING
    assert selected(linears("fc", "fc1", "fc2", "head")) == ["fc.weight", "fc1.weight", "fc2.weight", "head.weight"]
    assert selected(nn.Sequential(*(nn.Linear(4, 4) for _ in range(15)))) == [f"{i}.weight" for i in range(15)]


@pytest.mark.parametrize(
    "patterns, expected",
    [
        (["pooler"], EVERYTHING[4:5]),
        (["dense"], [EVERYTHING[1], EVERYTHING[3], EVERYTHING[4]]),
        (["^bert"], EVERYTHING[:5]),
        (["classifier$"], EVERYTHING[5:]),
        ([r"layer\.1\."], EVERYTHING[2:4]),
        (["layer.[01].query"], [EVERYTHING[0], EVERYTHING[2]]),
        (["pooler|query"], [EVERYTHING[0], EVERYTHING[2], EVERYTHING[4]]),
        ([".*"], EVERYTHING),
        ([""], EVERYTHING),
        (["(?i)POOLER"], EVERYTHING[4:5]),
        (["classifier", "bert"], EVERYTHING),
    ],
)
def test_names_are_regular_expressions(patterns, expected):
    assert selected(bert(), op_names=patterns) == expected
    rest = [name for name in EVERYTHING if name not in expected]
    if rest:
        assert selected(bert(), excluded_op_names=patterns) == rest
        assert selected(bert(), extra_excluded_op_names=patterns) == rest


def test_an_anchor_holds():
    assert problem(bert(), {"op_names": ["^dense"]}).startswith("pruning_configs[0].op_names[0]: matches no Conv or")


def test_a_short_name_finds_every_longer_one_unless_it_is_anchored():
    model = linears("fc", "fc1", "fc2", "a")
    assert selected(model, excluded_op_names=["fc"]) == ["a.weight"]
    assert selected(model, excluded_op_names=["^fc$"]) == ["fc1.weight", "fc2.weight", "a.weight"]
    assert selected(model, op_names=["fc"]) == ["fc.weight", "fc1.weight", "fc2.weight"]
    assert selected(model, op_names=["^fc$"]) == ["fc.weight"]


def test_exclusion_wins_over_inclusion():
    assert selected(linears("a", "b"), op_names=["a", "b"], excluded_op_names=["b"]) == ["a.weight"]
    assert problem(linears("a"), {"op_names": ["a"], "excluded_op_names": ["a"]}) == (
        "pruning_configs[0]: no layer is left to prune (a: excluded by 'a'); change its op_names or exclusions"
    )


def test_both_exclusions_add_up():
    options = {"excluded_op_names": ["a"], "extra_excluded_op_names": ["b"]}
    assert selected(linears("a", "b", "c"), **options) == ["c.weight"]
    assert spared(began(linears("a", "b", "c"), options)) == {"a": "excluded by 'a'", "b": "excluded by 'b'"}


@pytest.mark.parametrize(
    "wrong, hint",
    [
        ("lyer1", "did you mean 'layer1'?"),
        ("^layer2x$", "did you mean 'layer2'?"),
        ("norm", "known: layer1, layer2"),
        ("x", "known: layer1, layer2"),
        ("LAYER1", "known: layer1, layer2"),
    ],
)
def test_a_name_that_matches_nothing(wrong, hint):
    model = named(layer1=nn.Linear(4, 4), norm=nn.LayerNorm(4), layer2=nn.Linear(4, 4))
    text = problem(model, {}, {"op_names": ["layer", wrong]})
    assert text == f"pruning_configs[1].op_names[1]: matches no Conv or Linear layer, got {wrong!r}; {hint}"


def test_a_name_that_matches_no_layer_of_the_type():
    model = named(conv=nn.Conv2d(1, 1, 1), fc=nn.Linear(1, 1))
    text = problem(model, {"op_names": ["fc"], "pruning_op_types": ["Conv"]})
    assert text == "pruning_configs[0].op_names[0]: matches no Conv layer, got 'fc'; known: conv"
    text = problem(linears("fc"), {"op_names": ["fc"], "pruning_op_types": ["Conv2d", "Conv3d"]})
    assert text == "pruning_configs[0].op_names[0]: matches no Conv2d or Conv3d layer, got 'fc'; the model has none"


@pytest.mark.parametrize("option", ["excluded_op_names", "extra_excluded_op_names"])
def test_an_exclusion_that_matches_nothing_is_a_warning(option):
    with pytest.warns(UserWarning, match=r"^pruning_configs\[0\]\.excluded_op_names: 'hed' matches no layer$"):
        assert selected(linears("a", "head"), **{option: ["hed"]}) == ["a.weight", "head.weight"]


def test_an_exclusion_may_match_what_is_no_candidate():
    """A folder of layers, or a norm: nothing is wrong with that."""
    assert selected(named(a=nn.Linear(2, 2), norm=nn.LayerNorm(2)), excluded_op_names=["norm"]) == ["a.weight"]


def test_the_model_may_be_one_layer():
    assert selected(nn.Linear(4, 4)) == ["weight"]
    assert selected(nn.Linear(4, 4), op_names=["^$"]) == ["weight"]


# ---- types --------------------------------------------------------------------------------------------------------


def zoo() -> nn.Module:
    layers = {re.sub(" ", "_", name): case.make() for name, case in CASES.items()}
    return named(**layers, mine=MyLinear(4, 4), attn=attention(), other=attention(kdim=5, vdim=6))


OWN_SIZES = ["other.q_proj_weight", "other.k_proj_weight", "other.v_proj_weight"]


def of_types(*types: str) -> list[str]:
    return [name.removesuffix(".weight") for name in selected(zoo(), pruning_op_types=list(types))]


def test_conv_is_every_convolution():
    assert of_types("Conv") == [re.sub(" ", "_", name) for name in CASES if name not in ("Linear", "Conv1D")]


def test_linear_is_every_linear_layer_attention_and_conv1d_of_transformers():
    attention = ["attn.in_proj_weight", "attn.out_proj", *OWN_SIZES, "other.out_proj"]
    assert of_types("Linear") == ["Linear", "Conv1D", "mine", *attention]
    assert sorted(of_types("Conv", "Linear")) == sorted(of_types("Conv") + of_types("Linear"))


@pytest.mark.parametrize(
    "types, expected",
    [
        (["Conv1d"], ["Conv1d", "Conv1d_grouped"]),
        (["ConvTranspose1d"], ["ConvTranspose1d", "ConvTranspose1d_grouped"]),
        (["Conv3d", "ConvTranspose3d"], ["Conv3d", "Conv3d_grouped", "ConvTranspose3d"]),
        (["Conv1D"], ["Conv1D"]),
        (["MyLinear"], ["mine"]),
        (["MultiheadAttention", "MyLinear"], ["mine", "attn.in_proj_weight", *OWN_SIZES]),
        (["NonDynamicallyQuantizableLinear"], ["attn.out_proj", "other.out_proj"]),
    ],
)
def test_the_name_of_a_class_is_exactly_that_class(types, expected):
    assert of_types(*types) == expected


@pytest.mark.parametrize(
    "types, expected",
    [
        (["Conv2D"], "pruning_op_types[0]: unknown layer type, got 'Conv2D'; did you mean 'Conv2d'?"),
        (["Conv", "Liner"], "pruning_op_types[1]: unknown layer type, got 'Liner'; did you mean 'Linear'?"),
        (["conv"], "pruning_op_types[0]: unknown layer type, got 'conv'; did you mean 'Conv'?"),
        (["Embedding"], "pruning_op_types[0]: layers of this type cannot be pruned, got 'Embedding'; "),
        (["Bilinear"], "pruning_op_types[0]: layers of this type cannot be pruned, got 'Bilinear'; "),
        (["MyLiner"], "pruning_op_types[0]: unknown layer type, got 'MyLiner'; did you mean 'MyLinear'?"),
        (["Conv1d"], "pruning_op_types: the model has no such layer, got ['Conv1d']"),
        (["Conv"], "pruning_op_types: the model has no such layer, got ['Conv']"),
    ],
)
def test_types_that_select_nothing(types, expected):
    model = named(a=MyLinear(2, 2), e=nn.Embedding(2, 2), b=nn.Bilinear(2, 2, 2))
    assert problem(model, {"pruning_op_types": types}).startswith(f"pruning_configs[0].{expected}")


# ---- wrappers -----------------------------------------------------------------------------------------------------


@pytest.fixture
def alone() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "AveragedModel of DataParallel": lambda model: torch.optim.swa_utils.AveragedModel(nn.DataParallel(model)),
    "torch.compile": torch.compile,
    "torch.compile of DataParallel": lambda model: torch.compile(nn.DataParallel(model)),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if "compile" in name else ()) for name in WRAPPERS]
)
def test_a_wrapper_adds_no_prefix(name):
    model = linears("fc", "head")
    wrapped = WRAPPERS[name](model)
    pruner = began(wrapped, {"op_names": ["^fc$", "^head$"]})
    assert list(pruner.masks()) == ["fc.weight", "head.weight"]
    assert pruner.mask_(WRAPPERS[name](model)) is not model
    assert unwrap(model) is model


def test_data_parallel_over_processes_adds_no_prefix(alone):
    model = linears("fc", "head")
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert unwrap(wrapped) is model
    pruner = began(wrapped, {"op_names": ["^fc$"]})
    assert list(pruner.masks()) == ["fc.weight"]
    assert pruner.report().groups[0].layers[0].name == "fc.weight"


# ---- layers that stay dense ---------------------------------------------------------------------------------------


def integer() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    return layer


class Doubled(nn.Linear):
    """Its weight is a tensor that the forward pass makes anew."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        raw = self.weight
        del self.weight
        self.raw = raw
        self.weight = self.raw * 2


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.script is deprecated
        return torch.jit.script(nn.Linear(4, 4))


UNFIT = {
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(4, 4)), "its weight is computed by a parametrization"),
    "made anew": (Doubled, "its weight is not a parameter"),
    "TorchScript": (scripted, "it is TorchScript; prune the model that it was made from, then script"),
    "no rows": (lambda: nn.Linear(4, 0), "its weight is empty, (0, 4)"),
    "no columns": (lambda: nn.Linear(0, 4), "its weight is empty, (4, 0)"),
    "lazy": (lambda: nn.LazyLinear(4), "its weight has no shape yet; run one forward pass first"),
    "lazy convolution": (lambda: nn.LazyConv2d(4, 1), "its weight has no shape yet; run one forward pass first"),
    "lazy transposed": (
        lambda: nn.LazyConvTranspose2d(4, 1),
        "its weight has no shape yet; run one forward pass first",
    ),
    "integer": (integer, "its weight is torch.int8, not floating point"),
    "complex": (lambda: nn.Linear(4, 4, dtype=torch.cfloat), "its weight is torch.complex64, not floating point"),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors", r"ignore:.* odd stays dense:UserWarning")
@pytest.mark.parametrize("name", UNFIT)
def test_a_layer_that_cannot_be_masked_stays_dense_and_is_listed(name):
    make, reason = UNFIT[name]
    pruner = began(named(a=nn.Linear(4, 4), odd=make()))
    assert list(pruner.masks()) == ["a.weight"]
    assert spared(pruner) == {"odd": reason}
    assert list(began(named(a=nn.Linear(4, 4), odd=make()), {"op_names": ["a", "od"]}).masks()) == ["a.weight"]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", UNFIT)
@pytest.mark.parametrize("asked", ["odd", "^odd", "odd$", "^odd$"])
def test_a_layer_that_cannot_be_masked_is_an_error_where_it_is_named(name, asked):
    make, reason = UNFIT[name]
    text = problem(named(a=nn.Linear(4, 4), odd=make()), {"op_names": ["a", asked]})
    assert text == f"pruning_configs[0]: odd cannot be pruned: {reason}; take it out of op_names"


@pytest.mark.parametrize("name", ["orthogonal", "made anew", "TorchScript"])
def test_a_layer_that_looks_ordinary_and_stays_dense_is_warned_about(name):
    expected = rf"^pruning_configs\[0\]: odd stays dense: {re.escape(UNFIT[name][1])}$"
    with pytest.warns(UserWarning, match=expected):
        began(named(a=nn.Linear(4, 4), odd=UNFIT[name][0]()))


def l1(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", amount=0.25)


def old_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated
        return nn.utils.weight_norm(layer)


MADE_FROM = {
    "weight_norm of old": (old_norm, "odd.weight_v"),
    "spectral_norm of old": (nn.utils.spectral_norm, "odd.weight_orig"),
    "weight_norm": (parametrizations.weight_norm, "odd.parametrizations.weight.original1"),
    "spectral_norm": (parametrizations.spectral_norm, "odd.parametrizations.weight.original"),
    "prune": (l1, "odd.weight_orig"),
    "prune twice": (lambda layer: l1(l1(layer)), "odd.weight_orig"),
    "prune of what a norm keeps": (
        lambda layer: prune.random_unstructured(old_norm(layer), "weight_v", amount=0.25),
        "odd.weight_v_orig",
    ),
}


@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 6), lambda: nn.Conv2d(8, 6, 1)], ids=["Linear", "Conv2d"])
@pytest.mark.parametrize("kind", ["magnitude", "snip_momentum"])
@pytest.mark.parametrize("name", MADE_FROM)
def test_what_a_weight_is_made_from_is_pruned(name, kind, make):
    """Zeros of the tensor that is kept are zeros of the weight that the layer computes with, at every step."""
    torch.manual_seed(0)
    wrap, key = MADE_FROM[name]
    model = named(a=make(), odd=wrap(make()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"pruning_type": kind, "pattern": "1x1", "target_sparsity": 0.6, "end_step": 4, "pruning_scope": "local"}
    pruner = Pruning(options).attach(model, optimizer)
    assert list(pruner.masks()) == ["a.weight", key]
    data = torch.randn(3, 8, 1, 1) if isinstance(model.a, nn.Conv2d) else torch.randn(3, 8)
    for _ in range(6):
        optimizer.zero_grad()
        (model.a(data).square().mean() + model.odd(data).square().mean()).backward()
        optimizer.step()
    model.odd(data)  # hooks compute the weight
    assert int((model.odd.weight == 0).sum()) == round(0.6 * 48)
    assert torch.equal(pruner.masks()[key], model.odd.weight != 0)
    assert pruner.report().groups[0].layers[1].zeros == round(0.6 * 48)
    assert pruner.report().dense == ()


@pytest.mark.parametrize("pattern", ["1x1", "4x1", "2x2", "channelx1", "1:4"])
@pytest.mark.parametrize("kind", ["magnitude", "snip_momentum_progressive"])
@pytest.mark.parametrize("wrap", [old_norm, parametrizations.weight_norm], ids=["old", "new"])
@pytest.mark.parametrize(
    "make",
    [lambda: nn.Linear(4, 16), lambda: nn.ConvTranspose2d(4, 16, 1), lambda: nn.Conv2d(4, 16, 1)],
    ids=["Linear", "ConvTranspose2d", "Conv2d"],
)
def test_a_weight_norm_never_divides_by_nothing(pattern, kind, wrap, make):
    """A slice that is all zero has length 0 and would be NaN: the unit with its largest weight stays."""
    torch.manual_seed(0)
    layer, dim = make(), 0
    if pattern == "channelx1" and isinstance(layer, nn.ConvTranspose2d):
        pattern = "1xchannel"  # its slices are input channels
    before = fold_lines(layer.weight.detach(), dim).abs()
    model = named(odd=wrap(layer))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    target = min(0.9, parse_pattern(pattern).max_sparsity)
    options = {"pruning_type": kind, "pattern": pattern, "target_sparsity": target, "end_step": 6}
    pruner = Pruning(options | {"pruning_frequency": 2}).attach(model, optimizer)
    data = torch.randn(3, 4, *(() if isinstance(layer, nn.Linear) else (1, 1)))
    for _ in range(8):
        optimizer.zero_grad()
        model.odd(data).square().mean().backward()
        optimizer.step()
        assert model.odd(data).isfinite().all()
    (mask,) = pruner.masks().values()
    lines = fold_lines(mask, dim)
    assert lines.any(1).all()
    assert pruner.sparsity == pytest.approx(float((~mask).float().mean())) and pruner.sparsity > 0.2
    if kind == "magnitude" and pattern == "1x1":  # what stays of a slice with one weight is its largest
        alone = lines.sum(1) == 1
        assert alone.any() and torch.equal(lines[alone].int().argmax(1), before[alone].argmax(1))


def test_a_norm_over_each_unit_leaves_nothing_to_cut():
    model = named(a=nn.Linear(4, 4), odd=parametrizations.weight_norm(nn.Linear(4, 4)))
    pruner = began(model, {"pattern": "1xchannel"})
    reason = "its norm divides by the length of each unit, which must not be zero (pattern 1xchannel)"
    assert list(pruner.masks()) == ["a.weight"] and spared(pruner) == {"odd": reason}
    expected = f"pruning_configs[0]: odd cannot be pruned: {reason}; take it out of op_names"
    assert problem(model, {"pattern": "1xchannel", "op_names": ["a", "odd"]}) == expected


def test_a_mask_of_torch_prune_on_a_tied_weight():
    """The other layer uses the weight whole: zeros there would change what it computes."""
    model = named(a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 4))
    model.b.weight = model.a.weight
    l1(model.b)
    before = model.a.weight.detach().clone()
    pruner = began(model, {"excluded_op_names": ["^a$"]})
    assert list(pruner.masks()) == ["c.weight"]
    assert spared(pruner)["b"] == "its weight is computed from a.weight, which is b.weight_orig too"
    assert torch.equal(model.a.weight, before)
    assert spared(began(model))["b"] == "pruned as a.weight by pruning_configs[0]"


def test_what_a_sharded_weight_is_made_from(tmp_path):
    """Each rank has a part of it, but the mask, or the length, of the whole: it stays dense and is listed."""
    script = """
import os
import sys
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, prune
from pruning_core import Pruning

dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
layers = [nn.Linear(8, 8) for _ in range(3)]
parametrizations.weight_norm(layers[1])
prune.l1_unstructured(layers[2], "weight", 0.5)
pruner = Pruning({"pattern": "1x1"})
pruner.model = fully_shard(nn.Sequential(*layers), mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
pruner.on_train_begin()
print(list(pruner.masks()), [(row.name, row.note) for row in pruner.report().dense], flush=True)
os._exit(0)  # threads of gloo may abort an ordinary exit
"""
    run = [sys.executable, "-c", script, str(tmp_path / "store")]
    result = subprocess.run(run, check=False, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.returncode == 0, result.stderr
    note = "its weight is computed from a sharded parameter"
    dense = [("1.parametrizations.weight.original0", note), ("1.parametrizations.weight.original1", note)]
    assert result.stdout == f"{['0.weight']} {[*dense, ('2.weight_orig', note)]}\n"


def test_the_report_counts_a_tied_weight_once():
    model = named(words=nn.Embedding(20, 8), norm=nn.LayerNorm(8), head=nn.Linear(8, 20))
    model.head.weight = model.words.weight
    report = began(model, {"pattern": "1x1"}).report()
    assert report.others == {"biases": 20, "LayerNorm": 16}
    assert "no part in pruning: 36 parameters (biases 20, LayerNorm 16)\n" in str(report)
    normed = named(odd=parametrizations.weight_norm(nn.Linear(8, 4)), raw=nn.Linear(8, 4))
    normed.scale = nn.Parameter(torch.ones(3))
    assert began(normed).report().others == {"biases": 8, "Linear": 4, "Sequential": 3}


def test_masks_of_torch_prune_are_kept():
    layer = l1(nn.Linear(8, 8))
    before = layer.weight_mask == 0
    pruner = began(named(a=layer), {"pattern": "1x1", "pruning_type": "magnitude", "target_sparsity": 0.5})
    pruner.on_step_begin()
    mask = pruner.masks()["a.weight_orig"]
    assert not mask[before].any() and int((~mask).sum()) == 32
    prune.remove(layer, "weight")
    assert torch.equal(layer.weight != 0, mask)
    locked = l1(nn.Linear(8, 8))
    pruner = began(named(a=locked), {"pruning_type": "pattern_lock"})
    assert torch.equal(pruner.masks()["a.weight_orig"], locked.weight_mask != 0)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("kind, gates", [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_recurrent_layers_can_be_named_as_types(kind, gates):
    options = {"num_layers": 2, "bidirectional": True, **({"proj_size": 3} if kind == "LSTM" else {})}
    model = named(fc=nn.Linear(4, 4), memory=getattr(nn, kind)(4, 6, **options))
    every = [name for name, _ in model.named_parameters() if "memory.weight" in name]
    assert sorted(began(model, {"pruning_op_types": [kind]}).masks()) == sorted(every)
    assert list(began(model).masks()) == ["fc.weight"]
    pruner = began(model, {"pruning_op_types": [kind], "pattern": "4x1", "pruning_type": "magnitude"})
    pruner.on_step_begin()
    for name, mask in pruner.masks().items():  # 6 rows a gate: a unit of 4, one of 2; none spans two gates
        if "weight_hr" not in name:
            by_gate = mask.unflatten(0, (gates, 6))
            for rows in (by_gate[:, :4], by_gate[:, 4:]):
                assert bool((rows == rows[:, :1]).all())
    assert model.memory(torch.randn(5, 2, 4))[0].isfinite().all()


def test_a_recurrent_layer_of_views_of_one_bias():
    memory = nn.LSTM(4, 6)
    bias = torch.zeros(48)
    memory.bias_ih_l0, memory.bias_hh_l0 = nn.Parameter(bias[:24]), nn.Parameter(bias[24:])
    assert len(began(named(memory=memory), {"pruning_op_types": ["LSTM"]}).masks()) == 2


def test_a_lazy_layer_after_its_first_pass():
    model = named(a=nn.LazyLinear(4))
    model(torch.ones(1, 4))
    assert selected(model) == ["a.weight"]


def test_only_the_parametrized_weight_of_an_attention_is_left_out():
    module = attention(kdim=4, vdim=4)
    nn.utils.parametrize.register_parametrization(module, "k_proj_weight", nn.Identity())
    with pytest.warns(UserWarning, match=r"^pruning_configs\[0\]: attn stays dense: its weight is computed by"):
        pruner = began(named(attn=module))
    assert list(pruner.masks()) == ["attn.q_proj_weight", "attn.v_proj_weight", "attn.out_proj.weight"]
    assert spared(pruner) == {"attn": "its weight is computed by a parametrization"}


def test_a_layer_that_n_in_m_does_not_divide_stays_dense_and_is_listed():
    model = named(
        stem=nn.Conv2d(3, 8, 3), body=nn.Conv2d(8, 8, 3), thin=nn.Conv2d(8, 8, 3, groups=4), fc=nn.Linear(6, 2)
    )
    pruner = began(model, {"pattern": "2:4"})
    assert list(pruner.masks()) == ["body.weight"]
    assert spared(pruner) == {
        "stem": "its 3 input channels are not a multiple of 4 (pattern 2:4)",
        "thin": "its 2 input channels are not a multiple of 4 (pattern 2:4)",
        "fc": "its 6 input channels are not a multiple of 4 (pattern 2:4)",
    }
    report = str(pruner.report())
    assert "its 6 input channels are not a multiple of 4 (pattern 2:4)" in report
    assert list(began(model, {"pattern": "2:4", "op_names": ["st", "body"]}).masks()) == ["body.weight"]


def test_a_layer_that_n_in_m_does_not_divide_is_an_error_where_it_is_named():
    model = nn.ModuleDict({"a": nn.ModuleDict({"b-1": nn.Linear(6, 4)}), "c": nn.Linear(4, 4)})
    reason = "its 6 input channels are not a multiple of 4 (pattern 2:4)"
    for asked in ("a.b-1", r"a\.b-1", r"^a\.b-1$", re.escape("a.b-1"), f"^{re.escape('a.b-1')}$"):
        text = problem(model, {"pattern": "2:4", "op_names": ["c", asked]})
        assert text == f"pruning_configs[0]: a.b-1 cannot be pruned: {reason}; take it out of op_names"
    assert selected(model, pattern="2:4", op_names=["c", "b-1"]) == ["c.weight"]


def test_transposed_layers_have_their_input_channels_counted():
    model = named(up=nn.ConvTranspose2d(4, 3, 2), gpt=Conv1D(3, 4))
    assert selected(model, pattern="2:4") == ["up.weight", "gpt.weight"]
    assert problem(named(up=nn.ConvTranspose2d(3, 4, 2), gpt=Conv1D(4, 3)), {"pattern": "2:4"}).startswith(
        "pruning_configs[0]: no layer is left to prune (up: its 3 input channels are not a multiple of 4"
    )


def test_pattern_lock_takes_what_n_in_m_does_not_divide():
    model = linears("a")
    model.a.weight.data[0] = 0
    assert selected(model, pattern="2:4", pruning_type="pattern_lock") == ["a.weight"]


# ---- ownership ----------------------------------------------------------------------------------------------------


def test_the_first_pruner_that_selects_a_layer_has_it():
    pruner = began(linears("a", "b", "c"), {"op_names": ["b"]}, {"excluded_op_names": ["c"]}, {})
    owners = [[weight.target.name for weight in group.weights] for group in pruner._groups]
    assert owners == [["b.weight"], ["a.weight"], ["c.weight"]]
    assert {each.layer: each.reason for each in pruner._groups[2].skipped} == {
        "a": "pruned as a.weight by pruning_configs[1]",
        "b": "pruned as b.weight by pruning_configs[0]",
    }


def test_a_pruner_whose_layers_are_all_taken_is_an_error():
    assert problem(linears("a", "b"), {}, {"op_names": ["b"]}) == (
        "pruning_configs[1]: no layer is left to prune (a: not among op_names; b: pruned as b.weight by "
        "pruning_configs[0]); change its op_names or exclusions"
    )
    text = problem(linears(*"abcdefgh"), {}, {})
    assert text.count("pruned as") == 3


def test_tied_weights_are_owned_once():
    model = linears("a", "b", "c")
    model.c.weight = model.a.weight
    pruner = began(model)
    assert list(pruner.masks()) == ["a.weight", "b.weight"]
    assert spared(pruner) == {"c": "pruned as a.weight by pruning_configs[0]"}
    pruner = began(model, {"op_names": ["c"]}, {})
    assert list(pruner.masks()) == ["c.weight", "b.weight"]
    assert {each.layer: each.reason for each in pruner._groups[1].skipped} == {
        "a": "pruned as c.weight by pruning_configs[0]",
        "c": "pruned as c.weight by pruning_configs[0]",
    }


def test_a_layer_used_twice_is_one_layer():
    shared = nn.Linear(4, 4)
    assert selected(named(a=shared, b=nn.Linear(4, 4), c=shared)) == ["a.weight", "b.weight"]


def test_selecting_changes_nothing_in_the_model():
    model = zoo()
    keys, before = set(vars(model)), {name: value.clone() for name, value in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        began(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert set(vars(model)) == keys
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and not module._backward_hooks
