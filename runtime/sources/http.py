"""Video over HTTP: MJPEG of a camera, HLS, MPEG-TS without an end, or a whole file.

What has an end (a file, an HLS recording) is served as a file is, nothing dropped; the rest is
live, and reopened when it is lost. MJPEG carries no timestamps: its frames are stamped as they
arrive. Live HLS comes in pieces of some seconds, of which FFmpeg begins with the third from the
end: they are given at their own pace, so that nothing of a piece is dropped, and the next is there
when one is over.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from vmoe import opencv
from vmoe.errors import SourceError
from vmoe.runtime import addresses
from vmoe.runtime.frames import Stop

from . import SourceSettings, _network
from ._live import FRAMES_AT_MOST, NetworkSource, Shot, sleep

SCHEMES = ("http://", "https://")
PORTS = {"http": 80, "https": 443}
HLS = ".m3u8"
BEHIND_S = 1.0  # a stream that is so late goes on at its pace from there
JUMP_S = 1.0  # so far apart two frames' times are no pace: a discontinuity, an encoder begun anew
MISSING_SHARE = 0.02  # of a file's frames: their number is often an estimate


def claims(name: str) -> bool:
    """Return whether a name is an HTTP address."""
    return name.lower().startswith(SCHEMES)


def open(name: str, settings: SourceSettings) -> HttpSource:
    """Return the source; its server is asked when frames are."""
    return HttpSource(addresses.shown(name), name, settings)


class HttpSource(NetworkSource):
    """See `Source`. Whether it is live is known once it was opened."""

    def __init__(self, name: str, address: str, settings: SourceSettings) -> None:
        """Take the address as it is printed, and as it is."""
        super().__init__(name, address, settings)
        self._expected = 0  # frames of what has an end
        self._in_pieces = urlsplit(address).path.lower().endswith(HLS)

    def _learn(self, capture: Any) -> None:
        super()._learn(capture)
        frames = capture.get(opencv.quiet().CAP_PROP_FRAME_COUNT)
        self._expected = round(frames) if 0 < frames < FRAMES_AT_MOST else 0
        self.live = not self._expected

    def _own_clock(self, capture: Any) -> bool:
        cv2 = opencv.quiet()
        code = int(capture.get(cv2.CAP_PROP_FOURCC)).to_bytes(4, "little", signed=True)
        return not self.live or code not in (b"MJPG", b"mjpg")

    def _read(self, capture: Any, stop: Stop) -> Iterator[Shot]:
        shots, read = super()._read(capture, stop), 0
        for shot in _paced(shots, stop) if self.live and self._in_pieces else shots:
            read += 1
            yield shot
        if self._expected and not stop.asked() and read < self._expected * (1 - MISSING_SHARE):
            raise SourceError(
                f"{self.name} breaks off: {read} of {self._expected} frames could be read. "
                "Try again, or download it first."
            )

    def _why_missing(self) -> str | None:
        return _network.why_not(self._address, PORTS[self._address.partition("://")[0].lower()])


def _paced(shots: Iterator[Shot], stop: Stop) -> Iterator[Shot]:
    """Yield frames no earlier than their timestamps say, and as having come then."""
    start_s = -math.inf  # when a frame of time zero was, or would have been, given
    last_s, apart_s = math.inf, 0.0  # time of the frame before, and its distance from its own
    for shot in shots:
        now, step_s = time.monotonic(), shot.at_s - last_s
        if step_s > JUMP_S:
            start_s -= step_s - apart_s  # the pace goes on as if there had been no jump
        else:
            apart_s = max(0.0, step_s)
        if now - (start_s + shot.at_s) > BEHIND_S:
            start_s = now - shot.at_s
        last_s = shot.at_s
        sleep(start_s + shot.at_s - now, stop)
        yield shot._replace(arrived_s=max(now, start_s + shot.at_s))
