"""Events: hand-worked sequences of shares."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vmoe.runtime.settings import StreamSettings
from vmoe.runtime.smoothing import Event, Seen, Smoother

LABELS = ("still", "moving")


def run(
    shares: list[float], *, epochs: list[int] | None = None, **settings: float
) -> tuple[list[Event], list[int | None]]:
    """Give windows of 0.4 s every 0.25 s, with these shares of `moving`; end the stream."""
    plain = {"smooth": 0.0, "threshold": 0.6, "hysteresis": 0.0, "min_event": 0.0}
    smoother = Smoother(LABELS, StreamSettings(**{**plain, **settings}), 2, "x")  # type: ignore[arg-type]
    events: list[Event] = []
    on = []
    for i, share in enumerate(shares):
        t_s = 1 + i * 0.25
        epoch = epochs[i] if epochs else 0
        got = smoother.update(Seen(np.array([0.0, share]), epoch, t_s - 0.4, t_s, 1000 + t_s))
        events += got.events
        on.append(got.event)
    return events + smoother.end(), on


def test_an_event_spans_its_windows() -> None:
    events, on = run([0.1, 0.7, 0.8, 0.1])
    assert [e.kind for e in events] == ["start", "end"]
    end = events[1]
    assert (end.label, end.score, end.windows, end.stream, end.source) == ("moving", 0.8, 2, 2, "x")
    assert (end.t_start_s, end.t_end_s) == (pytest.approx(0.85), 1.5)
    assert (end.t_start, end.t_end) == (pytest.approx(1000.85), 1001.5)
    assert on == [None, 0, 0, None]


def test_shares_are_averaged_over_time() -> None:
    smoother = Smoother(LABELS, StreamSettings(smooth=0.5), 0, "x")
    smoother.update(Seen(np.array([1.0, 0.0]), 0, 0.6, 1.0, 0.0))
    got = smoother.update(Seen(np.array([0.0, 1.0]), 0, 0.8, 1.25, 0.0))
    assert got.label == 0
    assert got.score == pytest.approx(math.exp(-0.5))
    got = smoother.update(Seen(np.array([0.0, 1.0]), 0, 2.6, 3.0, 0.0))
    assert (got.label, got.score) == (1, pytest.approx(1 - math.exp(-4)))


def test_hysteresis_keeps_an_event_through_a_dip() -> None:
    shares = [0.7, 0.55, 0.7, 0.45]
    assert [e.kind for e in run(shares)[0]] == ["start", "end", "start", "end"]
    assert [e.kind for e in run(shares, hysteresis=0.1)[0]] == ["start", "end"]
    assert run(shares, hysteresis=0.1)[1] == [0, 0, 0, None]


def test_another_label_must_be_ahead_by_the_hysteresis() -> None:
    smoother = Smoother(LABELS, StreamSettings(smooth=0, threshold=0.4, hysteresis=0.2,
                                               min_event=0), 0, "x")  # fmt: skip
    told = []
    for i, share in enumerate([0.3, 0.55, 0.7]):
        told += smoother.update(Seen(np.array([1 - share, share]), 0, i * 1.0, i + 0.4, 0.0)).events
    assert [(e.kind, e.label) for e in told] == [
        ("start", "still"),
        ("update", "still"),
        ("end", "still"),
        ("start", "moving"),
    ]


def test_what_is_too_short_is_no_event() -> None:
    events, on = run([0.7, 0.7, 0.1, 0.7, 0.7, 0.7, 0.1], min_event=0.5)
    assert [(e.kind, e.id) for e in events] == [("start", 0), ("end", 0)]
    assert events[0].t_start_s == pytest.approx(1.35)  # its first window, not the one that told
    assert on == [None] * 5 + [0, None]


def test_updates_come_once_a_second() -> None:
    assert [e.kind for e in run([0.7] * 10)[0]] == ["start", "update", "update", "end"]


def test_no_event_spans_a_break() -> None:
    events, _ = run([0.7] * 4, epochs=[0, 0, 1, 1])
    assert [(e.kind, e.id) for e in events] == [("start", 0), ("end", 0), ("start", 1), ("end", 1)]
    assert events[1].t_end_s == 1.25
    assert events[0].to_json().keys() >= {"event", "id", "t_start_s", "t_end_s", "windows"}
