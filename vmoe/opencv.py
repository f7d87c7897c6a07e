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

    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    return cv2


def can_open(path: Path) -> bool:
    """Return whether OpenCV can take a path: one that is no UTF-8 crashes the process."""
    try:
        os.path.realpath(path).encode()
    except UnicodeEncodeError:
        return False
    return True
