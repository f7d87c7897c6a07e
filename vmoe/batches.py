"""Clips in batches for the twin: uint8 at the door, float32 [B, C, T, H, W] inside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vmoe.clips import Clips, Frame
from vmoe.data import ClipData


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


class Held:
    """A data set whose clips are kept once they were read, up to a number of bytes."""

    def __init__(self, data: ClipData, limit_bytes: int = 4 << 30) -> None:
        """Wrap a data set; clips beyond the limit are read again each time."""
        self._data = data
        self._room = limit_bytes
        self._kept: dict[int, tuple[Frame, int]] = {}

    @property
    def labels(self) -> tuple[str, ...]:
        """The K names."""
        return self._data.labels

    def __len__(self) -> int:
        """How many clips."""
        return len(self._data)

    def __getitem__(self, index: int) -> tuple[Frame, int]:
        """Return clip uint8 [T, H, W, 3] and label, from memory where it is held."""
        if index in self._kept:
            return self._kept[index]
        item = self._data[index]
        if self._room >= item[0].nbytes:
            self._room -= item[0].nbytes
            self._kept[index] = item
        return item


def batches(
    data: ClipData,
    size: int,
    device: torch.device | str = "cpu",
    order: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Yield a data set in batches; a last one of a single clip joins the batch before it.

    Args:
        data: the clips.
        size: clips of a batch.
        device: where the tensors go.
        order: indices in the order wanted; default: as they stand.
    """  # fmt: skip
    indices = list(range(len(data)) if order is None else order)
    starts = list(range(0, len(indices), size))
    if len(starts) > 1 and len(indices) - starts[-1] == 1:  # BatchNorm cannot train on one clip
        starts.pop()
    for start, end in zip(starts, [*starts[1:], len(indices)], strict=True):
        rows = indices[start:end]
        items = [data[i] for i in rows]
        clip = to_tensor(np.stack([clip for clip, _ in items]), device)
        label = torch.tensor([label for _, label in items], device=device)
        yield Batch(clip, label, torch.tensor(rows))


def shuffled(count: int, *seed: int) -> list[int]:
    """Return 0 .. count-1 in an order drawn from a seed."""
    return [int(i) for i in np.random.default_rng(seed).permutation(count)]
