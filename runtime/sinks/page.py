"""The live page (`--page`) and its metrics (`--metrics`): what is seen, labelled and counted.

    /                the page: streams, label timeline, routes, guard, latency
    /stream/N.mjpg   annotated stream N, MJPEG; a viewer that is slow gets the newest frame
    /frame/N.jpg     its newest frame
    /events          server-sent events: the page's numbers as JSON, when they change
    /state.json      the same, once
    /healthz         200 while something is served, 503 where every source is lost or silent
    /metrics         Prometheus (metrics.py)

A frame is drawn and encoded once, and only while somebody looks.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, Any

from vmoe.errors import SettingError
from vmoe.runtime import addresses
from vmoe.runtime.results import Result
from vmoe.runtime.sources import RUNNING

from . import Step, _draw

if TYPE_CHECKING:
    from vmoe import clips
    from vmoe.runtime.pipeline import Pipeline

    from ._server import Server

log = logging.getLogger("vmoe")

PAGE, METRICS = "127.0.0.1:8080", "127.0.0.1:9109"  # where they are unless told
TIMELINE = 60  # newest windows of a stream that the page shows
JPEG_QUALITY = 80


def open(address: str = PAGE, *, page: bool = True) -> Page:
    """Return a sink that serves the page, or with `page` off only /healthz and /metrics.

    Args:
        address: HOST:PORT, or a port of this machine alone.
        page: whether to serve frames.

    Raises:
        SettingError: no such address.
    """
    host, port = _parsed(address, "--page" if page else "--metrics")
    return Page(host, port, shows=page)


def _parsed(address: str, flag: str) -> tuple[str, int]:
    text = f"127.0.0.1:{address}" if address.isdigit() else address
    try:
        host, port = addresses.host_and_port(f"tcp://{text}", -1)
    except ValueError:
        host, port = "", -1
    if port < 0:
        raise SettingError(f"{flag} is {address!r}; it is HOST:PORT, such as {PAGE}.")
    return host, port


class View:
    """What is known of one stream; the newest frame, encoded when somebody asks for it."""

    def __init__(self) -> None:
        """Start without a frame."""
        self.changed = threading.Condition()
        self.number = 0  # of the newest frame; 0 before the first
        self.timeline: deque[Result] = deque(maxlen=TIMELINE)
        self._frame: clips.Frame | None = None
        self._t_s = 0.0
        self._encoding = threading.Lock()
        self._encoded, self._jpeg = 0, b""

    def take(self, step: Step) -> None:
        """Take the next step of the stream."""
        with self.changed:
            if step.result is not None:
                self.timeline.append(step.result)
            if step.frame is not None:
                self._frame, self._t_s = step.frame.pixels, step.frame.t_s
                self.number += 1
            self.changed.notify_all()

    def jpeg(self) -> tuple[int, bytes]:
        """Return the newest frame's number and its JPEG; number 0 before there is one."""
        with self._encoding:
            with self.changed:
                number, frame, t_s = self.number, self._frame, self._t_s
                result = self.timeline[-1] if self.timeline else None
            if frame is not None and number != self._encoded:
                self._jpeg, self._encoded = _encode(frame, result, t_s), number
            return self._encoded, self._jpeg

    def next_jpeg(self, after: int, wait_s: float) -> tuple[int, bytes]:
        """Wait for a frame newer than `after`; return the newest."""
        with self.changed:
            self.changed.wait_for(lambda: self.number > after, wait_s)
        return self.jpeg()


def _encode(frame: clips.Frame, result: Result | None, t_s: float) -> bytes:
    import cv2

    bgr = cv2.cvtColor(_draw.annotate(frame, result, t_s), cv2.COLOR_RGB2BGR)
    data: bytes = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()
    return data


class Page:
    """See `Sink`."""

    def __init__(self, host: str, port: int, *, shows: bool) -> None:
        """Take where it listens; nothing is bound yet."""
        self.name = "--page" if shows else "--metrics"
        self.wants_frames = self.shows = shows
        self.host, self.port = host, port
        self.views: list[View] = []
        self.pipeline: Pipeline | None = None
        self._server: Server | None = None

    def watches(self, pipeline: Pipeline) -> None:
        """Take the run whose counts and states are shown."""
        self.pipeline = pipeline
        self.views = [View() for _ in pipeline.lanes]

    def take(self, step: Step) -> None:
        """Show the step."""
        self.views[step.stream].take(step)

    def healthy(self) -> bool:
        """Return whether something is served: not every source is lost or silent."""
        lanes = self.pipeline.lanes if self.pipeline is not None else []
        return any(lane.source.state == RUNNING for lane in lanes)

    def state(self) -> dict[str, Any]:
        """Return what the page shows, as JSON can hold it."""
        if self.pipeline is None:
            return {"streams": []}
        tally = self.pipeline.tally
        labels = list(self.pipeline.labels)
        return {
            "time": round(time.time(), 3),
            "labels": labels,
            "experts": [tally.experts.get(i, 0) for i in range(self.pipeline.experts)],
            "age_ms": tally.percentiles("age_ms"),
            "infer_ms": tally.percentiles("infer_ms"),
            "windows": tally.windows,
            "dropped": tally.frames_dropped,
            "alarms": tally.alarms,
            "guard": self.pipeline.guard_mode,
            "streams": [self._stream(i) for i in range(len(self.views))],
        }

    def _stream(self, number: int) -> dict[str, Any]:
        assert self.pipeline is not None
        lane, view = self.pipeline.lanes[number], self.views[number]
        with view.changed:
            results = list(view.timeline)
        last = results[-1] if results else None
        return {
            "source": lane.source.name,
            "state": lane.source.state,
            "frames": lane.tally.frames,
            "dropped": lane.tally.frames_dropped,
            "epochs": lane.tally.epochs,
            "last": None if last is None else last.to_json(),
            "timeline": [
                [r.label, round(r.score, 3), r.expert, bool(r.guard and r.guard.alarm), r.gap]
                for r in results
            ],
        }

    def __enter__(self) -> Page:
        from ._server import Server

        try:
            self._server = Server(self)
        except OSError as e:
            raise SettingError(
                f"{self.name} {self.host}:{self.port}: {e.strerror or e}. Name another HOST:PORT."
            ) from e
        self.port = self._server.server_port
        self._server.begin()
        log.info("%s: %s", self.name[2:], self._server.url)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._server is not None:
            self._server.finish()
            self._server = None
