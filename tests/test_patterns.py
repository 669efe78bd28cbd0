"""Folds and spreads against index loops that a child could check."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning_core.patterns import PATTERNS, Block, NinM, Region, parse_pattern

EXAMPLES = [*(text for name in PATTERNS for text in PATTERNS[name].examples), "2xchannel", "channelx2"]
SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 4), st.integers(1, 9))


def unit_of(text, index):
    """The unit grid index of one weight, from the definition of the pattern."""
    g, o, k, i = index
    if text.endswith("xchannel"):
        return g, o // int(text.split("x")[0]), 0, 0
    if text.startswith("channelx"):
        return g, 0, 0, i // int(text.split("x")[1])
    if ":" in text:
        return g, o, k, i // int(text.split(":")[1])
    n, m = map(int, text.split("x"))
    return g, o // n, k, i // m


def members(text, shape):
    """Unit grid index -> the indices of its weights."""
    units = {}
    for index in itertools.product(*(range(length) for length in shape)):
        units.setdefault(unit_of(text, index), []).append(index)
    return units


def fits(text, shape):
    return parse_pattern(text).unfit(shape) is None


@pytest.mark.parametrize("text", EXAMPLES)
@pytest.mark.parametrize("reduce", ["sum", "max"])
@settings(max_examples=25, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 99))
def test_fold(text, reduce, shape, seed):
    if not fits(text, shape):
        return
    pattern, score = parse_pattern(text), torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    grid = pattern.fold(score, pattern.region(shape), reduce)
    for unit, indices in members(text, shape).items():
        values = sorted(score[index].item() for index in indices)
        if isinstance(pattern, NinM):
            values = values[: pattern.of - pattern.kept]
        expected = max(values) if reduce == "max" else sum(values)
        assert grid[unit].item() == pytest.approx(expected, rel=1e-5)
    assert grid.numel() == len(members(text, shape))


@pytest.mark.parametrize("text", EXAMPLES)
@settings(max_examples=25, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 99))
def test_spread_alive_and_sizes(text, shape, seed):
    if not fits(text, shape):
        return
    generator = torch.Generator().manual_seed(seed)
    pattern, score = parse_pattern(text), torch.rand(shape, generator=generator)
    region = pattern.region(shape)
    grid = pattern.fold(score, region, "sum")
    keep = torch.rand(grid.shape, generator=generator) < 0.5
    mask = pattern.spread(keep, score, region)
    assert mask.shape == shape
    sizes = pattern.sizes(region)
    for unit, indices in members(text, shape).items():
        kept = [index for index in indices if mask[index]]
        size = sizes if isinstance(sizes, int) else sizes[unit].item()
        assert size == len(indices) - (pattern.kept if isinstance(pattern, NinM) else 0)
        if keep[unit]:
            assert len(kept) == len(indices)
        elif isinstance(pattern, NinM):
            assert kept == sorted(sorted(indices, key=lambda index: score[index].item())[-pattern.kept :])
        else:
            assert kept == []
    assert torch.equal(pattern.alive(mask.to(torch.int8), region), keep)


@pytest.mark.parametrize("text", [text for text in EXAMPLES if ":" not in text])
@settings(max_examples=30, deadline=None)
@given(shape=SHAPES, axis=st.sampled_from([1, 3]), cut=st.integers(0, 9))
def test_two_slices_see_the_units_of_the_whole(text, shape, axis, cut):
    """Partial folds of the slices add up, and each slice spreads the part of the mask that is its own."""
    pattern = parse_pattern(text)
    score, whole = torch.rand(shape), pattern.region(shape)
    expected = pattern.fold(score, whole, "sum")
    keep = torch.rand(expected.shape) < 0.5
    mask = pattern.spread(keep, None, whole)
    cut = min(cut, shape[axis])
    total = torch.zeros_like(expected)
    for first, end in ((0, cut), (cut, shape[axis])):
        if first == end:
            continue
        local, start = list(shape), [0, 0, 0, 0]
        local[axis], start[axis] = end - first, first
        region = Region(whole.shape, whole.extents, tuple(local), tuple(start))
        part = score.narrow(axis, first, end - first)
        grid = pattern.fold(part, region, "sum")
        row = first // whole.extents[axis]
        total.narrow(axis, row, grid.shape[axis]).add_(grid)
        here = pattern.spread(keep.narrow(axis, row, grid.shape[axis]), None, region)
        assert torch.equal(here, mask.narrow(axis, first, end - first))
        assert torch.equal(pattern.alive(here.to(torch.int8), region), keep.narrow(axis, row, grid.shape[axis]))
    assert torch.allclose(total, expected)


def test_n_of_m_breaks_ties_by_index():
    pattern = NinM(2, 4)
    keep = torch.zeros(1, 1, 1, 1, dtype=torch.bool)
    mask = pattern.spread(keep, torch.ones(1, 1, 1, 4), pattern.region((1, 1, 1, 4)))
    assert mask.flatten().tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("4x1", Block(4, 1)),
        ("oc_pattern_4x1", Block(4, 1)),
        ("tile_pattern_1x1", Block(1, 1)),
        ("ic_pattern_2:4", NinM(2, 4)),
        ("1xchannel", Block(1, None)),
        ("32xchannel", Block(32, None)),
        ("channelx64", Block(None, 64)),
        ("channelx1", Block(None, 1)),
        ("7x13", Block(7, 13)),
    ],
)
def test_parse(text, pattern):
    assert parse_pattern(text) == pattern


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("4y1", "unknown pattern, got '4y1'; use NxM blocks"),
        ("", "unknown pattern, got ''"),
        ("0x1", "a block needs at least one row and one column, got '0x1'"),
        ("4:2", "needs 0 < N < M, got '4:2'"),
        ("0:4", "needs 0 < N < M, got '0:4'"),
        ("channelxchannel", "unknown pattern"),
        ("0xchannel", "at least one row and one column"),
    ],
)
def test_malformed_patterns(text, message):
    with pytest.raises(ValueError, match=message):
        parse_pattern(text)


@pytest.mark.parametrize("text", EXAMPLES)
def test_text_round_trip(text):
    assert str(parse_pattern(text)) == text
