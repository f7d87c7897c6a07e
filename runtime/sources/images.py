"""Pictures as a video: a folder of them, or a glob; in the order of the numbers in their names."""

from __future__ import annotations

import glob
import itertools
import re
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np

from vmoe import clips, opencv
from vmoe.errors import SourceError
from vmoe.runtime.frames import Frame, Stop

from . import ENDED, OPENING, RUNNING, SourceSettings

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
VIDEOS = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm"}  # the usual ones, for a message
WILD = re.compile(r"[*?\[]")


def claims(name: str) -> bool:
    """Return whether a name is a folder, or a pattern that is not itself a file's name."""
    if "://" in name:
        return False
    path = Path(name)
    return path.is_dir() or (bool(WILD.search(name)) and not path.exists())


def open(name: str, settings: SourceSettings) -> ImagesSource:
    """List the pictures.

    Raises:
        SourceError: there is none.
    """
    path = Path(name)
    found = path.iterdir() if path.is_dir() else map(Path, glob.iglob(name, recursive=True))  # noqa: PTH207
    files = sorted((p for p in found if p.suffix.lower() in SUFFIXES), key=_natural)
    if not files:
        where = f"{name} is a folder and holds" if path.is_dir() else f"{name} names"
        known = ", ".join(sorted(SUFFIXES))
        raise SourceError(f"{where} no pictures ({known}). {_advice(path)}")
    return ImagesSource(name, files, settings)


def _advice(folder: Path) -> str:
    """Return what to name in the place of a folder, or of a pattern, without pictures."""
    inside = folder.iterdir() if folder.is_dir() else ()
    videos = sorted(path for path in inside if path.suffix.lower() in VIDEOS)
    if not videos:
        return "Name a video file, or such a folder."
    return f"Name its videos: --source {videos[0]}, or all of them in a file for --list."


def _natural(path: Path) -> list[tuple[int, str]]:
    """Return a key that puts 9.png before 10.png."""
    words = re.split(r"(\d+)", str(path))
    return [(int(word), "") if word.isdigit() else (-1, word) for word in words]


class ImagesSource:
    """See `Source`."""

    live = False

    def __init__(self, name: str, files: list[Path], settings: SourceSettings) -> None:
        """Take the files, in order."""
        self.name, self.fps, self.state = name, settings.fps, OPENING
        self._files, self._loop = files, settings.loop

    def frames(self, stop: Stop) -> Generator[Frame, None, None]:
        """Yield the pictures, 1 / fps apart; with `loop` again and again, each round an epoch."""
        cv2 = opencv.quiet()
        try:
            for epoch in itertools.count() if self._loop else (0,):
                for place, path in enumerate(self._files):
                    if stop.asked():
                        return
                    number = epoch * len(self._files) + place
                    began = time.monotonic()
                    pixels = _decoded(cv2, path)
                    now, self.state = time.monotonic(), RUNNING
                    yield Frame(pixels, number / self.fps, number, epoch, now, (now - began) * 1000)
        finally:
            self.state = ENDED


def _decoded(cv2: Any, path: Path) -> clips.Frame:
    """Read one picture, RGB; from its bytes, since its name may be no UTF-8."""
    try:
        data = np.frombuffer(path.read_bytes(), np.uint8)
    except OSError as e:
        raise SourceError(f"{path!s}: {e.strerror}.") from e
    bgr = cv2.imdecode(data, cv2.IMREAD_COLOR) if len(data) else None
    if bgr is None:
        raise SourceError(f"{path} is no picture that can be decoded. Remove or repair it.")
    pixels: clips.Frame = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
    return pixels
