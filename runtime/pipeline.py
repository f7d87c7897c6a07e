"""sources -> windows -> engine -> sinks: threads with bounded queues between them.

    two threads a stream     its source and its windows (lanes.py)
    engine thread            labels windows of all streams, batched (batches.py)
    the caller's thread      takes results, feeds the sinks; signals arrive here

Of a live source the newest frame wins at every queue, and every drop is counted; of a file
nothing is dropped, and the slowest stage sets the pace. A stream that is lost ends alone: what
came before is still served, and when all streams have ended, the loss is raised to the caller.
Any other error ends everything.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

from vmoe.errors import OutputError, SettingError, SourceError

from . import sources
from .batches import Batches
from .engine import Engine
from .frames import POLL_S, Stop
from .guard import CALIBRATE, ENFORCE, MONITOR, OFF, Guard
from .guard import profile as profiles
from .guard.profile import Profile
from .lanes import Lane
from .online import is_online
from .results import Result
from .settings import StreamSettings
from .sinks import Sink, Step, Watching
from .sinks._kept import Kept
from .sources import Source, SourceSettings
from .tally import Tally
from .threads import serving
from .windows import EXACT

log = logging.getLogger("vmoe")

JOIN_S = 10.0  # how long a thread may take to let go of a device that does not answer


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
    """Label one stream: yield one result for each of its windows, in order.

    `Stream` (runtime/stream.py) is the same for several streams, with all settings.

    Args:
        engine: a loaded bundle.
        source: what `sources.open` takes, or an open `Source`.
        hop_s: time between two windows, in seconds; None is half of a window's frames, of a
            bundle in the online form one.
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
    how = StreamSettings(hop=hop_s, sampling=sampling, top=top, duration=duration_s)
    return Pipeline(engine, [opened], how, stop=stop).results(sinks)


def _profile(engine: Engine, settings: StreamSettings) -> Profile:
    return profiles.read(settings.guard_profile or engine.bundle.path / profiles.FILE)


