"""What live sources share: opened again, in a new epoch, whenever they are lost."""

from __future__ import annotations

import contextlib
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

from vmoe import clips, opencv
from vmoe.errors import SourceError
from vmoe.runtime.frames import Frame, Stop

from . import ENDED, OPENING, REOPENING, RUNNING, STALLED, SourceSettings

log = logging.getLogger("vmoe")

FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 1.0  # before the first try to reopen; it doubles
SILENT_SHARE = 0.5  # of the read timeout, after which a silent source is called stalled
SLOW_SHARE = 0.9  # a read that took so much of its timeout has timed out, whatever it returned
SPACING_S = 1 / 25  # between two connections' frames where one clock does not span both
FRAMES_AT_MOST = 1e9  # of a stream without an end, FFmpeg claims nonsense beyond


class Shot(NamedTuple):
    """One frame of one connection.

    Attributes:
        pixels: uint8 [H, W, 3], RGB.
        at_s: its timestamp on the connection's own clock, in seconds.
        arrived_s: when it was there, on `time.monotonic`'s clock.
        decode_ms: time that decoding took.
    """

    pixels: clips.Frame
    at_s: float
    arrived_s: float
    decode_ms: float


class LiveSource(ABC):
    """See `Source`. A kind says how it connects, and what can be wrong."""

    live = True

    def __init__(self, name: str, settings: SourceSettings) -> None:
        """Take the name as it is printed, and how it is read."""
        self.name = name
        self.fps = 0.0
        self._tries, self._patient = settings.reconnect, settings.patient
        self._timeout_s = settings.read_timeout_s
        self._state = OPENING
        self._newest_s = 0.0  # when the newest frame was there, on time.monotonic
        self._start_s: float | None = None  # when the first was

    @abstractmethod
    def _shots(self, stop: Stop) -> Iterator[Shot]:
        """Connect; yield frames until the connection is lost or ends; release."""

    @abstractmethod
    def _why_missing(self) -> str | None:
        """Return what can be told of a source that cannot be opened; None where nothing can."""

    @property
    def state(self) -> str:
        """Where it is: a source that is silent for half of its read timeout is stalled."""
        silent_s = time.monotonic() - self._newest_s
        if self._state == RUNNING and silent_s > SILENT_SHARE * self._timeout_s:
            return STALLED
        return self._state

    def frames(self, stop: Stop) -> Generator[Frame, None, None]:
        """Yield frames until `stop`; reopen what is lost, each time in a new epoch.

        Timestamps are the source's own within an epoch; from one to the next goes the time that
        really went by.
        """
        sequence, epoch, tries, wait_s = 0, 0, 0, FIRST_WAIT_S
        try:
            while not stop.asked():
                before = sequence
                for frame in self._epochs(sequence, epoch, stop):
                    sequence, epoch, tries = frame.sequence + 1, frame.epoch, 0
                    wait_s = FIRST_WAIT_S
                    yield frame
                if stop.asked() or not self.live:
                    return
                self._may_retry(sequence, tries)
                if not tries:
                    log.warning("%s. Reopening it.", self._lost(sequence))
                self._state = REOPENING
                sleep(wait_s, stop)
                epoch += sequence > before  # a connection that gave no frame was no epoch
                tries, wait_s = tries + 1, min(2 * wait_s, LONGEST_WAIT_S)
        finally:
            self._state = ENDED

    def _epochs(self, sequence: int, epoch: int, stop: Stop) -> Iterator[Frame]:
        """Yield the frames of one connection; a clock that steps back begins an epoch, too."""
        offset_s, last_s = 0.0, None
        with contextlib.closing(self._shots(stop)) as shots:  # type: ignore[type-var]
            for shot in shots:
                self._start_s = shot.arrived_s if self._start_s is None else self._start_s
                if last_s is None or shot.at_s < last_s:
                    epoch += last_s is not None
                    offset_s = shot.arrived_s - self._start_s - shot.at_s
                last_s, self._newest_s, self._state = shot.at_s, shot.arrived_s, RUNNING
                t_s = shot.at_s + offset_s
                yield Frame(shot.pixels, t_s, sequence, epoch, shot.arrived_s, shot.decode_ms)
                sequence += 1

    def _lost(self, sequence: int) -> str:
        if not sequence:
            why = self._why_missing() or "it gives no video"
            return f"{self.name}: {why.rstrip('.?')}"
        return f"{self.name} was lost after {sequence} frames"

    def _may_retry(self, sequence: int, tries: int) -> None:
        """Raise SourceError where there is nothing to wait for any more."""
        if not sequence and (not self._patient or tries >= self._tries):
            raise SourceError(
                f"{self.name}: {self._why_missing() or 'it was opened and gives no video.'}"
            )
        if sequence and tries >= self._tries:
            raise SourceError(
                f"{self._lost(sequence)}, and {tries} tries to reopen it failed. Look at its "
                "cable, power and network; --reconnect N tries longer."
            )


class NetworkSource(LiveSource):
    """A stream at an address, which FFmpeg reads."""

    open_timeout_s = opencv.OPEN_TIMEOUT_S

    def __init__(self, name: str, address: str, settings: SourceSettings) -> None:
        """Take the address as it is printed, and as it is."""
        super().__init__(name, settings)
        self._address = address
        self._transport = settings.rtsp_transport

    def _shots(self, stop: Stop) -> Iterator[Shot]:
        opencv.say_transport(self._transport)
        capture = opencv.ffmpeg(self._address, self._timeout_s, self.open_timeout_s)
        try:
            if capture.isOpened():
                self._learn(capture)
                yield from self._read(capture, stop)
        finally:
            capture.release()

    def _learn(self, capture: Any) -> None:
        """Take what the stream claims of itself."""
        cv2 = opencv.quiet()
        claimed = capture.get(cv2.CAP_PROP_FPS)
        self.fps = claimed if 0 < claimed < 1000 else 0.0

    def _own_clock(self, capture: Any) -> bool:
        """Return whether the stream carries timestamps."""
        return True

    def _read(self, capture: Any, stop: Stop) -> Iterator[Shot]:
        """Yield frames; a read that waited out its timeout ends the connection.

        After such a wait FFmpeg may return one frame that is as old as the wait, and would then
        wait as long again before it says that the stream is lost.
        """
        cv2 = opencv.quiet()
        timed, first_s, read = self._own_clock(capture), 0.0, 0
        asked_s = time.monotonic()
        while not stop.asked() and capture.grab():
            now = time.monotonic()
            if read and self.live and now - asked_s > SLOW_SHARE * self._timeout_s:
                return
            ok, bgr = capture.retrieve()
            if not ok:
                return
            pixels = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
            at_s = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
            timed = timed and (read != 2 or at_s > 0)  # thrice zero: it carries none
            first_s = first_s or now
            ms = (time.monotonic() - now) * 1000
            yield Shot(pixels, at_s if timed else now - first_s, now, ms)
            read += 1
            asked_s = time.monotonic()


def sleep(seconds: float, stop: Stop) -> None:
    """Wait, unless `stop` is asked."""
    until = time.monotonic() + seconds
    while not stop.asked() and (left_s := until - time.monotonic()) > 0:
        time.sleep(min(left_s, 0.05))
