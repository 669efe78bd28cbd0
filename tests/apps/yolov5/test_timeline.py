"""The clock of a run: steps, warm-up, pruning window, rates. Pure, so that a resumed run has the same one."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apps.common.errors import BadInput
from apps.yolov5.timeline import Timeline, check_epochs


@st.composite
def timelines(draw: st.DrawFn) -> Timeline:
    epochs = draw(st.integers(1, 12))
    return Timeline(
        epochs=epochs,
        batches=draw(st.integers(1, 25)),
        accumulate=draw(st.integers(1, 20)),
        warmup_epochs=draw(st.floats(0, 15) | st.integers(0, 5)),
        cooldown_epochs=draw(st.integers(0, epochs - 1)),
    )


def ends(timeline: Timeline) -> list[int]:
    """The batches after which the optimizer steps."""
    return [batch for batch in range(timeline.epochs * timeline.batches) if timeline.ends_step(batch)]


@given(timelines())
@settings(deadline=None)
def test_steps_count_the_batches_that_end_one(timeline):
    batches = timeline.epochs * timeline.batches
    before = [timeline.steps_before(batch) for batch in range(batches + 1)]
    assert before[0] == 0
    assert before[-1] == timeline.steps == len(ends(timeline))
    for batch, (this, after) in enumerate(pairwise(before)):
        assert after - this == timeline.ends_step(batch)


@given(timelines())
@settings(deadline=None)
def test_each_epoch_ends_a_step_and_a_step_has_1_to_accumulate_batches(timeline):
    last = [-1, *ends(timeline)]
    assert set(range(timeline.batches - 1, timeline.epochs * timeline.batches, timeline.batches)) <= set(last)
    sizes = [after - before for before, after in pairwise(last)]
    assert min(sizes) >= 1
    assert max(sizes) <= timeline.accumulate
    if timeline.accumulate == 1:
        assert timeline.steps == timeline.epochs * timeline.batches
    if timeline.warmup:
        assert sizes[0] == 1  # the first gradients are made of one batch


@given(timelines())
@settings(deadline=None)
def test_after_the_warm_up_every_step_is_full_but_the_last_of_an_epoch(timeline):
    for before, after in pairwise(ends(timeline)):
        last_of_epoch = (after + 1) % timeline.batches == 0
        if before >= timeline.warmup and not last_of_epoch:
            assert after - before == timeline.accumulate


@given(timelines())
@settings(deadline=None)
def test_pruning_has_at_least_an_epoch_between_warm_up_and_cooldown(timeline):
    cooldown = (timeline.epochs - timeline.cooldown_epochs) * timeline.batches
    assert 0 <= timeline.warmup <= cooldown - timeline.batches
    assert timeline.warmup <= timeline.warmup_epochs * timeline.batches + 0.5
    assert 0 <= timeline.pruning_starts < timeline.pruning_ends <= timeline.steps
    assert timeline.pruning_starts == timeline.steps_before(timeline.warmup)
    assert timeline.pruning_ends == timeline.steps_before(cooldown)
    assert timeline.cooldown_epochs or timeline.pruning_ends == timeline.steps


@given(timelines(), st.floats(0, 1), st.floats(0, 1), st.booleans(), st.floats(0, 1))
@settings(deadline=None)
def test_a_second_timeline_gives_the_same_and_rates_stay_in_range(timeline, first, last_factor, cosine, warmup_from):
    numbers = (timeline.epochs, timeline.batches, timeline.accumulate, timeline.warmup_epochs, timeline.cooldown_epochs)
    again = Timeline(*numbers)
    assert again.steps_before(timeline.batches) == timeline.steps_before(timeline.batches)  # asked in another order
    assert ends(again) == ends(timeline)
    assert (again.pruning_starts, again.pruning_ends) == (timeline.pruning_starts, timeline.pruning_ends)
    rates = {"first": first, "last_factor": last_factor, "cosine": cosine, "warmup_from": warmup_from}
    for batch in reversed(range(timeline.epochs * timeline.batches)):
        rate = timeline.learning_rate(batch, **rates)
        assert rate == again.learning_rate(batch, **rates)
        assert -1e-12 <= rate <= max(first, warmup_from) + 1e-12
        momentum = timeline.momentum(batch, full=0.9, warmup_from=0.8)
        assert momentum == again.momentum(batch, full=0.9, warmup_from=0.8)
        assert 0.8 <= momentum <= 0.9


# ---- golden rows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("timeline", "expected", "window"),
    [
        # No warm-up: every third batch, and the fourth because it is the last.
        (Timeline(3, 4, 3, 0), [2, 3, 6, 7, 10, 11], (0, 6)),
        # Warm-up over batches 0 to 3, which want 1, 1.5, 2 and 2.5 batches a step: 1, 2, 2, 2.
        (Timeline(3, 4, 3, 1), [0, 2, 3, 6, 7, 10, 11], (3, 7)),
        (Timeline(3, 4, 3, 1, 1), [0, 2, 3, 6, 7, 10, 11], (3, 5)),
        # With a cooldown of two epochs of three there is no room for a warm-up.
        (Timeline(3, 4, 3, 1, 2), [2, 3, 6, 7, 10, 11], (0, 2)),
        # Warm-up over batches 0 to 2 of 5: wants 1, 1 + 1/3, 1 + 2/3; the step that it ends in has batches 2 and 3.
        (Timeline(2, 5, 2, 0.6), [0, 1, 3, 4, 6, 8, 9], (2, 7)),
        (Timeline(1, 3, 64, 3), [2], (0, 1)),
        (Timeline(2, 1, 4, 1), [0, 1], (1, 2)),
    ],
)
def test_golden_steps(timeline, expected, window):
    assert ends(timeline) == expected
    assert (timeline.pruning_starts, timeline.pruning_ends) == window


@pytest.mark.parametrize(
    ("cosine", "warmup_from", "batch", "expected"),
    [
        # 4 epochs of 4 batches, warm-up in the first two; from 0.1 to 0.01.
        (False, 0.0, 0, 0.0),
        (False, 0.0, 2, 0.1 * 2 / 8),
        (False, 0.0, 6, 0.1 * 0.775 * 6 / 8),
        (False, 0.5, 0, 0.5),
        (False, 0.5, 4, 0.5 + (0.0775 - 0.5) / 2),
        (False, 0.0, 8, 0.055),
        (False, 0.0, 11, 0.055),
        (False, 0.0, 12, 0.0325),
        (False, 0.0, 15, 0.0325),
        (True, 0.0, 0, 0.0),
        (True, 0.0, 4, 0.0868198052 / 2),
        (True, 0.5, 2, 0.5 - 0.4 / 4),
        (True, 0.0, 8, 0.055),
        (True, 0.0, 15, 0.0231801948),
    ],
)
def test_golden_learning_rates(cosine, warmup_from, batch, expected):
    timeline = Timeline(4, 4, 1, 2)
    rate = timeline.learning_rate(batch, first=0.1, last_factor=0.1, cosine=cosine, warmup_from=warmup_from)
    assert rate == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize(
    ("warmup_epochs", "batch", "expected"),
    [(2, 0, 0.8), (2, 2, 0.825), (2, 4, 0.85), (2, 7, 0.8875), (2, 8, 0.9), (2, 15, 0.9), (0, 0, 0.9)],
)
def test_golden_momentum(warmup_epochs, batch, expected):
    assert Timeline(4, 4, 1, warmup_epochs).momentum(batch, full=0.9, warmup_from=0.8) == pytest.approx(expected)


def test_without_a_warm_up_the_first_batch_has_the_full_rate():
    rate = Timeline(4, 4, 1, 0).learning_rate(0, first=0.1, last_factor=0.1, cosine=False, warmup_from=0.5)
    assert rate == pytest.approx(0.1)


# ---- what the user may ask for --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "cooldown", "do_prune", "message"),
    [
        (0, 0, False, r"--epochs: must be at least 1, got 0"),
        (-3, 0, True, r"--epochs: must be at least 1, got -3"),
        (3, -1, True, r"--cooldown_epochs: must not be negative, got -1"),
        (3, 3, True, r"--cooldown_epochs: must be below --epochs 3, got 3; .*"),
        (3, 5, False, r"--cooldown_epochs: must be below --epochs 3, got 5; .*"),
        (3, 1, False, r"--cooldown_epochs: does nothing without --do_prune, got 1; add --do_prune"),
    ],
)
def test_epochs_that_cannot_be(epochs, cooldown, do_prune, message):
    with pytest.raises(BadInput) as caught:
        check_epochs(epochs, cooldown, do_prune)
    assert re.fullmatch(message, str(caught.value))


@pytest.mark.parametrize(("epochs", "cooldown", "do_prune"), [(1, 0, False), (1, 0, True), (3, 2, True)])
def test_epochs_that_can_be(epochs, cooldown, do_prune):
    check_epochs(epochs, cooldown, do_prune)
