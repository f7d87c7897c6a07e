"""Batches that worker processes read while the model computes; the same as without workers.

    with Loader(data, 32, device, workers=2) as loader:
        for epoch in range(epochs):
            for batch in loader.batches(order, epoch):
                ...
        print(loader.waited_s)

A clip is read once in an epoch, however many passes walk over it. Workers live as long as the
loader: an epoch reaches them as a number.
"""

from __future__ import annotations

import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import NamedTuple

import torch

from vmoe.batches import KEPT_BYTES, Batch, Kept, rows_of, to_batch
from vmoe.clips import Frame
from vmoe.data import DataSet, _worker
from vmoe.errors import VmoeError
from vmoe.settings import Settings, opt

AHEAD = 2  # batches that are being read beyond the one that is wanted


@dataclass(frozen=True)
class LoadSettings(Settings):
    """How clips are read; it changes no clip, so that it is no part of a recipe."""

    workers: int = opt(0, "processes that read clips; 0 reads between the batches", at_least=0)


class _Asked(NamedTuple):
    """A batch on its way.

    Attributes:
        row: its indices.
        kept: its clips that are at hand, by their indices.
        parts: the indices of the others, each with what waits for them.
    """

    row: list[int]
    kept: dict[int, tuple[Frame, int]]
    parts: list[tuple[list[int], Callable[[], _worker.Answer]]]


class Loader:
    """A data set in batches, read ahead by worker processes.

    Attributes:
        waited_s: seconds that whoever took the batches has waited for them, in total.
    """

    def __init__(
        self,
        data: DataSet,
        size: int,
        device: torch.device | str = "cpu",
        workers: int = 0,
        keep_bytes: int = KEPT_BYTES,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """Make a loader; its workers start with the first batch.

        Args:
            data: the clips.
            size: clips of a batch.
            device: where the tensors go.
            workers: processes that read; 0 reads in this one, between the batches.
            keep_bytes: clips of an epoch that are kept, so that a second pass need not read them.
            share: (rank, of how many): of every batch, every n-th clip.
        """
        self.waited_s = 0.0
        self._data, self._size, self._device = data, size, device
        self._rank, self._world = share
        self._epoch: int | None = None
        self._keep_bytes = keep_bytes
        self._kept = Kept(keep_bytes)
        self._workers = workers
        self._pool = _pool(data, workers) if workers else None

    def __enter__(self) -> Loader:
        """Return the loader."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        """End the workers, whatever happened."""
        self.close()

    def __len__(self) -> int:
        """How many clips."""
        return len(self._data)

    def close(self) -> None:
        """End the workers; what they are reading is dropped."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        self._pool = None
        self._kept = Kept(0)

    def batches(
        self, order: Sequence[int] | None = None, epoch: int | None = None
    ) -> Iterator[Batch]:
        """Yield the data set as `vmoe.batches.batches` does, while the next ones are read.

        Of each batch, this process's share.

        Args:
            order: indices in the order wanted; default: as they stand.
            epoch: of training; None takes the data set as it was opened.

        Raises:
            VmoeError: a clip cannot be read, or a worker was killed.
        """
        if epoch != self._epoch:
            self._epoch, self._kept = epoch, Kept(self._keep_bytes)
        cut = rows_of(range(len(self._data)) if order is None else order, self._size)
        rows = (row[self._rank :: self._world] for row in cut)
        waiting: deque[_Asked] = deque()
        while True:
            begin = time.monotonic()
            while len(waiting) <= AHEAD and (row := next(rows, None)) is not None:
                waiting.append(self._ask(row))
            if not waiting:
                return
            batch = self._batch(waiting.popleft())
            self.waited_s += time.monotonic() - begin
            yield batch

    def _ask(self, row: list[int]) -> _Asked:
        """Ask for a batch's clips that are not kept; every worker reads a part of them."""
        kept = {i: item for i in row if (item := self._kept.get(i)) is not None}
        lacking = [i for i in row if i not in kept]
        if self._pool is None:
            data = self._data if self._epoch is None else self._data.at_epoch(self._epoch)
            parts = [lacking] if lacking else []
            return _Asked(row, kept, [(part, partial(_worker.read, data, part)) for part in parts])
        parts = [part for k in range(self._workers) if (part := lacking[k :: self._workers])]
        with _say_what_ended():
            futures = [self._pool.submit(_worker.answer, self._epoch, part) for part in parts]
        return _Asked(row, kept, [(p, f.result) for p, f in zip(parts, futures, strict=True)])

    def _batch(self, asked: _Asked) -> Batch:
        """Wait for a batch."""
        items = dict(asked.kept)
        for part, result in asked.parts:
            with _say_what_ended():
                found = result()
            for i, clip, label in zip(part, found.clips, found.label.tolist(), strict=True):
                items[i] = (clip, label)
                self._kept.add(i, items[i])
        return to_batch([items[i] for i in asked.row], asked.row, self._device)


def _pool(data: DataSet, workers: int) -> ProcessPoolExecutor:
    """Return worker processes that begin empty: OpenCV does not survive a fork."""
    return ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _worker.begin, (data, workers)
    )


@contextmanager
def _say_what_ended() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as e:
        raise VmoeError(
            "a worker process that reads clips was ended from outside; often memory was short. "
            "Give fewer --workers, or --workers 0."
        ) from e
