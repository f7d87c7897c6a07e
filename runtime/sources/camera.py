"""A camera of this machine: `--camera 0`; opened again, in a new epoch, when it is lost."""

from __future__ import annotations

import logging
import os
import platform
import re
import time
from collections.abc import Generator, Iterator
from typing import Any

from vmoe import opencv
from vmoe.errors import SourceError
from vmoe.runtime.frames import Frame, Stop

from . import SourceSettings

log = logging.getLogger("vmoe")

LINUX = platform.system() == "Linux"  # V4L2, and devices that can be looked at
FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 5.0  # before the first try to reopen; it doubles
SAME_CLOCK_S = 5.0  # a driver's time this near to ours is on our clock


def claims(name: str) -> bool:
    """Return whether a name is a camera's: a number, or /dev/videoN."""
    return _index(name) is not None


def _index(name: str) -> int | None:
    found = re.fullmatch(r"(?:camera[ :]|/dev/video)?(\d{1,3})", name)
    return int(found[1]) if found else None


def open(name: str, settings: SourceSettings) -> CameraSource:
    """Look whether the camera is there.

    Raises:
        SourceError: it is not, or may not be opened.
    """
    index = _index(name)
    if index is None:
        raise SourceError(f"camera {name!r} is no number; give --camera 0.")
    source = CameraSource(index, settings)
    why = source.why_missing()
    if why:
        raise SourceError(f"{source.name}: {why}")
    return source


class CameraSource:
    """See `Source`."""

    live = True

    def __init__(self, index: int, settings: SourceSettings) -> None:
        """Take the camera's number."""
        self.name = f"camera {index}"
        self.fps = 0.0
        self._index = index
        self._start_s: float | None = None  # when its first frame was taken, on time.monotonic
        self._tries = settings.reconnect
        self._timeout_s = settings.read_timeout_s

    def why_missing(self) -> str | None:
        """Return what the system says of the device; None where it can be opened."""
        if not LINUX:
            return None
        device = f"/dev/video{self._index}"
        try:
            os.close(os.open(device, os.O_RDWR | os.O_NONBLOCK))
        except FileNotFoundError:
            return f"{device} does not exist. Plug a camera in, or try --source test."
        except PermissionError:
            return f"no permission to open {device}. Add yourself to its group: video."
        except OSError as e:
            return f"{device}: {e.strerror}. Is another program using it?"
        return None

    def frames(self, stop: Stop) -> Generator[Frame, None, None]:
        """Yield frames until `stop`; reopen a lost camera, each time in a new epoch.

        Timestamps are the driver's (or ours, where it gives none), from the first frame on.
        """
        cv2 = opencv.quiet(self._timeout_s)
        sequence, epoch, tries, wait_s = 0, 0, 0, FIRST_WAIT_S
        while not stop.asked():
            why = self.why_missing()
            for frame in self._once(cv2, sequence, epoch, stop) if not why else ():
                sequence, tries, wait_s = frame.sequence + 1, 0, FIRST_WAIT_S
                yield frame
            if stop.asked():
                return
            self._may_retry(sequence, tries, why)
            log.warning("%s was lost after %d frames; reopening it.", self.name, sequence)
            _sleep(wait_s, stop)
            epoch, tries, wait_s = epoch + 1, tries + 1, min(2 * wait_s, LONGEST_WAIT_S)

    def _may_retry(self, sequence: int, tries: int, why: str | None) -> None:
        """Raise SourceError where there is nothing to wait for any more."""
        if not sequence:
            busy = f"/dev/video{self._index} is there but gives no video. "
            why = why or busy + "Is another program using it, or is it no capture device?"
            raise SourceError(f"{self.name}: {why}")
        if tries >= self._tries:
            raise SourceError(
                f"{self.name} was lost after {sequence} frames, and {tries} tries to reopen it "
                "failed. Look at its cable and power; --reconnect N tries longer."
            )

    def _once(self, cv2: Any, sequence: int, epoch: int, stop: Stop) -> Iterator[Frame]:
        """Yield frames of one connection until it is lost."""
        api = cv2.CAP_V4L2 if LINUX else cv2.CAP_ANY
        capture = cv2.VideoCapture(self._index, api)
        try:
            if not capture.isOpened():
                return
            claimed = capture.get(cv2.CAP_PROP_FPS)
            self.fps = claimed if 0 < claimed < 1000 else 0.0
            last_s = -1.0
            while not stop.asked() and capture.grab():
                now = time.monotonic()
                ok, bgr = capture.retrieve()
                if not ok:
                    return
                pixels = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
                ms = (time.monotonic() - now) * 1000
                driver_s = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
                at_s = driver_s if 0 <= now - driver_s < SAME_CLOCK_S else now
                if at_s > last_s:  # a driver that repeats a timestamp has repeated its frame
                    start_s = self._start_s = at_s if self._start_s is None else self._start_s
                    yield Frame(pixels, at_s - start_s, sequence, epoch, at_s, ms)
                    sequence, last_s = sequence + 1, at_s
        finally:
            capture.release()


def _sleep(seconds: float, stop: Stop) -> None:
    until = time.monotonic() + seconds
    while not stop.asked() and time.monotonic() < until:
        time.sleep(0.05)
