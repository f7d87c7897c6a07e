"""OpenCV's video input, tamed: quiet, with timeouts, and one owner.

Two threads on one capture crash the process, and so does a release beside a read: whoever
opens a capture here reads and releases it in the same thread.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

QUIET = {
    "OPENCV_FFMPEG_LOGLEVEL": "-8",  # our own line says what is wrong
    "OPENCV_LOG_LEVEL": "OFF",
    "OPENCV_FFMPEG_IS_THREAD_SAFE": "1",  # else one slow open blocks every other
}


def quiet(read_timeout_s: float = 3.0) -> Any:
    """Return the cv2 module, quiet and with V4L2's read timeout; call before any capture.

    FFmpeg's own log level is read once per process, so that every capture begins here.
    """
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    os.environ["OPENCV_VIDEOIO_V4L_SELECT_TIMEOUT"] = str(max(1, math.ceil(read_timeout_s)))
    import cv2

    if hasattr(cv2.utils, "logging"):  # from 4.13; before, the environment alone says it
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    return cv2


# Of live streams: what they are analysed for before the first frame, in microseconds (FFmpeg's own
# choice is seconds). Not nobuffer: what a process says here holds for its files too, and there
# nobuffer loses the first frames. Anything said here drops OpenCV's own default of TCP.
LIVE_OPTIONS = "rtsp_transport;{transport}|analyzeduration;500000"
OPTIONS_KEY = "OPENCV_FFMPEG_CAPTURE_OPTIONS"
OPEN_TIMEOUT_S = 5.0


def say_transport(transport: str) -> None:
    """Choose tcp or udp for the RTSP streams that this process opens from now on.

    A choice that stands in the environment already is the user's, and kept.
    """
    ours = {LIVE_OPTIONS.format(transport=kind) for kind in ("tcp", "udp")}
    if os.environ.get(OPTIONS_KEY, "") in {"", *ours}:
        os.environ[OPTIONS_KEY] = LIVE_OPTIONS.format(transport=transport)


def ffmpeg(name: str, read_timeout_s: float, open_timeout_s: float = OPEN_TIMEOUT_S) -> Any:
    """Open a file or an address with FFmpeg: with timeouts, and one decoder thread.

    Returns:
        A capture, opened or not; who called this releases it, in the same thread.
    """
    cv2 = quiet(read_timeout_s)
    wanted = [
        cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, math.ceil(open_timeout_s * 1000),
        cv2.CAP_PROP_READ_TIMEOUT_MSEC, math.ceil(read_timeout_s * 1000),
        cv2.CAP_PROP_N_THREADS, 1,
    ]  # fmt: skip
    return cv2.VideoCapture(name, cv2.CAP_FFMPEG, wanted)


def can_open(path: Path) -> bool:
    """Return whether OpenCV can take a path: one that is no UTF-8 crashes the process."""
    try:
        os.path.realpath(path).encode()
    except UnicodeEncodeError:
        return False
    return True
