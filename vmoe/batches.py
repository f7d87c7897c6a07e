"""Clips in batches for the twin: uint8 at the door, float32 [B, C, T, H, W] inside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vmoe.clips import Clips, Frame
from vmoe.data import ClipData

KEPT_BYTES = 4 << 30  # of uint8 clips


@dataclass(frozen=True)
class Batch:
    """Some clips of a data set.

    Attributes:
        clip: float32 [B, 3, T, H, W], pixels in [0, 1].
        label: int64 [B].
        index: number of each clip in its data set, int64 [B].
    """

    clip: Tensor
    label: Tensor
    index: Tensor


def to_tensor(clips: Clips, device: torch.device | str = "cpu") -> Tensor:
    """Return float32 [N, 3, T, H, W] with pixels in [0, 1] of uint8 [N, T, H, W, 3]."""
    return torch.from_numpy(clips).to(device).permute(0, 4, 1, 2, 3).float() / 255


class Kept:
    """Clips and labels by their numbers, as many as there is room for."""

    def __init__(self, limit_bytes: int = KEPT_BYTES) -> None:
        """Keep up to so many bytes; what comes later is not kept."""
        self._room = limit_bytes
        self._items: dict[int, tuple[Frame, int]] = {}

    def get(self, index: int) -> tuple[Frame, int] | None:
        """Return clip uint8 [T, H, W, 3] and label, where they are kept."""
        return self._items.get(index)

    def add(self, index: int, item: tuple[Frame, int]) -> None:
        """Keep a clip while there is room."""
        if index not in self._items and self._room >= item[0].nbytes:
            self._room -= item[0].nbytes
            self._items[index] = item


class Held:
    """A data set whose clips are kept once they were read, up to a number of bytes."""

    def __init__(self, data: ClipData, limit_bytes: int = KEPT_BYTES) -> None:
        """Wrap a data set; clips beyond the limit are read again each time."""
        self._data, self._kept = data, Kept(limit_bytes)

    @property
    def labels(self) -> tuple[str, ...]:
        """The K names."""
        return self._data.labels

    def __len__(self) -> int:
        """How many clips."""
        return len(self._data)

    def __getitem__(self, index: int) -> tuple[Frame, int]:
        """Return clip uint8 [T, H, W, 3] and label, from memory where it is held."""
        item = self._kept.get(index)
        if item is None:
            item = self._data[index]
            self._kept.add(index, item)
        return item


def batches(
    data: ClipData,
    size: int,
    device: torch.device | str = "cpu",
    order: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Yield a data set in batches, cut as by `rows_of`.

    Args:
        data: the clips.
        size: clips of a batch.
        device: where the tensors go.
        order: indices in the order wanted; default: as they stand.
    """  # fmt: skip
    for row in rows_of(range(len(data)) if order is None else order, size):
        yield to_batch([data[i] for i in row], row, device)


def rows_of(order: Sequence[int], size: int) -> list[list[int]]:
    """Return the indices of each batch; a rest of less than half a batch joins the one before it.

    So no batch is too small for BatchNorm, or to be shared by several processes.
    """
    whole, rest = divmod(len(order), size)
    count = max(1, whole + (2 * rest >= size)) if len(order) else 0
    ends = [size * i for i in range(1, count)] + [len(order)] * (count > 0)
    return [list(order[a:b]) for a, b in zip([0, *ends], ends, strict=False)]


def to_batch(
    items: Sequence[tuple[Frame, int]], row: Sequence[int], device: torch.device | str
) -> Batch:
    """Return clips uint8 [T, H, W, 3] with their labels and indices as a batch on a device."""
    clip = to_tensor(np.stack([clip for clip, _ in items]), device)
    label = torch.tensor([label for _, label in items], device=device)
    return Batch(clip, label, torch.tensor(row))


def shuffled(count: int, *seed: int) -> list[int]:
    """Return 0 .. count-1 in an order drawn from a seed."""
    return [int(i) for i in np.random.default_rng(seed).permutation(count)]
