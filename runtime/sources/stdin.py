"""Video on stdin: `-`; a container that can be read from front to back, or raw RGB frames.

    ffmpeg -i VIDEO -f mpegts - | vmoe-run --source -
    ffmpeg -i VIDEO -f rawvideo -pix_fmt rgb24 - | vmoe-run --source - --raw 640x480 --fps 25

Whoever writes waits for us: nothing is dropped. What is silent is waited for.
"""

from __future__ import annotations

import math
import os
import select
import sys
import threading
import time
from collections.abc import Generator, Iterator

import numpy as np

from vmoe import opencv
from vmoe.errors import SourceError
from vmoe.runtime.frames import POLL_S, Frame, Stop

from . import ENDED, OPENING, RUNNING, STALLED, SourceSettings

BLOCK_BYTES = 1 << 16
FOREVER_S = 7 * 24 * 3600.0  # a silent writer is waited for; FFmpeg wants a number


def claims(name: str) -> bool:
    """Return whether a name is stdin's."""
    return name == "-"


def open(name: str, settings: SourceSettings) -> StdinSource:
    """Return the source.

    Raises:
        SourceError: stdin is a terminal, or closed.
    """
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
        raise SourceError(
            "source -: nothing is piped in. ffmpeg -i VIDEO -f mpegts - | vmoe-run --source -"
        )
    return StdinSource(sys.stdin.fileno(), settings)


class StdinSource:
    """See `Source`."""

    live = False

    def __init__(self, descriptor: int, settings: SourceSettings) -> None:
        """Take what is read, as a file descriptor."""
        self.name, self.fps = "-", 0.0
        self._descriptor, self._settings = descriptor, settings
        self._state, self._newest_s = OPENING, 0.0

    @property
    def state(self) -> str:
        """Where it is; a silent writer makes it stalled."""
        silent_s = time.monotonic() - self._newest_s
        stalled = self._state == RUNNING and silent_s > self._settings.read_timeout_s
        return STALLED if stalled else self._state

    def frames(self, stop: Stop) -> Generator[Frame, None, None]:
        """Yield frames until stdin ends."""
        raw = self._settings.raw
        try:
            yield from self._contained(stop) if raw is None else self._raw(*raw, stop)
        finally:
            self._state = ENDED

    def _blocks(self, stop: Stop, size: int = BLOCK_BYTES) -> Iterator[bytes]:
        """Yield what comes in, until its end or `stop`."""
        while not stop.asked():
            if select.select([self._descriptor], [], [], POLL_S)[0]:
                block = os.read(self._descriptor, size)
                if not block:
                    return
                yield block

    def _raw(self, width: int, height: int, stop: Stop) -> Iterator[Frame]:
        self.fps = self._settings.fps
        whole, number, held = width * height * 3, 0, bytearray()
        for block in self._blocks(stop, whole):
            held += block
            while len(held) >= whole:
                now, self._state = time.monotonic(), RUNNING
                self._newest_s = now
                pixels = np.frombuffer(bytes(held[:whole]), np.uint8).reshape(height, width, 3)
                del held[:whole]
                yield Frame(pixels, number / self.fps, number, 0, now, 0.0)
                number += 1
        if held and not stop.asked():
            raise SourceError(
                f"source -: {len(held)} bytes are left after {number} frames of {width}x{height}: "
                "cut, or of another size than --raw says."
            )

    def _contained(self, stop: Stop) -> Iterator[Frame]:
        """Let FFmpeg read a pipe of our own: a read of stdin itself could not be ended."""
        cv2 = opencv.quiet()
        out, into = os.pipe()
        pump = threading.Thread(target=self._pump, args=(into, stop), name="vmoe-stdin")
        pump.start()
        capture = opencv.ffmpeg(f"pipe:{out}", FOREVER_S, FOREVER_S)
        try:
            if not capture.isOpened():
                if stop.asked():
                    return
                raise SourceError(
                    "source -: no video that can be decoded from front to back. Send MPEG-TS or "
                    "Matroska, or say --raw WIDTHxHEIGHT."
                )
            claimed = capture.get(cv2.CAP_PROP_FPS)
            self.fps = claimed if 0 < claimed < 1000 else self._settings.fps
            number, last_s = 0, -math.inf
            while not stop.asked() and capture.grab():
                began = time.monotonic()
                ok, bgr = capture.retrieve()
                if not ok:
                    return
                pixels = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
                at_s = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
                if not at_s > last_s:
                    at_s = last_s + 1 / self.fps if number else 0.0
                now, self._state = time.monotonic(), RUNNING
                self._newest_s, last_s = now, at_s
                yield Frame(pixels, at_s, number, 0, now, (now - began) * 1000)
                number += 1
        finally:
            capture.release()  # it has a descriptor of its own
            os.close(out)  # lets go of a pump that still writes
            pump.join()

    def _pump(self, into: int, stop: Stop) -> None:
        """Hand on what comes in; the reader's end, or `stop`, ends it."""
        try:
            for block in self._blocks(stop):
                while block:
                    block = block[os.write(into, block) :]
        except BrokenPipeError:
            pass
        finally:
            os.close(into)
