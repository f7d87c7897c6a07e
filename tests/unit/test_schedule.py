"""How far a training is, and where it ends."""

from __future__ import annotations

import logging

import pytest

from tests.twins import small
from vmoe.train import schedule
from vmoe.train.loop import LoopSettings, start
from vmoe.train.schedule import TERA, Course
from vmoe.train.state import State


@pytest.fixture
def state() -> State:
    return start(small(), LoopSettings())


def walk(course: Course, name: str, flops: float) -> int:
    """Walk over the clips of an epoch, ten at a time; return over how many."""
    walked = 0
    while walked < course.clips and not course.stops(name):
        clips = min(10, course.clips - walked)
        course.spend(name, flops, clips)
        walked += clips
    return walked


def test_rate_rises_then_falls_to_nothing() -> None:
    assert schedule.rate(0.0, 0.1) == pytest.approx(0.02)
    assert schedule.rate(0.1, 0.1) == pytest.approx(1.0)
    assert schedule.rate(0.55, 0.1) == pytest.approx(0.5)
    assert schedule.rate(1.0, 0.1) == pytest.approx(0.0)
    assert schedule.rate(0.9, 0.1, "constant") == 1.0


def test_epochs_end_a_training_without_a_budget(state: State) -> None:
    course = Course(2, 0.0, state)
    course.begin(100, ["a", "b"])
    assert course.clips == 100
    walk(course, "a", 1e12)
    assert course.done == pytest.approx(0.25)  # one of two walks of one of two epochs
    course.end()
    state.epoch = 2
    assert course.over
    assert course.done == 1.0


def test_the_last_epoch_is_cut_to_what_the_budget_pays_for(state: State) -> None:
    course = Course(1, 2.5, state)  # TFLOPs; the epochs do not count
    for expected in (100, 100, 50):
        course.begin(100, ["router", "whole"])
        assert course.clips == expected
        assert walk(course, "router", 0.002 * TERA) == expected  # each epoch costs 1 TFLOP
        assert walk(course, "whole", 0.008 * TERA) == expected
        course.end()
        state.epoch += 1
    assert course.over
    assert state.tflops == pytest.approx(2.5)
    assert course.done == 1.0


def test_a_budget_that_ends_within_an_unknown_walk_is_kept_and_said(
    state: State, caplog: pytest.LogCaptureFixture
) -> None:
    course = Course(1, 0.5, state)
    course.begin(100, ["whole"])
    with caplog.at_level(logging.WARNING, "vmoe"):
        assert walk(course, "whole", 0.01 * TERA) == 50
    assert "the budget ends within the walk 'whole'" in caplog.text
    assert "fewer --clips" in caplog.text
    course.end()
    assert course.over


def test_a_budget_goes_on_where_a_state_stands(state: State) -> None:
    state.tflops, state.costs, state.epoch = 2.0, {"whole": 0.01 * TERA}, 7
    course = Course(1, 2.3, state)
    assert not course.over
    course.begin(100, ["whole"])
    assert course.clips == 30
