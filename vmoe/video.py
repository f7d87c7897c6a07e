"""A video file, written whole or not at all.

OpenCV reports no write errors: on a full disk it drops frames in silence. So the file is opened
again before it gets its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vmoe import opencv, output
from vmoe.clips import Frame
from vmoe.errors import OutputError, SettingError

CODECS = {".mp4": "mp4v", ".avi": "MJPG", ".mkv": "FFV1"}  # what OpenCV's wheels can encode


@contextmanager
def writing(path: Path, fps: float, size: tuple[int, int]) -> Iterator[Callable[[Frame], None]]:
    """Yield a function that appends a frame, uint8 [H, W, 3] RGB.

    Args:
        path: .mp4, .avi (Motion JPEG) or .mkv (lossless).
        fps: frames per second.
        size: height and width of a frame.

    Raises:
        SettingError: the path's name is no UTF-8, which crashes OpenCV.
        OutputError: the file cannot be written, or does not hold what was written into it.
    """
    if not opencv.can_open(path):
        raise SettingError(f"{str(path)!a} is no UTF-8, so that OpenCV cannot write it: rename it.")
    cv2 = opencv.quiet()
    written = 0
    with output.whole_file(path) as temporary:
        codec = cv2.VideoWriter.fourcc(*CODECS[path.suffix.lower()])
        place = (str(temporary), cv2.CAP_FFMPEG, codec)
        writer = cv2.VideoWriter(*place, fps, (size[1], size[0]))

        def append(frame: Frame) -> None:
            nonlocal written
            writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
            written += 1

        try:
            if not writer.isOpened():
                raise OutputError(f"cannot write {path}: OpenCV has no encoder for it here.")
            yield append
        finally:
            writer.release()  # writes the index
        if not holds(temporary, written):
            raise OutputError(
                f"cannot write {path}: the file does not hold the {written} frames that were "
                "written; is the disk full? Nothing was left half-written."
            )


def holds(path: Path, frames: int) -> bool:
    """Return whether a video has so many frames, and its last ones can be read."""
    cv2 = opencv.quiet()
    capture = cv2.VideoCapture(str(path.resolve()), cv2.CAP_FFMPEG)
    try:
        counted = round(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else -9
        if abs(counted - frames) > 1:  # some containers give a count rounded from their length
            return False
        capture.set(cv2.CAP_PROP_POS_FRAMES, max(0, counted - 2))
        return bool(capture.read()[0])
    finally:
        capture.release()
