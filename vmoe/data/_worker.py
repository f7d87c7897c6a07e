"""What a worker process of `vmoe.loading` runs: it reads clips, and knows nothing of torch.

So it starts in a moment, and takes little memory.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from vmoe.clips import Clips
from vmoe.data import ClipData, DataSet, _kept


class Answer(NamedTuple):
    """Some clips of a data set, uint8 [N, T, H, W, 3], and their labels, int64 [N]."""

    clips: Clips
    label: NDArray[np.int64]


def read(data: ClipData, indices: Sequence[int]) -> Answer:
    """Return clips by their numbers."""
    items = [data[i] for i in indices]
    label = np.array([label for _, label in items], np.int64)
    return Answer(np.stack([clip for clip, _ in items]), label)


_opened: DataSet | None = None  # of a worker process


def begin(data: DataSet, workers: int) -> None:
    """Make this process one of some workers that read a data set."""
    global _opened
    _opened = data
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the parent, which ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    cv2.setNumThreads(1)  # the other cores have workers of their own
    _kept.share_memory(workers)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def answer(epoch: int | None, indices: Sequence[int]) -> Answer:
    """Return clips of this worker's data set as it is in an epoch; None is as it was opened."""
    assert _opened is not None
    return read(_opened if epoch is None else _opened.at_epoch(epoch), indices)
