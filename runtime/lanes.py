"""One stream's way through the pipeline: its source, its windows, its queues and its counts.

    capture thread      owns the source; live: never waits for anybody
    windows thread      prepares frames, makes windows

What they make waits for the engine, and what that makes for the sinks, in queues of the stream's
own: a stream that is slow, lost or far ahead fills and empties its own alone.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from . import results
from .engine import Engine, Prediction
from .frames import BLOCK, LATEST, Frame, Handover, Stop
from .guard import ABSTAIN, VOTE, Guard
from .online import Follower, OnlineWindows, is_online
from .results import Result
from .settings import AUTO, StreamSettings
from .sinks import Step
from .smoothing import Seen, Smoother
from .sources import Source
from .tally import Tally
from .windows import Window, Windows

FRAMES = 8  # that wait to be prepared; of a live source two, so that they are fresh
LIVE_FRAMES = 2
WAITING = 16  # steps that wait for the engine, and for the sinks


@dataclass(frozen=True)
class Work:
    """A frame on its way to the engine, and the window that ends with it."""

    frame: Frame | None
    window: Window | None


class Lane:
    """One stream of a pipeline.

    Attributes:
        number: of the stream, from 0.
        source: where it comes from.
        tally: what has been counted so far.
        work: what waits for the engine.
        steps: what waits for the sinks.
        follower: of a bundle in the online form, which runs this stream's windows; else None.
    """

    def __init__(
        self,
        number: int,
        source: Source,
        engine: Engine,
        settings: StreamSettings,
        stop: Stop,
        changed: threading.Condition,
        guard: Guard | None = None,
    ) -> None:
        """Take the stream's number and source; nothing is opened yet."""
        self.number, self.source = number, source
        self.tally = Tally()
        self._settings, self._engine = settings, engine
        self._stop = Stop(stop)
        online = is_online(engine.bundle)
        self.follower = Follower(engine) if online else None
        windows = OnlineWindows if online else Windows
        self.windows: Windows = windows(
            engine.bundle.spec, source.name, hop_s=settings.hop, sampling=settings.sampling
        )
        self._guard = guard
        self._smoother = Smoother(engine.bundle.labels, settings, number, source.name)
        self.keep_frames = False
        self._frames: Handover[Frame] = Handover(
            LIVE_FRAMES if source.live else FRAMES, policy=self._policy
        )
        self.work: Handover[Work] = Handover(
            WAITING,
            policy=self._policy,
            precious=lambda work: work.window is not None,
            on_drop=self._work_dropped,
            changed=changed,
        )
        self.steps: Handover[Step] = Handover(
            WAITING,
            policy=self._policy,
            precious=lambda step: step.result is not None or bool(step.events),
            on_drop=self._step_dropped,
            changed=changed,
        )

    def _policy(self) -> str:
        """Return what a full queue does: whether a source is live may turn out as it opens."""
        if self._settings.buffer != AUTO:
            return self._settings.buffer
        return LATEST if self.source.live else BLOCK

    def threads(self) -> list[threading.Thread]:
        """Return the stream's two threads, not yet started."""
        return [
            self._thread("capture", self._capture, self._frames.end),
            self._thread("windows", self._make_windows, self._windows_ended),
        ]

    def _thread(
        self, name: str, body: Callable[[], None], ended: Callable[[BaseException | None], None]
    ) -> threading.Thread:
        """Make a stage's thread: whatever ends it, its neighbours learn of it."""

        def run() -> None:
            error: BaseException | None = None
            try:
                body()
            except BaseException as e:
                error = e
            finally:
                ended(error)

        return threading.Thread(target=run, name=f"vmoe-{name}-{self.number}", daemon=True)

    def _windows_ended(self, error: BaseException | None) -> None:
        self._frames.abandon()
        self.windows.release()
        self.work.end(error)

    def abandon(self) -> None:
        """Let go of everybody who waits for the stream."""
        for queue in (self._frames, self.work, self.steps):
            queue.abandon()

    def _capture(self) -> None:
        """Read the source from open to release, in one thread."""
        first_s: float | None = None
        limit_s = self._settings.duration
        with contextlib.closing(self.source.frames(self._stop)) as frames:
            for frame in frames:
                if first_s is None:
                    first_s = frame.t_s
                    self.tally.begin(frame.arrived_s)
                    if limit_s is not None and self.source.live:
                        self._stop.ask_at(time.monotonic() + limit_s)
                self.tally.stream_s = frame.t_s - first_s
                if limit_s is not None and frame.t_s - first_s >= limit_s:
                    return
                if not self._frames.put(frame):
                    return

    def _make_windows(self) -> None:
        windows, tally = self.windows, self.tally
        for frame in self._frames:
            before = windows.duplicated
            window = windows.push(frame)
            tally.frames, tally.frames_dropped = windows.frames, windows.dropped
            tally.frames_duplicated = windows.duplicated
            tally.frames_late = windows.late if self.source.live else 0
            tally.windows_incomplete = windows.incomplete
            tally.epochs = windows.epoch + 1
            kept = self.keep_frames and windows.duplicated == before
            if kept or window is not None:
                self.work.put(Work(replace(frame, epoch=windows.epoch) if kept else None, window))
        windows.end()

    def is_stale(self, window: Window) -> bool:
        """Return whether a window is too old to be labelled."""
        limit_s = self._settings.max_staleness
        old = limit_s is not None and time.monotonic() - window.arrived_s > limit_s
        return old and self.source.live

    def follow(self, window: Window) -> Prediction:
        """Answer a window frame by frame, where the bundle is of the online form."""
        assert self.follower is not None
        prediction = self.follower.infer(window)
        self.tally.frames_run = self.follower.frames
        self.tally.warm_ups = self.follower.warm_ups
        return prediction

    def hand_on(
        self,
        work: Work,
        prediction: Prediction | None,
        began_s: float,
        ended_s: float,
        filtered: NDArray[np.float32] | None = None,
    ) -> None:
        """Make the result of a window and hand the step to the sinks.

        Args:
            work: the frame and the window.
            prediction: of the window alone (N = 1); None where it was too old to be labelled.
            began_s: when the engine began, on `time.monotonic`'s clock.
            ended_s: when the label was there.
            filtered: logits of the filtered clip, [1, K], where the guard wants them.
        """
        if work.window is None or prediction is None:
            self.tally.windows_dropped += work.window is not None
            if work.frame is not None:
                self.steps.put(Step(work.frame, None, self.source.fps, self.number))
            return
        result = results.make(
            work.window,
            prediction,
            self._engine.bundle.labels,
            self.source.name,
            stream=self.number,
            top=self._settings.top,
            began_s=began_s,
            ended_s=ended_s,
            virtual=getattr(self.source, "virtual", False),
        )
        shares = results.softmax(prediction.logits[0])
        if self._guard is not None:
            result, shares = self._guarded(self._guard, work.window, result, shares, filtered)
            if result.guard is not None and result.guard.acted == VOTE:
                result = results.later(result, time.monotonic() - ended_s)
        seen = Seen(shares, result.epoch, result.t_first_s, result.t_s, result.t_capture)
        smoothed = self._smoother.update(seen)
        result = replace(
            result,
            smooth_label=self._engine.bundle.labels[smoothed.label],
            smooth_score=smoothed.score,
            event=smoothed.event,
        )
        self.steps.put(
            Step(work.frame, result, self.source.fps, self.number, tuple(smoothed.events))
        )

    def _guarded(
        self,
        guard: Guard,
        window: Window,
        result: Result,
        shares: NDArray[np.float64],
        filtered: NDArray[np.float32] | None,
    ) -> tuple[Result, NDArray[np.float64]]:
        """Let the guard judge a window, and act; return the result and the shares that count."""
        verdict = guard.judge(
            shares,
            np.array(result.weights),
            result.expert,
            epoch=result.epoch,
            t_first_s=result.t_first_s,
            t_s=result.t_s,
            age_s=result.age_ms / 1000 if self.source.live else 0.0,  # files wait in queues
            filtered=None if filtered is None else results.softmax(filtered[0]),
        )
        self.tally.alarms += verdict.alarm
        result = replace(result, guard=verdict)
        if verdict.acted == ABSTAIN:
            return replace(result, label=results.ABSTAINED, score=0.0), np.zeros_like(shares)
        if verdict.acted == VOTE:
            logits = self._engine.run_all(window.clip[np.newaxis])[0]
            shares = np.mean([results.softmax(one) for one in logits], axis=0)
            top = results.listed(shares, self._engine.bundle.labels, self._settings.top)
            return replace(result, label=top[0][0], score=top[0][1], top=top), shares
        return result, shares

    def end(self) -> None:
        """Say, once everything was labelled, that the stream ends; events end with it."""
        events = self._smoother.end()
        if events:
            self.steps.put(Step(None, None, self.source.fps, self.number, tuple(events)))
        self.steps.end(self.work.error)

    def _work_dropped(self, work: Work) -> None:
        self.tally.windows_dropped += work.window is not None
        self.tally.frames_unseen += work.frame is not None

    def _step_dropped(self, step: Step) -> None:
        self.tally.results_dropped += step.result is not None
        self.tally.frames_unseen += step.frame is not None
