"""source -> windows -> engine -> sinks: a thread each, bounded queues between them.

    capture thread      owns the source; live: never waits for anybody
    windows thread      prepares frames, makes windows
    engine thread       labels windows
    the caller's thread takes results, feeds the sinks; signals arrive here

Of a live source the newest frame wins at every queue, and every drop is counted; of a file
nothing is dropped, and the slowest stage sets the pace. An error of a stage travels down the
queues in order: what came before it is still served, then it is raised to the caller, and all
threads end.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vmoe.errors import SettingError

from . import results, sources
from .engine import Engine
from .frames import Frame, Handover, Stop
from .online import Follower, OnlineWindows, is_online
from .results import Result
from .sinks import Sink, Step
from .sources import Source, SourceSettings
from .tally import Tally
from .windows import EXACT, Window, Windows

log = logging.getLogger("vmoe")

LIVE_FRAMES, FILE_FRAMES = 2, 8  # frames that wait to be prepared
WAITING = 16  # steps that wait for the engine, and for the sinks
JOIN_S = 10.0  # how long a thread may take to let go of a device that does not answer


@dataclass(frozen=True)
class _Work:
    """A frame on its way to the engine, and the window that ends with it."""

    frame: Frame | None
    window: Window | None


def watch(
    engine: Engine,
    source: str | Path | Source,
    *,
    hop_s: float | None = None,
    sampling: str = EXACT,
    top: int = 3,
    duration_s: float | None = None,
    sinks: Sequence[Sink] = (),
    settings: SourceSettings | None = None,
    stop: Stop | None = None,
) -> Generator[Result, None, None]:
    """Label a stream: yield one result for each of its windows, in order.

    Args:
        engine: a loaded bundle.
        source: a video file, a camera's number, `test`, or an open `Source`.
        hop_s: time between two windows, in seconds; None is half a window, of a bundle in the
            online form one frame.
        sampling: `exact`, or `nearest` for sources slower than the model wants.
        top: how many labels a result lists.
        duration_s: stop after so much of the stream, in seconds; None is its end.
        sinks: what else takes every step, such as `sinks.video.open(...)`.
        settings: how a source that is named is read.
        stop: ends the stream from another thread or a signal handler.

    Raises:
        SourceError: it cannot be opened, is too slow, breaks off, or was lost; raised after the
            last result that it gave.
    """
    opened = sources.open(str(source), settings) if isinstance(source, (str, Path)) else source
    pipeline = Pipeline(
        engine, opened, hop_s=hop_s, sampling=sampling, top=top, duration_s=duration_s, stop=stop
    )
    return pipeline.results(sinks)


class Pipeline:
    """One run of one source through an engine; `watch` is the short way.

    Attributes:
        tally: what has been counted so far.
        stop: ends the run when asked.
        hop_s: time between two windows, in seconds.
        online: whether the bundle follows the stream frame by frame.
    """

    def __init__(
        self,
        engine: Engine,
        source: Source,
        *,
        hop_s: float | None = None,
        sampling: str = EXACT,
        top: int = 3,
        duration_s: float | None = None,
        stop: Stop | None = None,
    ) -> None:
        """Take the arguments of `watch`; nothing is opened yet."""
        if top < 1:
            raise SettingError(f"--top is {top}; it must be at least 1.")
        self.tally = Tally()
        self.stop = stop or Stop()
        self._engine, self._source = engine, source
        self._top, self._duration_s = top, duration_s
        self.online = is_online(engine.bundle)
        self._follower = Follower(engine) if self.online else None
        windows = OnlineWindows if self.online else Windows
        self._windows = windows(engine.bundle.spec, source.name, hop_s=hop_s, sampling=sampling)
        self.hop_s = self._windows.hop_s
        live = source.live
        self._frames: Handover[Frame] = Handover(
            LIVE_FRAMES if live else FILE_FRAMES, newest_wins=live
        )
        self._work: Handover[_Work] = Handover(
            WAITING,
            newest_wins=live,
            precious=lambda work: work.window is not None,
            on_drop=self._work_dropped,
        )
        self._steps: Handover[Step] = Handover(
            WAITING,
            newest_wins=live,
            precious=lambda step: step.result is not None,
            on_drop=self._step_dropped,
        )
        self._keep_frames = False

    def results(self, sinks: Sequence[Sink] = ()) -> Generator[Result, None, None]:
        """Run; feed the sinks; yield the results. May be called once."""
        self._keep_frames = any(sink.wants_frames for sink in sinks)
        threads = [
            self._thread("capture", self._capture, None, self._frames),
            self._thread("windows", self._make_windows, self._frames, self._work),
            self._thread("engine", self._infer, self._work, self._steps),
        ]
        with contextlib.ExitStack() as stack:
            for sink in sinks:
                stack.enter_context(sink)
            stack.callback(self._end, threads)  # threads end before the sinks are closed
            for thread in threads:
                thread.start()
            for step in self._steps:
                for sink in sinks:
                    sink.take(step)
                if step.result is not None:
                    self.tally.add(step.result)
                    yield step.result

    def _thread(
        self,
        name: str,
        body: Callable[[], None],
        before: Handover[Frame] | Handover[_Work] | None,
        after: Handover[Frame] | Handover[_Work] | Handover[Step],
    ) -> threading.Thread:
        """Make a stage's thread: whatever ends it, its neighbours learn of it."""

        def run() -> None:
            error: BaseException | None = None
            try:
                body()
            except BaseException as e:
                error = e
            finally:
                if before is not None:
                    before.abandon()
                after.end(error)

        return threading.Thread(target=run, name=f"vmoe-{name}", daemon=True)

    def _end(self, threads: list[threading.Thread]) -> None:
        self.stop.ask()
        for queue in (self._frames, self._work, self._steps):
            queue.abandon()
        for thread in threads:
            thread.join(JOIN_S)
            if thread.is_alive():
                log.warning("%s does not end; its device does not answer.", thread.name)

    def _capture(self) -> None:
        """Read the source from open to release, in one thread."""
        first_s: float | None = None
        limit_s = self._duration_s
        with contextlib.closing(self._source.frames(self.stop)) as frames:
            for frame in frames:
                if first_s is None:
                    first_s = frame.t_s
                    if limit_s is not None and self._source.live:
                        self.stop.ask_at(time.monotonic() + limit_s)
                self.tally.stream_s = frame.t_s - first_s
                if limit_s is not None and frame.t_s - first_s >= limit_s:
                    return
                if not self._frames.put(frame):
                    return

    def _make_windows(self) -> None:
        windows, tally = self._windows, self.tally
        for frame in self._frames:
            window = windows.push(frame)
            tally.frames, tally.frames_dropped = windows.frames, windows.dropped
            tally.windows_incomplete = windows.incomplete
            tally.epochs = windows.epoch + 1
            if self._keep_frames or window is not None:
                kept = replace(frame, epoch=windows.epoch) if self._keep_frames else None
                self._work.put(_Work(kept, window))
        windows.end()

    def _infer(self) -> None:
        if self._source.live:
            self._engine.load_parts()  # else a first visit to an expert would cost a live window
        for work in self._work:
            result = None if work.window is None else self._label(work.window)
            self._steps.put(Step(work.frame, result, self._source.fps))

    def _label(self, window: Window) -> Result:
        began = time.monotonic()
        if self._follower is None:
            prediction = self._engine.infer(window.clip[np.newaxis])
        else:
            prediction = self._follower.infer(window)
            self.tally.frames_run = self._follower.frames
            self.tally.warm_ups = self._follower.warm_ups
        return results.make(
            window,
            prediction,
            self._engine.bundle.labels,
            self._source.name,
            top=self._top,
            began_s=began,
            ended_s=time.monotonic(),
        )

    def _work_dropped(self, work: _Work) -> None:
        self.tally.windows_dropped += work.window is not None
        self.tally.frames_unseen += work.frame is not None

    def _step_dropped(self, step: Step) -> None:
        self.tally.results_dropped += step.result is not None
        self.tally.frames_unseen += step.frame is not None
