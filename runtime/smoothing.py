"""Labels of windows into events: averaged, with hysteresis, and of a minimum duration.

    p_n = p_(n-1) + (1 - exp(-dt / smooth)) (s_n - p_(n-1))      s_n: the window's shares

A label begins an event where p reaches the threshold, and has held for `min_event`. It ends where
p falls below threshold - hysteresis, or where another label that reaches the threshold is ahead
by more than the hysteresis; and with its epoch: no event spans a break of the stream.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .settings import StreamSettings

START, UPDATE, END = "start", "update", "end"
UPDATE_S = 1.0  # between two updates of one event
TINY = 1e-9


@dataclass(frozen=True)
class Event:
    """What a label did over a span of time.

    Attributes:
        kind: start, update (once a second) or end.
        id: the event's number in its stream, from 0; the same in its start, updates and end.
        stream: the number of the stream.
        source: the source's name.
        label: which.
        score: the highest averaged share so far, in [0, 1].
        t_start_s: first frame of its first window, on the source's own clock, in seconds.
        t_end_s: last frame of its last window so far.
        t_start: when the first frame was there, in seconds since 1970.
        t_end: when the last frame so far was there.
        windows: how many of them so far.
    """

    kind: str
    id: int
    stream: int
    source: str
    label: str
    score: float
    t_start_s: float
    t_end_s: float
    t_start: float
    t_end: float
    windows: int

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return {
            "event": self.kind,
            "id": self.id,
            "stream": self.stream,
            "source": self.source,
            "label": self.label,
            "score": round(self.score, 6),
            "t_start_s": round(self.t_start_s, 6),
            "t_end_s": round(self.t_end_s, 6),
            "t_start": round(self.t_start, 6),
            "t_end": round(self.t_end, 6),
            "windows": self.windows,
        }


class Seen(NamedTuple):
    """What is taken of one window: its shares, [K], epoch and times as `Result` has them."""

    shares: NDArray[np.float64]
    epoch: int
    t_first_s: float
    t_s: float
    t_capture: float


class Smoothed(NamedTuple):
    """What a window leads to.

    Attributes:
        label: the index of the label with the highest averaged share.
        score: that share.
        event: the id of the event that goes on; None where none does.
        events: what began, goes on or ended with this window.
    """

    label: int
    score: float
    event: int | None
    events: tuple[Event, ...]


class Smoother:
    """Takes the windows of one stream, in order, and gives its events."""

    def __init__(
        self, labels: tuple[str, ...], settings: StreamSettings, stream: int, source: str
    ) -> None:
        """Take the K labels, and how they are smoothed."""
        self._labels, self._settings = labels, settings
        self._stream, self._source = stream, source
        self._averaged: NDArray[np.float64] | None = None
        self._last: Seen | None = None
        self._current: int | None = None  # the label that holds
        self._held_s = 0.0  # since when, by the ends of windows
        self._event: Event | None = None  # of that label; its kind tells whether it was told
        self._told_s: float | None = None
        self._made = 0

    def update(self, seen: Seen) -> Smoothed:
        """Take the next window."""
        events: list[Event] = []
        if self._last is not None and seen.epoch != self._last.epoch:
            events += self.end()
        self._average(seen)
        assert self._averaged is not None
        if self._leaves():
            events += self._close()
        best = int(self._averaged.argmax())
        if self._current is None and self._averaged[best] >= self._settings.threshold - TINY:
            self._begin(best, seen)
        events += self._go_on(seen)
        self._last = seen
        told = self._event.id if self._event is not None and self._told_s is not None else None
        return Smoothed(best, float(self._averaged[best]), told, tuple(events))

    def end(self) -> list[Event]:
        """Say that the epoch, or the stream, ends here."""
        self._averaged = None
        return self._close()

    def _average(self, seen: Seen) -> None:
        if self._averaged is None or self._last is None or self._settings.smooth == 0:
            self._averaged = seen.shares
            return
        share = 1 - math.exp(-max(0.0, seen.t_s - self._last.t_s) / self._settings.smooth)
        self._averaged = self._averaged + share * (seen.shares - self._averaged)

    def _leaves(self) -> bool:
        """Return whether the label that holds does so no longer."""
        if self._current is None or self._averaged is None:
            return False
        own, best = self._averaged[self._current], self._averaged.max()
        threshold, hysteresis = self._settings.threshold, self._settings.hysteresis
        overtaken = best >= threshold - TINY and best > own + hysteresis + TINY
        return bool(own < threshold - hysteresis - TINY or overtaken)

    def _begin(self, label: int, seen: Seen) -> None:
        self._current, self._held_s, self._told_s = label, seen.t_s, None
        self._event = Event(
            START, self._made, self._stream, self._source, self._labels[label], 0.0,
            seen.t_first_s, seen.t_s, seen.t_capture - (seen.t_s - seen.t_first_s),
            seen.t_capture, 0,
        )  # fmt: skip

    def _go_on(self, seen: Seen) -> list[Event]:
        """Add a window to the event that is on; tell its start, or an update, where it is time."""
        if self._event is None or self._current is None or self._averaged is None:
            return []
        score = max(self._event.score, float(self._averaged[self._current]))
        self._event = replace(
            self._event, score=score, t_end_s=seen.t_s, t_end=seen.t_capture,
            windows=self._event.windows + 1,
        )  # fmt: skip
        if self._told_s is None:
            if seen.t_s - self._held_s < self._settings.min_event - TINY:
                return []
            self._told_s, self._made = seen.t_s, self._made + 1
            return [self._event]
        if seen.t_s - self._told_s < UPDATE_S - TINY:
            return []
        self._told_s = seen.t_s
        return [replace(self._event, kind=UPDATE)]

    def _close(self) -> list[Event]:
        """End the event that is on; one that was too short was none."""
        event, told = self._event, self._told_s is not None
        self._event = self._current = self._told_s = None
        return [replace(event, kind=END)] if event is not None and told else []
