"""One video file: the true timestamps of its frames, the clips they allow, and its pixels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from vmoe import opencv
from vmoe.clips import ClipSpec, Frame, every_clip, prepare
from vmoe.errors import SettingError

SUFFIXES = {
    ".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts",
    ".webm", ".wmv",
}  # fmt: skip
UNKNOWN_FPS = 25.0  # of a file that gives neither timestamps nor a rate


class Times(NamedTuple):
    """What decoding a file once has found.

    Attributes:
        at_s: timestamp of every frame that it gives, in seconds, rising, float64 [F].
        counted: how many frames the file says it has; of some formats an estimate, or nothing.
    """

    at_s: NDArray[np.float64]
    counted: float

    @property
    def whole(self) -> bool:
        """Whether it gives about as many frames as it says."""
        return len(self.at_s) > 0 and len(self.at_s) >= self.counted * 0.98 - 1


def timestamps(path: Path) -> Times:
    """Decode a file for its timestamps; one that cannot be decoded has none."""
    at_s: list[float] = []
    with _capture(path) as capture:
        fps = capture.get(cv2.CAP_PROP_FPS)
        period_s = 1 / (fps if 0 < fps < 10000 else UNKNOWN_FPS)
        while capture.grab():
            now_s = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
            last_s = at_s[-1] if at_s else -np.inf
            # Some formats carry no timestamps, or step back.
            at_s.append(now_s if now_s > last_s else last_s + period_s)
        counted = capture.get(cv2.CAP_PROP_FRAME_COUNT)
    return Times(np.array(at_s, np.float64), counted)


def cut(times: Times, spec: ClipSpec) -> tuple[NDArray[np.int64], str]:
    """Return every clip that a file can give, as numbers of its frames, int [N, T], and a fault.

    The fault says why there is no clip; where there are clips, it is empty or says what is damaged.
    """
    clips = every_clip(times.at_s, spec)
    if not len(times.at_s):
        return clips, "cannot be decoded"
    if not times.whole:
        return clips, f"gives {len(times.at_s)} of its {times.counted:.0f} frames"
    if len(clips):
        return clips, ""
    lasts_s = times.at_s[-1] - times.at_s[0]
    if lasts_s < spec.window_s - spec.spacing_s / 2:
        return clips, f"lasts {lasts_s:.2f} s, a clip {spec.window_s:.2f} s"
    return clips, f"has frames up to {np.diff(times.at_s).max():.3f} s apart"


def decode(path: Path, numbers: NDArray[np.int64], spec: ClipSpec) -> Frame:
    """Decode some frames of a file.

    It is decoded from its beginning: seeking is not frame-exact in every format.

    Args:
        path: the file.
        numbers: which frames, rising, [N].
        spec: how they are prepared.

    Returns:
        uint8 [N, H, W, 3], RGB.

    Raises:
        SettingError: it does not give them any more.
    """
    frames = np.empty((len(numbers), spec.height, spec.width, 3), np.uint8)
    with _capture(path) as capture:
        last = -1
        for at, number in enumerate(numbers.tolist()):
            there = all(capture.grab() for _ in range(number - last))
            there, bgr = capture.retrieve() if there else (False, frames[at])
            if not there:
                raise SettingError(
                    f"{path} has changed while it was in use: its frame {number} is gone."
                )
            frames[at] = cv2.cvtColor(prepare(bgr, spec), cv2.COLOR_BGR2RGB)
            last = number
    return frames


@contextmanager
def _capture(path: Path) -> Iterator[cv2.VideoCapture]:
    """Open a file for one thread; the file may turn out to hold no video."""
    opencv.quiet()
    capture = cv2.VideoCapture()
    try:
        if opencv.can_open(path):
            capture.open(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
        yield capture
    finally:
        capture.release()
