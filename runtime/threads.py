"""CPU threads, shared out so that decoding, the engine and the sinks do not fight.

Every source is decoded by one thread of its own (vmoe.opencv.ffmpeg asks for one), and OpenCV's
own pool is turned off while streams run: what it would speed up here (small resizes) takes
microseconds, and its threads would spin beside the engine's. The engine gets the cores that
decoding leaves, at least half of them: more threads than cores make every stage wait for all
others.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

from vmoe import opencv

STREAMS_A_CORE = 4  # of ordinary cameras: decoding one at 25 fps takes 5 to 15 % of a core


def of_engine(streams: int, asked: int | None = None, cores: int | None = None) -> int:
    """Return how many threads the engine gets.

    Args:
        streams: how many sources are decoded.
        asked: threads of the engine, where the user says.
        cores: that this process may use; None looks.
    """
    cores = cores or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else [0])
    decoding = -(-streams // STREAMS_A_CORE)
    return asked or max(1, cores - decoding, cores // 2)


_lock = threading.Lock()
_pool = _bodies = 0  # threads of the pool as it was found; bodies that want it off


@contextlib.contextmanager
def serving() -> Iterator[None]:
    """Turn OpenCV's pool off in this process for as long as the body, or another one, lasts."""
    global _pool, _bodies
    cv2 = opencv.quiet()
    with _lock:
        _pool = _pool if _bodies else cv2.getNumThreads()
        _bodies += 1
        cv2.setNumThreads(1)
    try:
        yield
    finally:
        with _lock:
            _bodies -= 1
            if not _bodies:
                cv2.setNumThreads(_pool)
