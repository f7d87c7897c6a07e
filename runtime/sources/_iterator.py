"""Frames that a program gives: any iterable of them, through the API. It has no name to claim."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterable, Iterator

import numpy as np

from vmoe import clips
from vmoe.errors import SourceError
from vmoe.runtime.frames import Frame, Stop

from . import ENDED, OPENING, RUNNING

Given = clips.Frame | tuple[float, clips.Frame]


class IteratorSource:
    """See `Source`. What is iterated runs in the capture thread, and is closed there.

    Items are frames, uint8 [H, W, 3] RGB, 1 / fps apart; or pairs of a timestamp in seconds and a
    frame. A timestamp that steps back begins a new epoch.
    """

    def __init__(
        self,
        frames: Iterable[Given],
        *,
        fps: float = 10.0,
        live: bool = False,
        name: str = "api",
        copy: bool = True,
    ) -> None:
        """Take the frames.

        Args:
            frames: see above.
            fps: of frames without timestamps.
            live: the newest frame wins, and those without a timestamp are stamped as they come;
                else nothing is dropped, and what is iterated waits for the labels.
            name: of the source, in results.
            copy: take a copy of each frame, so that the program may fill the same array again;
                off where every frame is an array of its own, which stays as it is.
        """
        self.name, self.fps, self.live, self.state = name, fps, live, OPENING
        self._given, self._copy = frames, copy

    def frames(self, stop: Stop) -> Generator[Frame, None, None]:
        """Yield what is given.

        Raises:
            SourceError: an item that is no frame.
        """
        items: Iterator[Given] = iter(self._given)
        start_s: float | None = None
        epoch, last_s = 0, -math.inf
        try:
            for number, item in enumerate(items):
                if stop.asked():
                    return
                now, self.state = time.monotonic(), RUNNING
                start_s = now if start_s is None else start_s
                own_s = now - start_s if self.live else number / self.fps
                t_s, pixels = item if isinstance(item, tuple) else (own_s, item)
                self._check(pixels, number)
                pixels = pixels.copy() if self._copy else pixels
                epoch, last_s = epoch + (t_s < last_s), t_s
                yield Frame(pixels, float(t_s), number, epoch, now, 0.0)
        finally:
            self.state = ENDED
            close = getattr(items, "close", None)
            if close is not None:
                close()

    def _check(self, pixels: object, number: int) -> None:
        what = type(pixels).__name__
        if isinstance(pixels, np.ndarray):
            what = f"{pixels.dtype} {list(pixels.shape)}"
            if pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3:
                return
        raise SourceError(
            f"{self.name}: frame {number} is {what}; give uint8 [H, W, 3], RGB, or a pair of its "
            "time in seconds and such a frame."
        )
