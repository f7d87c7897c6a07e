"""Windows of many streams into runs of the engine: one thread, which no stream can hold up.

Every round takes what is due of every stream, at most one window of each, and runs the windows as
one batch: the router once, then each expert once on the windows that were routed to it. While
the engine runs, others become due; so batches grow with the load, and at one stream every window
runs alone. A stream whose results nobody takes is passed over until there is room.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vmoe.clips import Clips
from vmoe.errors import ServerError

from .engine import Engine, Prediction
from .frames import POLL_S, Stop
from .guard import terms
from .lanes import Lane, Work
from .settings import StreamSettings
from .sources import RUNNING

AT_ONCE = 64  # steps of one stream in one round


class Batches:
    """The engine's thread."""

    def __init__(
        self,
        engine: Engine,
        lanes: Sequence[Lane],
        settings: StreamSettings,
        stop: Stop,
        changed: threading.Condition,
        filter: str = "off",
    ) -> None:
        """Take the streams, and the filter of the guard's second look.

        All of the streams' queues notify `changed`.
        """
        self._engine, self._lanes, self._stop = engine, lanes, stop
        self._budget_s = settings.latency_budget / 1000
        self._most, self._changed = settings.max_batch, changed
        self._first = 0  # the stream that is asked first; it goes round
        self._open = list(lanes)
        self._filter = filter
        self._online = any(lane.follower is not None for lane in lanes)
        self.error: BaseException | None = None

    def run(self) -> None:
        """Label windows until every stream has ended."""
        try:
            if any(lane.source.live for lane in self._lanes):
                self._engine.load_parts()  # else a first visit to an expert costs live windows
            while (due := self._due()) is not None:
                self._label(due)
        except ServerError as e:
            if not self._stop.asked():  # who ends the run does not wait for a server
                self.error = e
        except BaseException as e:
            self.error = e
        finally:
            for lane in self._lanes:
                lane.work.abandon()
                lane.steps.end()

    def _due(self) -> list[tuple[Lane, Work]] | None:
        """Wait for work; return it in order, at most one window of each stream; None at the end."""
        with self._changed:
            while True:
                self._close_ended()
                if not self._open:
                    return None
                wait_s = self._worth_waiting_s()
                due = self._taken(windows=0 if wait_s else self._most)
                if due:
                    return due
                self._changed.wait(wait_s or POLL_S)

    def _taken(self, *, windows: int) -> list[tuple[Lane, Work]]:
        """Take what is there, with at most so many windows; another stream is first each time."""
        self._first = (self._first + 1) % len(self._open)
        taken: list[tuple[Lane, Work]] = []
        for lane in [*self._open[self._first :], *self._open[: self._first]]:
            for _ in range(min(lane.steps.room(), AT_ONCE)):
                work = lane.work.first()
                if work is None or (work.window is not None and not windows):
                    break
                lane.work.take()
                taken.append((lane, work))
                if work.window is not None and not lane.is_stale(work.window):
                    windows -= 1
                    break
        return taken

    def _close_ended(self) -> None:
        """Tell the sinks of streams that have ended."""
        for lane in [lane for lane in self._open if lane.work.done]:
            lane.end()
            self._open.remove(lane)

    def _worth_waiting_s(self) -> float:
        """Return how long the windows that are due may still wait for those of other streams."""
        firsts = [lane.work.first() for lane in self._open]
        due = [work.window for work in firsts if work is not None and work.window is not None]
        running = sum(lane.source.state == RUNNING for lane in self._open)  # others give nothing
        enough = len(due) >= min(self._most, running)
        if not (self._budget_s and due) or enough or self._stop.asked():
            return 0.0
        oldest_s = min(window.arrived_s for window in due)
        return max(0.0, oldest_s + self._budget_s - time.monotonic())

    def _label(self, due: list[tuple[Lane, Work]]) -> None:
        """Run the windows as one batch; hand every step on, in order."""
        began = time.monotonic()
        fresh = [w.window for lane, w in due if w.window and not lane.is_stale(w.window)]
        whole = [window for window in fresh if not self._online]
        answers: dict[int, Prediction] = {}
        filtered: dict[int, NDArray[np.float32]] = {}
        if whole:
            clips = stacked([window.clip for window in whole])
            found = self._engine.infer(clips)
            for i, window in enumerate(whole):
                one = slice(i, i + 1)
                answers[id(window)] = Prediction(
                    found.logits[one], found.scores[one], found.route[one]
                )
            if self._filter != "off":
                again = terms.filtered(clips, self._filter)
                logits = self._engine.expert_logits(again, found.route.tolist())
                filtered = {id(w): logits[i : i + 1] for i, w in enumerate(whole)}
        ended = time.monotonic()
        alive = {id(window) for window in fresh}
        for lane, work in due:
            if work.window is not None and self._online and id(work.window) in alive:
                answers[id(work.window)] = lane.follow(work.window)
                ended = time.monotonic()
            key = id(work.window)
            lane.hand_on(work, answers.get(key), began, ended, filtered.get(key))


def stacked(clips: Sequence[NDArray[np.uint8]]) -> Clips:
    """Return clips, each uint8 [T, H, W, 3], as one batch; one alone is not copied."""
    return clips[0][np.newaxis] if len(clips) == 1 else np.stack(clips)
