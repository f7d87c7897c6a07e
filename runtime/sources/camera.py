"""A camera of this machine: `--camera 0`; opened again, in a new epoch, when it is lost."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Iterator

from vmoe import opencv
from vmoe.errors import SourceError
from vmoe.runtime.frames import Stop

from . import SourceSettings
from ._live import LiveSource, Shot

LINUX = platform.system() == "Linux"  # V4L2, and devices that can be looked at
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


class CameraSource(LiveSource):
    """See `Source`."""

    def __init__(self, index: int, settings: SourceSettings) -> None:
        """Take the camera's number."""
        super().__init__(f"camera {index}", settings)
        self._index = index

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

    def _why_missing(self) -> str | None:
        busy = f"/dev/video{self._index} is there but gives no video. "
        return self.why_missing() or (
            busy + "Is another program using it, or is it no capture device?"
        )

    def _shots(self, stop: Stop) -> Iterator[Shot]:
        """Yield frames of one connection; their times are the driver's, else ours."""
        cv2 = opencv.quiet(self._timeout_s)
        if self.why_missing():
            return
        capture = cv2.VideoCapture(self._index, cv2.CAP_V4L2 if LINUX else cv2.CAP_ANY)
        try:
            if not capture.isOpened():
                return
            claimed = capture.get(cv2.CAP_PROP_FPS)
            self.fps = claimed if 0 < claimed < 1000 else 0.0
            while not stop.asked() and capture.grab():
                now = time.monotonic()
                ok, bgr = capture.retrieve()
                if not ok:
                    return
                pixels = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
                ms = (time.monotonic() - now) * 1000
                driver_s = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
                at_s = driver_s if 0 <= now - driver_s < SAME_CLOCK_S else now
                yield Shot(pixels, at_s, at_s, ms)
        finally:
            capture.release()
