"""What must hold for every criterion x pattern x type x scope x schedule; new kinds are picked up by themselves."""

import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from pruning_core import Pruning
from pruning_core.criteria import CRITERIA, Criterion
from pruning_core.patterns import PATTERNS, NinM, parse_pattern
from pruning_core.schedules import SCHEDULES
from pruning_core.selection import targets_of
from tests.support.loops import small_net

PATTERN_TEXTS = [text for name in PATTERNS for text in PATTERNS[name].examples]
NAMES = [name for name in CRITERIA if not CRITERIA[name].needs]
"""What ranks weights; those that rank channels alone are in the channels' contract."""
KINDS = ["", "_progressive"]


class Net(nn.Module):
    """One of each kind of layer; odd sizes, and sizes that N:M patterns fit."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 10, 3)
        self.grouped = nn.Conv2d(8, 12, 3, groups=2)
        self.depthwise = nn.Conv1d(6, 6, 3, groups=6)
        self.transposed = nn.ConvTranspose2d(8, 6, 2)
        self.attention = nn.MultiheadAttention(8, 2)
        self.linear = nn.Linear(12, 9)


def set_gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def canonical(pruner):
    """(G, O, K, I) masks, by weight."""
    found = {}
    for group in pruner._groups:
        for weight in group.weights:
            found[weight.target.name] = (weight.target.layout.view(pruner.masks()[weight.target.name]), weight)
    return found


def made_of_whole_units(pruner):
    for mask, weight in canonical(pruner).values():
        region = weight.pattern.region(mask.shape)
        alive = weight.pattern.alive(mask.to(torch.int8), region)
        if isinstance(weight.pattern, NinM):
            kept = mask.unflatten(3, (-1, weight.pattern.of)).sum(-1)
            assert set(kept.unique().tolist()) <= {weight.pattern.kept, weight.pattern.of}
        else:
            assert torch.equal(weight.pattern.spread(alive, None, region), mask)


def run(options, steps=13, each=None, model=None):
    model = model or Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    pruner = Pruning(options)
    with pruner.attach(model, optimizer):
        for step in range(steps):
            set_gradients(model, step)
            optimizer.step()
            if each is not None:
                each(pruner, step + 1)
    return pruner


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pattern", PATTERN_TEXTS)
@pytest.mark.parametrize("criterion", NAMES)
def test_asked_is_reached_at_every_step_and_nothing_comes_back(criterion, pattern, kind):
    highest = parse_pattern(pattern).max_sparsity
    for scope, schedule in itertools.product(("global", "local"), SCHEDULES):
        target = min(0.7, highest)
        options = {"pruning_type": criterion + kind, "pattern": pattern, "pruning_scope": scope}
        options |= {"sparsity_decay_type": schedule, "target_sparsity": target, "start_step": 2, "end_step": 10}
        options |= {"pruning_frequency": 4}
        earlier = {}

        def check(pruner, now, options=options, target=target, earlier=earlier):
            group = pruner._groups[0]
            zeros = 0
            for weight in group.weights:
                mask = pruner.masks()[weight.target.name]
                assert not weight.target.parameter[~mask].any(), "a masked weight is not zero"
                dead = earlier.get(weight.target.name)
                assert dead is None or not (mask & dead).any(), "a cut weight came back"
                earlier[weight.target.name] = ~mask
                zeros += int((~mask).sum())
                assert (~mask).sum() <= options.get("max_sparsity_ratio_per_op", 0.98) * mask.numel()
            units = [int(torch.as_tensor(w.pattern.sizes(w.place.region)).max()) for w in group.weights]
            slack = max(units) if options["pruning_scope"] == "global" else sum(units)
            asked = group.table.sparsity(
                now if now in (2, 6, 10) else max((d for d in (2, 6, 10) if d < now), default=0)
            )
            if kind == "" or now >= 10:
                assert asked * group.total - slack - 1 < zeros <= asked * group.total + len(units)
                made_of_whole_units(pruner)
            else:
                assert zeros <= asked * group.total + len(units)

        pruner = run(options, each=check)
        assert pruner._groups[0].done


@pytest.mark.parametrize("criterion", NAMES)
@pytest.mark.parametrize("pattern", PATTERN_TEXTS)
def test_one_shot(criterion, pattern):
    target = min(0.5, parse_pattern(pattern).max_sparsity)
    pruner = run({"pruning_type": criterion, "pattern": pattern, "target_sparsity": target}, steps=1)
    group = pruner._groups[0]
    units = [int(torch.as_tensor(w.pattern.sizes(w.place.region)).max()) for w in group.weights]
    zeros = sum(int((w.target.parameter == 0).sum()) for w in group.weights)
    assert target * group.total - max(units) <= zeros <= target * group.total + 0.5
    made_of_whole_units(pruner)


@pytest.mark.parametrize("pattern", PATTERN_TEXTS)
def test_dead_weights_stay_dead_even_when_they_score_highest(pattern):
    @CRITERIA.add("adversary")
    class Adversary(Criterion):
        needs_gradient = False

        def score(self, weight, gradient):
            return torch.where(weight == 0, 1e6, 1 / weight.abs())

    try:
        earlier = {}

        def check(pruner, now):
            for name, mask in pruner.masks().items():
                assert name not in earlier or not (mask & earlier[name]).any()
                earlier[name] = ~mask

        target = min(0.7, parse_pattern(pattern).max_sparsity)
        for kind in KINDS:
            earlier.clear()
            options = {"pruning_type": "adversary" + kind, "pattern": pattern, "end_step": 8, "target_sparsity": target}
            pruner = run(options | {"pruning_frequency": 2}, steps=10, each=check)
            made_of_whole_units(pruner)
    finally:
        CRITERIA.remove("adversary")


def reference_masks(model, pattern_text, target, scope):
    """One-shot magnitude pruning by index loops, the slow and obvious way; and the largest unit of each weight."""
    pattern = parse_pattern(pattern_text)
    units, totals = [], {}
    masks = {}
    for layer, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.modules.conv._ConvNd | nn.MultiheadAttention):
            continue
        for weight in targets_of(layer, module):
            view = weight.layout.view(weight.parameter.detach())
            if pattern.unfit(view.shape):
                continue
            masks[weight.name] = torch.ones(view.shape, dtype=torch.bool)
            totals[weight.name] = view.numel()
            members = {}
            G, O, K, I = view.shape  # noqa: E741
            order = ("g", "i", "o", "k") if weight.layout.in_first else ("g", "o", "i", "k")
            for g, o, k, i in itertools.product(range(G), range(O), range(K), range(I)):
                at = {"g": g, "o": o, "k": k, "i": i}
                if isinstance(pattern, NinM):
                    at["i"] //= pattern.of
                else:
                    if None in (pattern.out_channels, pattern.in_channels):
                        at["k"] = 0
                    at["o"] //= pattern.out_channels or O
                    at["i"] //= pattern.in_channels or I
                members.setdefault(tuple(at[axis] for axis in order), []).append((g, o, k, i))
            for unit, indices in sorted(members.items()):
                if isinstance(pattern, NinM):
                    indices = sorted(indices, key=lambda index: abs(view[index].item()))
                    indices = indices[: pattern.of - pattern.kept]
                score = torch.stack([view[index].abs() for index in indices]).double().mean().item()
                units.append((score, weight.name, unit, indices))
    layouts = {w.name: w.layout for n, m in model.named_modules() if n for w in _targets(n, m)}
    names = list(totals)
    pools = [names] if scope == "global" else [[name] for name in names]
    for pool in pools:
        left = math.floor(target * sum(totals[name] for name in pool) + 0.5)
        mine = [unit for unit in units if unit[1] in pool]
        for _, name, _, indices in sorted(mine, key=lambda u: (u[0], names.index(u[1]), u[2])):
            if len(indices) > left:
                break
            left -= len(indices)
            for index in indices:
                masks[name][index] = False
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    largest = {name: max(len(indices) for _, each, _, indices in units if each == name) for name in names}
    return {name: layouts[name].store(mask, shapes[name]) for name, mask in masks.items()}, largest


def _targets(layer, module):
    prunable = nn.Linear | nn.modules.conv._ConvNd | nn.MultiheadAttention
    return targets_of(layer, module) if isinstance(module, prunable) else []


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("pattern", [*PATTERN_TEXTS, "2xchannel", "channelx2"])
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 1000), target=st.floats(0.05, 0.6))
def test_masks_equal_those_of_index_loops(pattern, scope, seed, target):
    target = min(target, parse_pattern(pattern).max_sparsity)
    torch.manual_seed(seed)
    model = Net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    expected, largest = reference_masks(model, pattern, target, scope)
    assume(all(mask.sum() > largest[name] for name, mask in expected.items()))  # else the maximum may step in
    options = {"pruning_type": "magnitude", "pattern": pattern, "pruning_scope": scope, "target_sparsity": target}
    pruner = Pruning(options | {"max_sparsity_ratio_per_op": 0.9999})
    pruner.model = model
    pruner.on_train_begin()
    pruner.on_step_begin()
    masks = pruner.masks()
    assert masks.keys() == expected.keys()
    for name in masks:
        assert torch.equal(masks[name], expected[name]), name


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_masked_weights_stay_zero_with_momentum_and_weight_decay(optimizer):
    model = small_net()
    optimizer = optimizer(model.parameters(), lr=0.01, weight_decay=0.1)
    with Pruning({"pattern": "1x1", "end_step": 4}).attach(model, optimizer) as pruner:
        for step in range(20):
            set_gradients(model, step)
            optimizer.step()
            for name, mask in pruner.masks().items():
                weight = model.get_parameter(name)
                assert (weight[~mask] == 0).all()
                assert not weight[~mask].signbit().any()  # +0.0, not -0.0
    assert pruner.report().groups[0].zeros == math.floor(0.8 * pruner._groups[0].total + 0.5)


def test_the_guard_can_fail():
    """made_of_whole_units notices a broken mask."""
    pruner = run({"pruning_type": "magnitude", "pattern": "4x1"}, steps=1)
    weight = pruner._groups[0].weights[-1]
    dead = int((~weight.keep.whole()).flatten().nonzero()[0])
    weight.keep.packed[dead // 8] |= 1 << dead % 8
    with pytest.raises(AssertionError):
        made_of_whole_units(pruner)
