"""Selection against a plain sort."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning_core.masks.budget import Ranked, cut_apart, cut_together, limits, share_of, sortable

SCORES = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, 0.5, 1.0]),  # ties
    st.just(-math.inf),  # cut already
)


def layer(scores, sizes=1):
    flat = torch.tensor(scores, dtype=torch.float32)
    total = sizes * len(scores) if isinstance(sizes, int) else sum(sizes)
    sizes = sizes if isinstance(sizes, int) else torch.tensor(sizes)
    return Ranked("layer", lambda: sortable(flat).split(7), sizes, total, total)


def sorted_cut(layers, asked):
    """The units in the order (score, layer, index), as many as fit into ``asked`` weights one after the other."""
    units = []
    for i, each in enumerate(layers):
        scores = torch.cat(each.keys()).tolist()
        sizes = [each.sizes] * len(scores) if isinstance(each.sizes, int) else each.sizes.tolist()
        units += [(score, i, j, size) for j, (score, size) in enumerate(zip(scores, sizes, strict=True))]
    cuts = [torch.zeros(sum(map(len, each.keys())), dtype=torch.bool) for each in layers]
    for _, i, j, size in sorted(units):
        if size > asked:
            break
        asked -= size
        cuts[i][j] = True
    return cuts


def cut_weights(layers, cuts):
    return [int((cut * each.sizes).sum()) for each, cut in zip(layers, cuts, strict=True)]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(SCORES, min_size=1, max_size=30), min_size=1, max_size=4), st.floats(0, 0.99))
def test_global_selection_is_a_sort(scores, share):
    layers = [layer([score + 0.0 for score in each]) for each in scores]
    asked = share_of(share, sum(each.weights for each in layers))
    cuts = list(cut_together(layers, share, 0.0, 1.0))
    for cut, expected in zip(cuts, sorted_cut(layers, asked), strict=True):
        assert torch.equal(cut, expected)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(SCORES, min_size=1, max_size=30), min_size=1, max_size=4), st.floats(0, 0.99))
def test_local_selection_is_a_sort_per_layer(scores, share):
    layers = [layer([score + 0.0 for score in each]) for each in scores]
    amounts = [share_of(share, each.weights) for each in layers]
    for each, amount, cut in zip(layers, amounts, cut_apart(layers, amounts), strict=True):
        assert torch.equal(cut, sorted_cut([each], amount)[0])


@settings(max_examples=200, deadline=None)
@given(st.data(), st.floats(0, 0.95))
def test_units_of_different_sizes_without_ties(data, share):
    layers = []
    for base in range(data.draw(st.integers(1, 4))):
        n = data.draw(st.integers(1, 20))
        sizes = data.draw(st.one_of(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=n, max_size=n)))
        order = data.draw(st.permutations(range(n)))
        layers.append(layer([float(base + 4 * k) for k in order], sizes))
    asked = share_of(share, sum(each.weights for each in layers))
    scores = torch.cat([keys for each in layers for keys, _ in each.parts()]).tolist()
    cuts = list(cut_together(layers, share, 0.0, 1.0))
    if len(set(scores)) == len(scores):
        for cut, expected in zip(cuts, sorted_cut(layers, asked), strict=True):
            assert torch.equal(cut, expected)
    reached = sum(cut_weights(layers, cuts))
    assert asked - max(each.unit for each in layers) < reached <= asked


@settings(max_examples=200, deadline=None)
@given(st.data(), st.floats(0, 0.9), st.floats(0, 1), st.floats(0, 0.1))
def test_limits_hold_to_one_unit_and_the_total_stays_exact(data, share, least, above):
    most, least = min(share + above, 0.999), least * share
    layers = []
    for _ in range(data.draw(st.integers(1, 6))):
        n = data.draw(st.integers(20, 60))  # small layers may be unable to: each keeps its last unit
        seed = data.draw(st.integers(0, 999))
        scale = data.draw(st.sampled_from([1e-3, 1.0, 1e3]))
        scores = scale * torch.rand(n, generator=torch.Generator().manual_seed(seed))
        layers.append(layer(scores.tolist()))
    asked, lows, highs = limits(layers, share, least, most)
    cut = cut_weights(layers, cut_together(layers, share, least, most))
    assert sum(cut) == asked
    assert share * sum(each.weights for each in layers) - 1 < asked
    assert asked <= share_of(share, sum(each.weights for each in layers))
    for each, amount, low, high in zip(layers, cut, lows, highs, strict=True):
        assert low <= amount <= high
        assert low == math.floor(least * each.weights + 1e-6)
        assert amount < each.weights  # a layer never loses its last unit to rounding
        assert high <= most * each.weights + 1 + 1e-6


def test_ties_are_cut_by_index_and_only_as_many_as_asked():
    """A `<=` at the threshold would cut all twenty."""
    layers = [layer([0.0] * 10 + [1.0] * 10), layer([0.0] * 10 + [1.0] * 10)]
    first, second = cut_together(layers, 0.3, 0.0, 0.98)
    assert first.nonzero().flatten().tolist() == list(range(10))
    assert second.nonzero().flatten().tolist() == [0, 1]


@pytest.mark.parametrize("amount", range(0, 11))
def test_point_one_is_point_one(amount):
    assert share_of(amount / 10, 10) == amount


def test_equal_minimum_and_maximum_make_layers_equal():
    layers = [layer(torch.rand(100).tolist()), layer((100 * torch.rand(100)).tolist())]
    assert cut_weights(layers, cut_together(layers, 0.75, 0.75, 0.75)) == [75, 75]
    layers = [layer(torch.rand(10).tolist()) for _ in range(10)]
    cut = cut_weights(layers, cut_together(layers, 0.75, 0.75, 0.75))
    assert sum(cut) == 75
    assert set(cut) == {7, 8}


def test_the_maximum_keeps_a_layer_from_starving():
    weak, strong = layer([0.0] * 100), layer([1.0] * 100)
    assert cut_weights([weak, strong], cut_together([weak, strong], 0.6, 0.0, 0.98)) == [98, 22]


def test_the_minimum_takes_from_a_strong_layer_in_any_order():
    weak, strong = layer([0.0] * 100), layer([1.0] * 100)
    assert cut_weights([weak, strong], cut_together([weak, strong], 0.5, 0.2, 0.98)) == [80, 20]
    assert cut_weights([strong, weak], cut_together([strong, weak], 0.5, 0.2, 0.98)) == [20, 80]


def test_a_minimum_waits_for_the_schedule():
    """Early on, a layer cannot be asked for more than the share of the moment."""
    layers = [layer([0.0] * 100), layer([1.0] * 100)]
    assert cut_weights(layers, cut_together(layers, 0.1, 0.5, 0.98)) == [10, 10]


def test_what_is_impossible_is_said():
    few = [layer([1.0, 2.0], sizes=50), layer([3.0], sizes=100)]
    with pytest.raises(ValueError, match=r"max_sparsity_ratio_per_op: 0\.98 of every layer leaves room for 50 zeros"):
        cut_together(few, 0.9, 0.0, 0.98)


def test_negative_scores_and_infinities_are_ordered():
    each = layer([3.0, -2.0, math.inf, -math.inf, 0.0, -1e-30])
    order = [3, 1, 5, 4, 0, 2]
    for amount in range(6):
        assert sorted(next(cut_apart([each], [amount])).nonzero().flatten().tolist()) == sorted(order[:amount])
