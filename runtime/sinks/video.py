"""An annotated video of one stream: the source's own frames, in the source's own time.

The video has one constant rate. Where the source's times are uneven, or frames were dropped,
the frame before is repeated, and frames beyond the rate that the source names are left out, so
that the video runs as long as the stream did.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

from vmoe import clips, opencv, output
from vmoe.errors import OutputError, SettingError, SourceError
from vmoe.runtime.frames import Frame
from vmoe.runtime.results import Result
from vmoe.video import CODECS, holds

from . import Step, _draw

log = logging.getLogger("vmoe")

UNKNOWN_FPS = 25.0
LOOKED_AT = 64  # frames between two looks at the room that is left on the disk
ROOM_BYTES = 1 << 20
AHEAD = 2  # frames that a shaking clock may put the video ahead of the stream
LONGEST_REPEAT_S = 10.0  # a longer break is not filled up


def open(path: Path, *, overwrite: bool = False, stream: int = 0) -> Video:
    """Return a sink that writes a video.

    Args:
        path: .mp4, .avi or .mkv (lossless).
        overwrite: replace a file that is there.
        stream: the number of the stream that is written; steps of others are passed over.

    Raises:
        SettingError: the file exists, is of another kind, or its name is no UTF-8.
    """
    if path.suffix.lower() not in CODECS:
        raise SettingError(f"--save {path}: cannot write {path.suffix!r}; use .mp4, .avi or .mkv.")
    if not opencv.can_open(path):
        raise SettingError(f"--save {str(path)!a} is no UTF-8, so that OpenCV cannot write it.")
    if path.is_dir() or (path.exists() and not overwrite):
        raise SettingError(f"{path} exists. Choose another --save, or say --overwrite.")
    return Video(path, stream)


class Video:
    """See `Sink`. The file appears under its name when it is whole."""

    wants_frames = True

    def __init__(self, path: Path, stream: int) -> None:
        """Take the file's name; nothing is written before the first frame."""
        self.name = str(path)
        self._path, self._stream = path, stream
        self._stack = contextlib.ExitStack()
        self._temporary = path
        self._result: Result | None = None
        self._epoch = 0
        self._open = False
        self._begin()

    def _begin(self) -> None:
        """Forget what was written, before a file and after one that failed."""
        self._writer: Any = None
        self._size = (0, 0)
        self._fps = UNKNOWN_FPS
        self._written = 0
        self._last: clips.Frame | None = None  # annotated, BGR
        self._labelled = False
        self._offset_s: float | None = None  # stream time that is frame 0 of the video

    def take(self, step: Step) -> None:
        """Write the frame, with the newest result on it.

        Raises:
            OutputError: it cannot be written. Nothing of it is left; the next frame begins anew.
        """
        if step.stream != self._stream:
            return
        if step.result is not None:
            self._result, self._labelled = step.result, True
        frame = step.frame
        if frame is None:
            return
        if frame.epoch != self._epoch:  # a new epoch's first windows are not there yet
            self._result, self._epoch = step.result, frame.epoch
        try:
            if not self._open:
                self.__enter__()
            self._draw(frame, step.fps)
        except OutputError:
            self._discard()
            raise

    def _draw(self, frame: Frame, fps: float) -> None:
        import cv2

        drawn = cv2.cvtColor(
            _draw.annotate(frame.pixels, self._result, frame.t_s), cv2.COLOR_RGB2BGR
        )
        if self._writer is None:
            self._open_writer(fps, (drawn.shape[1], drawn.shape[0]))
        if (drawn.shape[1], drawn.shape[0]) != self._size:  # a source that changed its size
            drawn = cv2.resize(drawn, self._size)
        for _ in range(self._copies_before(frame)):
            self._write(self._last if self._last is not None else drawn)
        if not self._too_early(frame):
            self._write(drawn)
        self._last = drawn

    def _open_writer(self, fps: float, size: tuple[int, int]) -> None:
        cv2 = opencv.quiet()
        self._fps, self._size = fps or UNKNOWN_FPS, size
        fourcc = cv2.VideoWriter_fourcc(*CODECS[self._path.suffix.lower()])
        name = str(self._temporary)
        self._writer = cv2.VideoWriter(name, cv2.CAP_FFMPEG, fourcc, self._fps, size)
        if not self._writer.isOpened():
            raise OutputError(
                f"cannot write {self._path}: OpenCV has no encoder for {self._path.suffix} of "
                f"{size[0]}x{size[1]} here. Try .avi."
            )

    def _copies_before(self, frame: Frame) -> int:
        """Return how often the frame before is to be repeated, so that time is kept."""
        if self._offset_s is None:
            self._offset_s = frame.t_s
        behind = round((frame.t_s - self._offset_s) * self._fps) - self._written
        if behind > LONGEST_REPEAT_S * self._fps:
            self._offset_s += behind / self._fps
            return 0
        return max(0, behind)

    def _too_early(self, frame: Frame) -> bool:
        """Return whether the video runs ahead of a source that is faster than it says."""
        return self._written - (frame.t_s - (self._offset_s or 0.0)) * self._fps >= AHEAD

    def _write(self, drawn: clips.Frame) -> None:
        """Write one frame; OpenCV says nothing of a full disk, so look now and then."""
        self._writer.write(drawn)
        self._written += 1
        if self._written % LOOKED_AT == 0:
            try:
                free = shutil.disk_usage(self._temporary.parent).free
            except OSError as e:  # its mount went
                raise OutputError(f"cannot write {self._path}: {e.strerror}.") from e
            if free < ROOM_BYTES:
                raise OutputError(
                    f"cannot write {self._path}: the disk is full ({free} bytes are left). "
                    "Nothing was left half-written."
                )

    def _finish(self) -> None:
        """Write the trailer, and prove that the file holds what was written."""
        self._writer.release()
        self._writer = None
        if not holds(self._temporary, self._written):
            raise OutputError(
                f"cannot write {self._path}: the file does not hold the {self._written} frames "
                "that were written; is the disk full? Nothing was left half-written."
            )

    def __enter__(self) -> Video:
        self._temporary = self._stack.enter_context(output.whole_file(self._path))
        self._open = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finish the file; a source that broke off leaves what was labelled of it."""
        lost = kind is not None and issubclass(kind, SourceError) and self._labelled
        early = kind in (GeneratorExit, BrokenPipeError)  # whoever watched has seen enough
        if self._writer is not None and (kind is None or lost or early):
            with self._stack:
                self._finish()
            log.info("saved %s (%d frames)", self._path, self._written)
            return
        self._discard()

    def _discard(self) -> None:
        """Remove what was written of the file."""
        if self._writer is not None:
            self._writer.release()
        self._open = False
        self._begin()
        with contextlib.suppress(_NothingWrittenError), self._stack:
            raise _NothingWrittenError


class _NothingWrittenError(Exception):
    """Makes `whole_file` remove its temporary file."""
