"""What is known of video files, kept on disk: to know which clips a file gives, it must be decoded.

Timestamps depend on the file alone, not on the clips wanted; so each file is decoded for them
once, on all cores, and looked up ever after. SQLite keeps them: several processes may read and
write, and a kill leaves it whole.
"""

from __future__ import annotations

import functools
import logging
import os
import sqlite3
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from vmoe import cli
from vmoe.data._decode import Times, timestamps

log = logging.getLogger("vmoe")

FILE = "videos.sqlite"
PATIENCE_S = 30.0  # for another process that writes
TABLE = """CREATE TABLE IF NOT EXISTS videos (
    path BLOB PRIMARY KEY, mtime_ns INTEGER, bytes INTEGER, opencv TEXT, counted REAL, at_s BLOB
)"""
FIND = "SELECT at_s, counted FROM videos WHERE path=? AND mtime_ns=? AND bytes=? AND opencv=?"
ADD = "INSERT OR REPLACE INTO videos VALUES (?, ?, ?, ?, ?, ?)"

Key = tuple[bytes, int, int]  # path, mtime in ns, bytes
NOTHING = Times(np.empty(0), 0.0)


def key_of(path: Path) -> Key | None:
    """Return what tells a file from what stood there before; None where there is none."""
    try:
        stat = path.stat()
    except OSError:  # a link to nothing
        return None
    return os.fsencode(path.absolute()), stat.st_mtime_ns, stat.st_size


@functools.cache
def at(folder: Path | None) -> Index:
    """Return this process's index in a folder; None is the user's own cache folder."""
    return Index(folder or cli.cache_folder())


class Index:
    """Timestamps of video files."""

    def __init__(self, folder: Path) -> None:
        """Open the index of a folder, or begin one; in memory where that cannot be."""
        self._path = folder / FILE
        self._lock = threading.Lock()
        # Not whole: whether the file or its disk was at fault, every process asks anew.
        self._doubtful: dict[Key, Times] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._db = _open(str(self._path))
        except (OSError, sqlite3.Error) as e:
            self._db = self._in_memory(e)

    def times(self, path: Path) -> Times:
        """Return a file's timestamps, looked up or decoded; those of no file are none."""
        return self.look_at([path])[0]

    def look_at(self, paths: Sequence[Path]) -> list[Times]:
        """Return the timestamps of files; those not known are decoded, on all cores."""
        keys = [key_of(path) for path in paths]
        found = [NOTHING if key is None else self._find(key) for key in keys]
        unknown = [i for i, times in enumerate(found) if times is None]
        if unknown:
            with ThreadPoolExecutor(_cores()) as threads:
                fresh = list(threads.map(timestamps, [paths[i] for i in unknown]))
            self._add([(keys[i], times) for i, times in zip(unknown, fresh, strict=True)])
            for i, times in zip(unknown, fresh, strict=True):
                found[i] = times
        return [NOTHING if times is None else times for times in found]

    def unknown(self, paths: Sequence[Path]) -> int:
        """Return how many of some files will have to be decoded."""
        keys = [key_of(path) for path in paths]
        return sum(key is not None and self._find(key) is None for key in keys)

    def _find(self, key: Key) -> Times | None:
        if key in self._doubtful:
            return self._doubtful[key]
        rows = self._ask(FIND, [(*key, cv2.__version__)])
        return Times(np.frombuffer(rows[0][0], np.float64), rows[0][1]) if rows else None

    def _add(self, made: Sequence[tuple[Key | None, Times]]) -> None:
        known = [(key, times) for key, times in made if key is not None]
        self._doubtful |= {key: times for key, times in known if not times.whole}
        self._ask(ADD, [
            (*key, cv2.__version__, times.counted, times.at_s.tobytes())
            for key, times in known if times.whole
        ])  # fmt: skip

    def _ask(self, statement: str, rows: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Run a statement for every row; where the file fails, go on in memory."""
        with self._lock:
            try:
                return _run(self._db, statement, rows)
            except sqlite3.Error as e:
                self._db = self._in_memory(e)
                return _run(self._db, statement, rows)

    def _in_memory(self, e: Exception) -> sqlite3.Connection:
        log.warning(
            "%s cannot be used (%s): videos are decoded again by every run. Remove it if it is "
            "damaged, or give another --cache.", self._path, e,
        )  # fmt: skip
        return _open(":memory:")


def _open(name: str) -> sqlite3.Connection:
    db = sqlite3.connect(name, timeout=PATIENCE_S, check_same_thread=False)
    with db:
        db.execute(TABLE)
    return db


def _run(db: sqlite3.Connection, statement: str, rows: Sequence[tuple[Any, ...]]) -> list[Any]:
    with db:
        return [row for values in rows for row in db.execute(statement, values)]


def _cores() -> int:
    """Return how many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
