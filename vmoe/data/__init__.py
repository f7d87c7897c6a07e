"""Data sets, one file each; every clip is uint8 [T, H, W, 3], RGB, as the clip spec has it.

A file of this folder holds `open_clips(where, split, spec, settings) -> ClipData`. What a
command line calls DATA is `camera-motion`, a folder with a folder per class, or `NAME:/path`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from vmoe import registry
from vmoe.clips import ClipSpec, Frame
from vmoe.errors import SettingError, UnknownNameError
from vmoe.settings import Settings, opt

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class DataSettings(Settings):
    """How a data set is opened.

    Attributes:
        epoch: of training; a data set may render or cut other clips in each.
    """

    clips: int = opt(0, "how many clips; 0 is all (camera-motion: 2000)", at_least=0)
    group: str = opt("", "regular expression: files whose match is the same stay in one split")
    seed: int = opt(0, "random seed of what is drawn")
    epoch: int = opt(0, "epoch of training", at_least=0)


class ClipData(Protocol):
    """Clips with labels, in an order that never changes."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The K names."""

    def __len__(self) -> int:
        """How many clips."""

    def __getitem__(self, index: int) -> tuple[Frame, int]:
        """Return clip uint8 [T, H, W, 3] and the index of its label."""


def open_data(
    data: str, split: str, spec: ClipSpec, settings: DataSettings | None = None
) -> ClipData:
    """Open a data set by what a command line calls it.

    Args:
        data: `camera-motion`, a folder, or `NAME:/path`.
        split: train, val or test.
        spec: the clips wanted.
        settings: how many, which seed.

    Raises:
        UnknownNameError: no such data set, no such split.
        SettingError: nothing there that can be read.
    """
    if split not in SPLITS:
        raise UnknownNameError("split", split, SPLITS)
    name, _, where = data.partition(":")
    known = registry.names("vmoe.data")
    if name not in known:
        if not Path(data).is_dir():
            if "/" in data or Path(data).exists():
                raise SettingError(f"data {data!r} is no folder: give a folder with one per class.")
            raise UnknownNameError("data", data, [*known, "a folder with a folder per class"])
        name, where = "folder", data
    module = registry.load("vmoe.data", name, "data")
    path = Path(where) if where else None
    opened: ClipData = module.open_clips(path, split, spec, settings or DataSettings())
    return opened
