import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pruning_core.schedules import SCHEDULES, Timetable

GOLDEN = [  # (schedule, progress, share of a target of 0.8)
    ("linear", 0.25, 0.2),
    ("linear", 0.5, 0.4),
    ("cos", 0.5, 0.8 * (1 - math.sqrt(0.5))),
    ("cos", 1 / 3, 0.8 * (1 - math.sqrt(3) / 2)),
    ("exp", 0.5, 1 - math.sqrt(0.2)),
    ("exp", 0.25, 0.3312596950235779),
    ("cube", 0.5, 0.1),
    ("cube", 0.25, 0.0125),
    ("cubic", 0.5, 0.7),
    ("cubic", 0.25, 0.4625),
]


@pytest.mark.parametrize(("name", "progress", "share"), GOLDEN)
def test_golden_rows(name, progress, share):
    assert SCHEDULES[name]().sparsity(progress, 0.8) == pytest.approx(share, abs=1e-12)


def test_every_schedule_has_golden_rows():
    assert {name for name, _, _ in GOLDEN} == set(SCHEDULES)


@pytest.mark.parametrize("name", list(SCHEDULES))
@given(st.floats(0, 0.99), st.lists(st.floats(0, 1), min_size=2))
def test_a_schedule_starts_at_zero_ends_at_the_target_and_never_falls(name, target, progress):
    schedule = SCHEDULES[name]()
    assert schedule.sparsity(0, target) == pytest.approx(0, abs=1e-12)
    assert schedule.sparsity(1, target) == pytest.approx(target, abs=1e-12)
    shares = [schedule.sparsity(p, target) for p in sorted(progress)]
    assert all(a <= b + 1e-12 for a, b in pairwise(shares))


def table(start, end, frequency, name="linear"):
    return Timetable(start, end, frequency, 0.8, SCHEDULES[name]())


def dues(timetable):
    found, step = [], timetable.next_due(-1)
    while step is not None:
        found.append(step)
        step = timetable.next_due(step)
    return found


@pytest.mark.parametrize(
    ("start", "end", "frequency", "expected"),
    [
        (0, 10, 1, list(range(11))),
        (0, 10, 4, [0, 4, 8, 10]),
        (3, 10, 4, [3, 7, 10]),
        (0, 10, 1000, [0, 10]),
        (5, 5, 1, [5]),
        (0, 0, 7, [0]),
    ],
)
def test_updates_are_due_from_the_start_at_the_frequency_and_at_the_end(start, end, frequency, expected):
    assert dues(table(start, end, frequency)) == expected


@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 40), st.integers(0, 80))
def test_last_due_is_the_latest_due_step_so_far(start, length, frequency, step):
    timetable = table(start, start + length, frequency)
    so_far = [due for due in dues(timetable) if due <= step]
    assert timetable.last_due(step) == (so_far[-1] if so_far else None)


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_the_share_at_the_end_is_the_target_itself(name):
    timetable = table(0, 7, 2, name)
    assert timetable.sparsity(7) == 0.8
    assert timetable.sparsity(1000) == 0.8
    assert timetable.sparsity(0) == pytest.approx(0)


def test_one_shot_goes_from_nothing_to_the_target():
    timetable = table(5, 5, 1)
    assert [timetable.sparsity(4), timetable.sparsity(5), timetable.sparsity(6)] == [0.0, 0.8, 0.8]
