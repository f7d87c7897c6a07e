"""A video file: every frame, by its true timestamp; a file that breaks in the middle says so."""

from __future__ import annotations

import itertools
import logging
import math
import os
import statistics
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from vmoe import opencv
from vmoe.errors import SourceError, nearest
from vmoe.runtime.frames import Frame, Stop

from . import ENDED, OPENING, RUNNING, SourceSettings, _container

log = logging.getLogger("vmoe")

MISSING_SHARE = 0.02  # of a file's length, that its last frames may lack before it counts as broken
UNKNOWN_FPS = 25.0  # of a file that gives neither timestamps nor a rate
BELIEVED_FPS = 240.0  # a claim above is often a clock's rate (WebM: 1000), so it is measured
ANY_FPS = 10000.0  # what claims more has no rate at all
MOST_BESIDE = 1000  # names of a folder that a misspelt one is compared with
MEASURED = 33  # first frames whose timestamps tell the rate


def claims(name: str) -> bool:
    """Return whether a name is a path: everything that is no URL."""
    return "://" not in name


def open(name: str, settings: SourceSettings) -> FileSource:
    """Look whether the file is there and can be read.

    Raises:
        SourceError: it cannot.
    """
    path = Path(name)
    if not opencv.can_open(path):
        raise SourceError(f"{name!a} is no UTF-8, so that OpenCV cannot open it: rename it.")
    try:
        if path.is_dir():
            raise SourceError(f"{name} is a folder; name a video file.")
        if path.exists() and not path.is_file():  # reading a pipe here would eat its first byte
            raise SourceError(f"{name} is no plain file; name a video file.")
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as e:
        near = "." if path.exists() else nearest(path.name, ["test", *_beside(path)])
        raise SourceError(f"{name}: {e.strerror}{near} Name a video file that can be read.") from e
    if empty:
        raise SourceError(f"{name} is empty (0 bytes); name a video file.")
    return FileSource(name, settings)


def _beside(path: Path) -> list[str]:
    """Return the names in a file's folder, whether or not the file is there."""
    try:
        return [other.name for other in itertools.islice(path.parent.iterdir(), MOST_BESIDE)]
    except OSError:
        return []


class FileSource:
    """See `Source`."""

    live = False

    def __init__(self, name: str, settings: SourceSettings) -> None:
        """Take a path that `open` has looked at."""
        self.name = name
        self.fps = 0.0
        self.state = OPENING
        self._path = Path(os.path.realpath(name))  # FFmpeg takes `12:30.avi` for an address
        self._claimed_fps = 0.0
        self.virtual = settings.replay
        self._loop = settings.loop
        self._timeout_s = settings.read_timeout_s

    def frames(self, stop: Stop) -> Generator[Frame, None, None]:
        """Yield every frame; with `loop` again and again, each round an epoch, time going on."""
        count, start_s = 0, 0.0
        try:
            for epoch in itertools.count():
                end_s = start_s
                for frame in self._once(epoch, count, start_s, stop):
                    count, end_s = frame.sequence + 1, frame.t_s
                    yield frame
                if stop.asked() or not self._loop:
                    return
                start_s = end_s + 1 / self.fps
        finally:
            self.state = ENDED

    def _once(self, epoch: int, first: int, start_s: float, stop: Stop) -> Iterator[Frame]:
        cv2 = opencv.quiet()
        capture = self._open()
        try:
            read, last_s = 0, -math.inf
            while not stop.asked():
                began = time.monotonic()
                ok, bgr = capture.read()
                self.state = RUNNING
                if not ok:
                    self._judge(capture.get(cv2.CAP_PROP_FRAME_COUNT), read, last_s)
                    return
                at_s = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
                if not at_s > last_s:  # some formats carry no timestamps, or step back
                    at_s = last_s + 1 / self.fps if read else 0.0
                pixels = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
                now = time.monotonic()
                ms = (now - began) * 1000
                yield Frame(pixels, start_s + at_s, first + read, epoch, now, ms)
                read, last_s = read + 1, at_s
        finally:
            capture.release()

    def _open(self) -> Any:
        cv2 = opencv.quiet()
        capture = self._capture()
        if not capture.isOpened():
            capture.release()
            raise SourceError(
                f"{self.name} is no video that can be decoded here (damaged, or cut before its "
                "index). Play it with ffplay to see, or convert it with ffmpeg."
            )
        self._claimed_fps = capture.get(cv2.CAP_PROP_FPS)
        believed = 0 < self._claimed_fps <= BELIEVED_FPS
        self.fps = self._claimed_fps if believed else self._measured_fps()
        return capture

    def _capture(self) -> Any:
        return opencv.ffmpeg(str(self._path), self._timeout_s)

    def _measured_fps(self) -> float:
        """Return the rate that the first timestamps show, in a capture of its own."""
        cv2 = opencv.quiet()
        capture = self._capture()
        times_ms: list[float] = []
        try:
            while len(times_ms) < MEASURED and capture.grab():
                times_ms.append(capture.get(cv2.CAP_PROP_POS_MSEC))
        finally:
            capture.release()
        apart_ms = [b - a for a, b in itertools.pairwise(times_ms) if b > a]
        return 1000 / statistics.median(apart_ms) if apart_ms else UNKNOWN_FPS

    def _judge(self, counted: float, read: int, last_s: float) -> None:
        """Tell a file's end from a break; a mere estimate of its length gives only a warning."""
        path = self._path
        frames = round(counted) if 0 < counted < 1e12 else 0
        claimed = self._claimed_fps  # OpenCV's count of frames is often the length times this
        expected_s = frames / (claimed if 0 < claimed < ANY_FPS else self.fps)
        lacks = read < frames and _lacks(last_s, expected_s, self.fps)
        cut, exact_s = _container.is_cut(path), _container.duration_s(path, expected_s)
        of = f"{read} of {frames} frames" if frames else f"{read} frames"
        if not read:
            raise SourceError(f"{self.name}: none of its frames can be decoded.")
        if (cut and (lacks or not frames)) or (exact_s and _lacks(last_s, exact_s, self.fps)):
            raise SourceError(
                f"{self.name} breaks off: {of} could be read, up to {last_s:.2f} s. "
                "Copy or record it again."
            )
        if lacks:
            log.warning("%s: %s were read; its length may be an estimate.", self.name, of)


def _lacks(last_s: float, expected_s: float, fps: float) -> bool:
    """Return whether frames that end with `last_s` are too few for a length."""
    return last_s + 1.5 / fps < expected_s * (1 - MISSING_SHARE)
