"""Small real video files, written with OpenCV; each frame's number can be read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vmoe import opencv
from vmoe.clips import Frame

SIZE = (96, 128)  # height and width
CODECS = {".mp4": "mp4v", ".avi": "MJPG", ".mkv": "FFV1", ".ts": "mp4v"}


def picture(number: int) -> Frame:
    """Return frame `number`, uint8 [H, W, 3]: eight bars that are its binary digits, and noise."""
    rng = np.random.default_rng(number)
    frame = rng.integers(60, 90, (*SIZE, 3), dtype=np.uint8)
    for bit in range(8):
        frame[: SIZE[0] // 2, bit * 16 : bit * 16 + 16] = 235 if number >> bit & 1 else 16
    return frame


def number_of(frame: Frame) -> int:
    """Return the number that a frame shows."""
    bars = frame[: SIZE[0] // 2].reshape(SIZE[0] // 2, 8, 16, 3).mean(axis=(0, 2, 3))
    return sum(1 << bit for bit in range(8) if bars[bit] > 128)


def write(
    path: Path, frames: int = 60, fps: float = 20.0, *, first: int = 0, times: int = 1
) -> Path:
    """Write a video of numbered frames, from `first` on; the codec follows from the name.

    They are `times` as high and as wide as SIZE.
    """
    cv2 = opencv.quiet()
    fourcc = cv2.VideoWriter_fourcc(*CODECS[path.suffix])
    writer = cv2.VideoWriter(
        str(path), cv2.CAP_FFMPEG, fourcc, fps, (times * SIZE[1], times * SIZE[0])
    )
    assert writer.isOpened()
    for number in range(first, first + frames):
        large = picture(number).repeat(times, axis=0).repeat(times, axis=1)
        writer.write(cv2.cvtColor(large, cv2.COLOR_RGB2BGR))
    writer.release()
    return path


def read(path: Path) -> list[Frame]:
    """Return all frames of a video, RGB."""
    cv2 = opencv.quiet()
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    frames = []
    while (got := capture.read())[0]:
        frames.append(cv2.cvtColor(got[1], cv2.COLOR_BGR2RGB))
    capture.release()
    return frames


def cut(path: Path, share: float) -> Path:
    """Keep only the first part of a file; an mp4's index is moved to its front first."""
    data = path.read_bytes()
    if path.suffix == ".mp4":
        data = _index_first(data)
    short = path.with_name(f"cut{path.suffix}")
    short.write_bytes(data[: round(len(data) * share)])
    return short


def _index_first(data: bytes) -> bytes:
    """Move `moov` before `mdat`, as players want it for the web; offsets move with it."""
    boxes, at = [], 0
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        boxes.append((data[at + 4 : at + 8], data[at : at + length]))
        at += length
    moov = next(box for kind, box in boxes if kind == b"moov")
    place = moov.index(b"stco") + 4
    count = int.from_bytes(moov[place + 4 : place + 8], "big")
    offsets = np.frombuffer(moov, ">u4", count, place + 8) + len(moov)
    end = place + 8 + 4 * count
    moov = moov[: place + 8] + offsets.astype(">u4").tobytes() + moov[end:]
    head = [box for kind, box in boxes if kind == b"ftyp"]
    rest = [box for kind, box in boxes if kind not in (b"ftyp", b"moov")]
    return b"".join([*head, moov, *rest])
