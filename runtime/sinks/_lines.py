"""A text file that grows by whole lines, and can be followed while it does."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from vmoe import output
from vmoe.errors import OutputError


class Lines:
    """Opened with the first line.

    Where nothing is written, the file is as it was, or (after a clean end) empty but for its head.
    """

    def __init__(self, path: Path, *, head: str = "") -> None:
        """Take the file, and what it begins with."""
        self._path, self._head = path, head
        self._handle = -1
        self._whole_bytes = 0

    def probe(self) -> None:
        """Make sure that it can be written, before any work."""
        output.probe(self._path)

    def write(self, text: str) -> None:
        """Add whole lines.

        Raises:
            OutputError: they cannot be written; what did not fit on the disk is taken back.
        """
        self._open()
        data = text.encode(errors="backslashreplace")  # a file's name may be no UTF-8
        size = len(data)
        try:
            while data:
                data = data[os.write(self._handle, data) :]
        except OSError as e:
            with contextlib.suppress(OSError):  # a pipe or device has no length to cut
                os.ftruncate(self._handle, self._whole_bytes)
                os.lseek(self._handle, self._whole_bytes, os.SEEK_SET)
            raise OutputError(
                f"cannot write {self._path}: {e.strerror}. It holds whole lines up to here."
            ) from e
        self._whole_bytes += size

    def close(self, kind: type[BaseException] | None) -> None:
        """End the file; one that nothing was written to begins where the run ended well."""
        if kind in (None, GeneratorExit, BrokenPipeError):
            self._open()
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _open(self) -> None:
        if self._handle >= 0:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            how = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            self._handle = os.open(self._path, how, 0o666)
        except OSError as e:
            raise OutputError(f"cannot write {self._path}: {e.strerror}.") from e
        self._whole_bytes = 0
        if self._head:
            self.write(self._head)
