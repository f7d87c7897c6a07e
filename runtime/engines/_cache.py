"""Graphs as ONNX Runtime optimised them for this CPU, kept between runs.

Loading one is 2 to 5 times as fast, and weights stay in the file until they are needed.

    CACHE/onnxruntime/KEY/entry.json         what the graph was made of and for, and checksums
                          graph.onnx         with the CPU's own layouts
                          graph.onnx.data    its weights, which are mapped

An entry is bound to the part's bytes, the version of ONNX Runtime and the CPU, and is used only
when all of these and its own checksums agree; else it is made again. They find damage, no forgery:
whoever can write here can write the checksum too, and a hash that proves more took a third of the
loading, CRC-32 of every byte a fifth.
Nothing here raises: a folder that cannot be written means that there is no cache. What is kept was
made from the part's own bytes: a bundle's folder may be overwritten while an entry is made, so that
they are proven before and after.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import platform
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from vmoe.bundle import Part, check_part

from ._names import make_unique

log = logging.getLogger("vmoe.runtime")

FORMAT = 4  # of what this file writes
ENTRY, GRAPH = "entry.json", "graph.onnx"
DATA = GRAPH + ".data"
NEW, OLD = ".new-", ".old-"  # folders on their way in and out
LARGE_BYTES = 48 << 10  # of a graph without its weights: below, loading it takes a few ms
MAX_ENTRY_BYTES = 64 << 10
BLOCK_BYTES = 256 << 10  # that are read at a time
ROW_WORDS = 512  # of 8 bytes, that are summed
KEEP_S = 30 * 24 * 3600.0  # an entry that was not used for so long is removed
LEFT_S = 3600.0  # what a process that was killed left half made is removed after so long

Save = Callable[[Path, Path], None]  # (graph, where its optimised form goes, with DATA beside it)


class Cache:
    """Optimised graphs in one folder."""

    def __init__(self, folder: Path, runtime: str) -> None:
        """Take the user's cache folder, and the version of ONNX Runtime."""
        self._root = folder / "onnxruntime"
        self._for = {"format": FORMAT, "onnxruntime": runtime, "cpu": cpu()}

    def find(self, part: Part) -> Path | None:
        """Return a part's optimised graph, proven whole; None where there is none."""
        place = self._place(part)
        entry = place / ENTRY
        try:
            if not entry.is_file() or entry.stat().st_size > MAX_ENTRY_BYTES:
                return None
            held = json.loads(entry.read_text(encoding="utf-8"))
            whole = held["about"] == self._about(part) and set(held["sums"]) == {GRAPH, DATA}
            if not whole or any(checksum(place / n) != c for n, c in held["sums"].items()):
                log.debug("cache: %s is damaged, or of another machine", place)
                return None
            with contextlib.suppress(OSError):
                entry.touch()  # it was used
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
            log.debug("cache: %s cannot be read: %s", place, e)
            return None
        return place / GRAPH

    def is_worth(self, graph: Path) -> bool:
        """Return whether a graph takes long to load, so that it should be kept."""
        try:
            return graph.stat().st_size >= LARGE_BYTES
        except OSError:
            return False

    def put(self, part: Part, graph: Path, save: Save) -> bool:
        """Make a part's entry, whole or not at all; return whether it is there."""
        place = self._place(part)
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            made = Path(tempfile.mkdtemp(dir=self._root, prefix=NEW))
        except OSError as e:
            log.debug("cache: %s cannot be written: %s", self._root, e)
            return False
        try:
            check_part(graph.parent, part)
            save(graph, made / GRAPH)
            check_part(graph.parent, part)
            (made / DATA).touch()  # of a graph without weights
            (made / GRAPH).write_bytes(make_unique((made / GRAPH).read_bytes()))
            sums = {name: checksum(made / name) for name in (GRAPH, DATA)}
            held = {"about": self._about(part), "sums": sums}
            (made / ENTRY).write_text(json.dumps(held, indent=2) + "\n", encoding="utf-8")
            self._swap(made, place)
        except Exception as e:  # ORT's errors share no base class but Exception
            log.debug("cache: %s cannot be kept: %s", graph, e)
            return False
        finally:
            shutil.rmtree(made, ignore_errors=True)
        self._remove_unused()
        return True

    def drop(self, part: Part) -> None:
        """Remove a part's entry."""
        shutil.rmtree(self._place(part), ignore_errors=True)

    def _about(self, part: Part) -> dict[str, Any]:
        return {**self._for, "part": part.hashes}

    def _place(self, part: Part) -> Path:
        text = json.dumps(self._about(part), sort_keys=True)
        return self._root / hashlib.sha256(text.encode()).hexdigest()[:32]

    def _swap(self, made: Path, place: Path) -> None:
        """Let a new entry take its place; one that was there may still be mapped by a process."""
        if place.exists():
            old = Path(tempfile.mkdtemp(dir=self._root, prefix=OLD))
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                place.rename(old / "entry")
            shutil.rmtree(old, ignore_errors=True)
        try:
            made.rename(place)
        except OSError:
            if not place.is_dir():  # else another process put the same there
                raise

    def _remove_unused(self) -> None:
        for folder in self._root.iterdir():
            half = folder.name.startswith((NEW, OLD))
            used, keep_s = (folder, LEFT_S) if half else (folder / ENTRY, KEEP_S)
            with contextlib.suppress(OSError):
                if time.time() - used.stat().st_mtime > keep_s:
                    shutil.rmtree(folder, ignore_errors=True)


def checksum(path: Path) -> int:
    """Return the CRC-32 of a file's sizes and sums, over rows and columns of 64 x 512 words.

    A word is of 8 bytes, a row a page of 4 KiB. Adding runs at the speed of reading. Bits that are
    flipped, an end that is missing, what is left unwritten or exchanged, from words to pages, are
    found: what keeps the sum of a row changes that of a column.
    """
    words = np.zeros(BLOCK_BYTES // 8, np.uint64)
    block, rows, found = words.data.cast("B"), words.reshape(-1, ROW_WORDS), 0
    with path.open("rb", buffering=0) as file:
        while read := file.readinto(block):
            block[read:] = bytes(BLOCK_BYTES - read)
            for axis in (0, 1):
                found = zlib.crc32(np.add.reduce(rows, axis=axis).tobytes(), found)
            found = zlib.crc32(read.to_bytes(4, "little"), found)
    return found


def cpu() -> str:
    """Return what decides a CPU's layouts: its name, and what it can do."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
        held = {key.strip(): text.strip() for key, _, text in (x.partition(":") for x in lines)}
        told = [held.get(key, "") for key in ("model name", "flags", "Features", "CPU part")]
        if any(told):
            return " ".join([platform.machine(), *told])
    return f"{platform.machine()} {platform.processor()}"
