"""Prepared frames, kept: in memory up to a limit, or all of them in a folder.

In a folder a file holds all frames of one video in one size, and is mapped, not read: what a clip
does not need is never touched, and processes share what the system keeps of it. Files are renamed
into place whole; two processes that make the same one make the same bytes.
"""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vmoe import output
from vmoe.clips import ClipSpec, Frame
from vmoe.data import _index
from vmoe.data._decode import decode

FORM = 2  # of what `vmoe.clips.prepare` makes; kept frames of another are not taken
MEMORY_BYTES = 1 << 30  # of prepared frames, for all data sets that a process opens


class _Form(NamedTuple):
    """A file, and all that decides how its frames are prepared."""

    file: _index.Key
    height: int
    width: int
    resize: str
    interpolation: str
    version: int = FORM


class _Memory:
    """Frames of this process."""

    def __init__(self) -> None:
        self.room = MEMORY_BYTES
        self.frames: dict[_Form, Frame] = {}
        self.lock = threading.Lock()

    def add(self, form: _Form, frames: Frame) -> None:
        with self.lock:
            if form not in self.frames and frames.nbytes <= self.room:
                self.frames[form] = frames
                self.room -= frames.nbytes


_memory = _Memory()


def share_memory(processes: int) -> None:
    """Let this process keep its share of what one alone may keep."""
    _memory.room = MEMORY_BYTES // processes


def clip(
    path: Path, chosen: NDArray[np.int64], count: int, spec: ClipSpec, folder: Path | None
) -> Frame:
    """Return some frames of a video, from where they are kept, else decoded.

    Args:
        path: the video.
        chosen: numbers of the frames, rising, [T].
        count: how many frames it has.
        spec: how they are prepared.
        folder: where all frames are kept; None keeps them in memory while there is room.

    Returns:
        uint8 [T, H, W, 3], RGB, the caller's own.

    Raises:
        SettingError: the video has changed.
        OutputError: the folder cannot be written.
    """
    key = _index.key_of(path)
    if key is None:
        return decode(path, chosen, spec)  # says that it is gone
    form = _Form(key, spec.height, spec.width, spec.resize, spec.interpolation)
    shape = (count, spec.height, spec.width, 3)
    if folder is not None:
        return _in_folder(folder, path, form, shape, chosen, spec)
    kept = _memory.frames.get(form)
    if kept is None:
        if int(np.prod(shape)) > _memory.room:
            return decode(path, chosen, spec)
        kept = decode(path, np.arange(count), spec)
        _memory.add(form, kept)
    return kept[chosen]


def _in_folder(
    folder: Path, path: Path, form: _Form, shape: tuple[int, ...], chosen: NDArray[np.int64],
    spec: ClipSpec,
) -> Frame:  # fmt: skip
    name = hashlib.sha256(repr(form).encode()).hexdigest()
    file = folder / "frames" / name[:2] / f"{name}.npy"
    kept = _mapped(file, shape)
    if kept is None:
        kept = decode(path, np.arange(shape[0]), spec)
        with output.whole_file(file) as temporary:
            np.save(temporary, kept)
    return kept[chosen]


def _mapped(file: Path, shape: tuple[int, ...]) -> Frame | None:
    """Return kept frames without reading them; None where there are none, or they are damaged."""
    try:
        frames: Frame = np.asarray(np.lib.format.open_memmap(file, mode="r"))
    except (OSError, ValueError):
        return None
    return frames if frames.shape == shape and frames.dtype == np.uint8 else None