class Pipeline:
    """One run of some sources through an engine; `watch` and `Stream` are the short ways.

    Attributes:
        stop: ends the run when asked.
        lanes: the streams, in the order of the sources.
        hop_s: time between two windows, in seconds.
        online: whether the bundle follows the streams frame by frame.
        labels: of the bundle.
        experts: how many it has.
        guard_mode: off, monitor or enforce.
        sinks: as they run, with their failures.
    """

    def __init__(
        self,
        engine: Engine,
        sources: Sequence[Source],
        settings: StreamSettings | None = None,
        *,
        stop: Stop | None = None,
        calibrate: str | None = None,
    ) -> None:
        """Take the engine, at least one source, and how they are served; nothing is opened yet.

        Args:
            engine: a loaded bundle.
            sources: at least one.
            settings: how they are served.
            stop: ends the run when asked.
            calibrate: gather the guard's terms for a profile (guard/calibration.py), with this
                filter: off, median, jpeg or bilateral.

        Raises:
            SettingError: settings that do not fit, no profile for the guard, or one with a filter
                for a bundle in the online form.
        """
        if not sources:
            raise SettingError("no source is given; name at least one.")
        settings = settings or StreamSettings()
        self.stop = stop or Stop()
        self.online = is_online(engine.bundle)
        self._changed = threading.Condition()
        self.labels, self.experts = engine.bundle.labels, engine.bundle.experts
        self.guard_mode = CALIBRATE if calibrate is not None else settings.guard
        profile = _profile(engine, settings) if self.guard_mode in (MONITOR, ENFORCE) else None
        self.lanes = [
            Lane(
                number,
                source,
                engine,
                settings,
                self.stop,
                self._changed,
                self._guard(settings, profile),
            )
            for number, source in enumerate(sources)
        ]
        self.hop_s = self.lanes[0].windows.hop_s
        self._engine = engine
        if profile is not None:
            profile.check(engine.bundle, self.hop_s)
        filter = profile.filter if profile is not None else calibrate or "off"
        if filter != "off" and self.online:
            raise SettingError(
                f"the guard's filter is {filter}; a bundle in the online form runs no clip whole, "
                "so there is no second look. Calibrate with --guard-filter off."
            )
        self._batches = Batches(engine, self.lanes, settings, self.stop, self._changed, filter)
        self.sinks: list[Kept] = []

    def _guard(self, settings: StreamSettings, profile: Profile | None) -> Guard | None:
        if self.guard_mode == OFF:
            return None
        return Guard(
            self.guard_mode,
            profile,
            on_alarm=settings.on_alarm,
            vote_share=settings.vote_share,
            experts=self.experts,
        )

    @property
    def retries(self) -> int:
        """How many requests were repeated, because the server that runs the bundle was away."""
        return self._engine.retries

    @property
    def tally(self) -> Tally:
        """What has been counted so far, of all streams together."""
        return Tally.total([lane.tally for lane in self.lanes])

    def results(self, sinks: Sequence[Sink] = ()) -> Generator[Result, None, None]:
        """Run; feed the sinks; yield the results. May be called once.

        Raises:
            SourceError: a source was lost or refused; after all streams have ended.
            OutputError: a sink missed results; after all streams have ended.
        """
        self.sinks = [Kept(sink) for sink in sinks]
        for sink in sinks:
            if isinstance(sink, Watching):
                sink.watches(self)
        for lane in self.lanes:
            lane.keep_frames = any(sink.wants_frames for sink in sinks)
        threads = [thread for lane in self.lanes for thread in lane.threads()]
        threads.append(threading.Thread(target=self._batches.run, name="vmoe-engine", daemon=True))
        with contextlib.ExitStack() as stack:
            stack.enter_context(serving())
            for sink in self.sinks:
                stack.enter_context(sink)
            stack.callback(self._end, threads)  # threads end before the sinks are closed
            for thread in threads:
                thread.start()
            for lane, step in self._steps():
                for sink in self.sinks:
                    sink.take(step)
                if step.result is not None:
                    lane.tally.add(step.result)
                    yield step.result
            self._raise_lost()
        self._raise_missed()

    def _steps(self) -> Iterator[tuple[Lane, Step]]:
        """Yield the steps of all streams as they come, each stream's in order."""
        running = list(self.lanes)
        while running:
            with self._changed:
                if not any(lane.steps.first() or lane.steps.done for lane in running):
                    self._changed.wait(POLL_S)  # a signal must find the main thread awake
            for lane in list(running):
                step = lane.steps.take()
                if step is not None:
                    yield lane, step
                elif lane.steps.done:
                    running.remove(lane)
                    self._ended(lane)
        if self._batches.error is not None:
            raise self._batches.error

    def _ended(self, lane: Lane) -> None:
        """Look how a stream ended: its loss is told now, anything else is raised now."""
        error = lane.steps.error
        if error is None:
            return
        if not isinstance(error, SourceError):
            raise error
        if len(self.lanes) > 1:
            log.warning("%s", error)

    def _raise_lost(self) -> None:
        """Raise what was lost; of several streams that were ended on purpose it was told before."""
        if len(self.lanes) > 1 and self.stop.asked():
            return
        lost = [lane.steps.error for lane in self.lanes if lane.steps.error is not None]
        if len(self.lanes) == 1 and lost:
            raise lost[0]
        if lost:
            raise SourceError(f"{len(lost)} of {len(self.lanes)} sources were lost: {lost[0]}")

    def _raise_missed(self) -> None:
        missed = [sink for sink in self.sinks if sink.error is not None]
        if missed:
            counts = ", ".join(f"{sink.name} {sink.missed}" for sink in missed if sink.missed)
            why = " ".join(str(sink.error) for sink in missed)
            why = f"results and events that were not written: {counts}. {why}" if counts else why
            raise OutputError(why)

    def _end(self, threads: list[threading.Thread]) -> None:
        self.stop.ask()
        for lane in self.lanes:
            lane.abandon()
        for thread in threads:
            thread.join(JOIN_S)
            if thread.is_alive():
                log.warning("%s does not end; its device does not answer.", thread.name)
