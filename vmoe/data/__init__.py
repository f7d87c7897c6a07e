"""Data sets, one file each; every clip is uint8 [T, H, W, 3], RGB, as the clip spec has it.

A file of this folder holds `open_clips(where, split, spec, settings) -> DataSet`. What a command
line calls DATA is `camera-motion`, a folder with a folder per class, or `NAME:/path`.
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
AUGMENTATIONS = ("crop", "flip", "jitter")


@dataclass(frozen=True)
class DataSettings(Settings):
    """How a data set is opened.

    Attributes:
        epoch: of training; a data set may render or cut other clips in each.
        augment: of the split `train` alone; what is drawn depends on seed, epoch and index.
        cache: changes no clip, only how fast they come: no part of a recipe.
    """

    clips: int = opt(0, "how many clips; 0 is all (camera-motion: 2000)", at_least=0)
    group: str = opt("", "regular expression: files whose match is the same stay in one split")
    seed: int = opt(0, "random seed of what is drawn")
    epoch: int = opt(0, "epoch of training", at_least=0)
    fold: int = opt(1, "official split of ucf101 and hmdb51, 1 to 3", at_least=1, at_most=3)
    augment: tuple[str, ...] = opt(
        ("auto",), "how training clips vary: crop, flip, jitter; none; auto is all that keeps "
        "the label", choices=("auto", "none", *AUGMENTATIONS),
    )  # fmt: skip
    cache: Path | None = opt(
        None, "folder that keeps prepared frames (per frame 3 bytes a pixel), and what is known "
        "of videos; default: frames in memory up to 1 GiB",
    )  # fmt: skip

    def __post_init__(self) -> None:
        """Check every value; auto and none stand alone."""
        super().__post_init__()
        if not self.augment or (len(self.augment) > 1 and {"auto", "none"} & set(self.augment)):
            raise SettingError(
                f"--augment is {','.join(self.augment) or 'empty'}; give auto, none, or some of "
                f"{','.join(AUGMENTATIONS)}."
            )


class ClipData(Protocol):
    """Clips with labels, in an order that never changes."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The K names."""

    def __len__(self) -> int:
        """How many clips."""

    def __getitem__(self, index: int) -> tuple[Frame, int]:
        """Return clip uint8 [T, H, W, 3] and the index of its label."""


class DataSet(ClipData, Protocol):
    """One split of a data set. It can be pickled, and gives the same clips in any process."""

    def at_epoch(self, epoch: int) -> DataSet:
        """Return the same split as it is in an epoch of training, at no cost."""


def open_data(
    data: str, split: str, spec: ClipSpec, settings: DataSettings | None = None
) -> DataSet:
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
            if where and "/" not in name:  # NAME:/path, of a name that is none
                raise UnknownNameError("data set", name, known)
            if "/" in data or Path(data).exists():
                raise SettingError(f"data {data!r} is no folder: give a folder with one per class.")
            names = ["a folder with a folder per class" if n == "folder" else n for n in known]
            raise UnknownNameError("data", data, names)
        name, where = "folder", data
    module = registry.load("vmoe.data", name, "data")
    path = Path(where) if where else None
    opened: DataSet = module.open_clips(path, split, spec, settings or DataSettings())
    return opened
