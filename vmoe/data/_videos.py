"""Clips of video files: one of each file, chosen by true timestamps, whatever lists the files.

A data set's file says which videos stand in a split (`Found`); all else is here: those that give
no clip are skipped and counted, a class that is left without one is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np

from vmoe import cli
from vmoe.clips import ClipSpec, Frame
from vmoe.data import DataSettings, _augment, _index, _kept
from vmoe.data._decode import SUFFIXES, cut
from vmoe.errors import SettingError

log = logging.getLogger("vmoe")

NAMED = 3  # how many videos a line names
ROUND = 256  # videos looked at together: what a kill can lose
MANY = 200  # videos whose decoding takes long enough for a progress bar

Files = dict[str, list[Path]]  # of each class


@dataclass(frozen=True)
class Found:
    """What a data set has for a split.

    Attributes:
        where: the data set's folder.
        files: of each class, in the order of the labels, its videos.
        missing: of each class, the videos that the data set's lists name and that are not there.
    """

    where: Path
    files: Files
    missing: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class VideoClips:
    """Clips of video files, one of each: in `train` another in every epoch, else the middle one.

    The order takes every class in turn.

    Attributes:
        files: every video, and the index of its label.
        augment: how the clips vary, some of `vmoe.data.AUGMENTATIONS`.
    """

    spec: ClipSpec
    split: str
    settings: DataSettings
    labels: tuple[str, ...]
    files: tuple[tuple[Path, int], ...]
    augment: tuple[str, ...] = ()

    def __len__(self) -> int:
        """How many clips."""
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Frame, int]:
        """Cut clip uint8 [T, H, W, 3]; return it and its label."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        path, label = self.files[index]
        folder = self.settings.cache
        times = _index.at(folder).times(path)
        clips, fault = cut(times, self.spec)
        if not len(clips):
            raise SettingError(f"{path} has changed while it was in use: it {fault}.")
        rng = np.random.default_rng((self.settings.seed, self.settings.epoch, index))
        at = int(rng.integers(len(clips))) if self.split == "train" else (len(clips) - 1) // 2
        larger = _augment.prepared(self.spec, self.augment)
        clip = _kept.clip(path, clips[at], len(times.at_s), larger, folder)
        return _augment.augment(clip, self.augment, self.spec, rng), label

    def at_epoch(self, epoch: int) -> VideoClips:
        """Return the same videos, of which other clips are cut."""
        return replace(self, settings=replace(self.settings, epoch=epoch))


def folder_of(name: str, where: Path | None, holds: str) -> Path:
    """Return a data set's folder.

    Raises:
        SettingError: none given, or none there.
    """
    if where is None:
        raise SettingError(f"data {name!r} needs a path: give {holds}.")
    if not where.is_dir():
        raise SettingError(f"{where} is no folder: give {holds}.")
    return where


def open_videos(found: Found, split: str, spec: ClipSpec, settings: DataSettings) -> VideoClips:
    """Open a split whose videos are known.

    Videos that nobody has looked at are decoded here, once for all runs. One that gives no clip is
    left out, and a line says so.

    Args:
        found: the videos.
        split: train, val or test.
        spec: the clips wanted.
        settings: `clips` takes so many, from all classes in turn; `seed`, `epoch`, `augment`.

    Raises:
        SettingError: a class has no video, or none that can be used.
    """
    labels = tuple(found.files)
    augment = _augment.kinds(settings, split, labels)
    _refuse_missing(found, split)
    survey = _look_at(found, split, spec, settings)
    _refuse_unusable(found, split, spec, survey)
    _tell(found, split, survey)
    number = {label: i for i, label in enumerate(labels)}
    files = tuple((path, number[label]) for label, path in survey.usable)
    return VideoClips(spec, split, settings, labels, files, augment)


@dataclass
class _Survey:
    """What looking at the videos of a split has found.

    Attributes:
        usable: label and file of every video that gives a clip.
        skipped: of each class, the videos that give none, and why.
        damaged: usable videos that are not whole, and why.
        tried: how many were looked at.
    """

    usable: list[tuple[str, Path]]
    skipped: dict[str, list[str]]
    damaged: list[str]
    tried: int = 0

    def note(self, label: str, path: Path, clips: int, fault: str) -> None:
        """Add one video."""
        self.tried += 1
        if clips:
            self.usable.append((label, path))
        if fault:
            (self.damaged if clips else self.skipped[label]).append(f"{path.name} {fault}")


def _look_at(found: Found, split: str, spec: ClipSpec, settings: DataSettings) -> _Survey:
    """Look at videos, every class in turn, until `clips` of them give a clip; 0 is all."""
    index, queue = _index.at(settings.cache), list(_in_turn(found.files))
    most = settings.clips or len(queue)
    survey = _Survey([], {label: [] for label in found.files}, [])

    def one_by_one() -> Iterator[None]:
        while survey.tried < len(queue) and len(survey.usable) < most:
            # Never more than are still wanted: what is looked at does not depend on the cores.
            part = queue[survey.tried :][: min(ROUND, most - len(survey.usable))]
            every = index.look_at([path for _, path in part])
            for (label, path), times in zip(part, every, strict=True):
                clips, fault = cut(times, spec)
                survey.note(label, path, len(clips), fault)
                yield

    wanted, looked = [path for _, path in queue[:most]], one_by_one()
    if len(wanted) > MANY and index.unknown(wanted) > MANY:
        looked = cli.progress(looked, f"{found.where} ({split}): videos looked at", len(wanted))
    for _ in looked:
        pass
    return survey


def _refuse_missing(found: Found, split: str) -> None:
    bare = [label for label, paths in found.files.items() if not paths]
    if not bare:
        return
    named = found.missing.get(bare[0], ())
    why = f"none of the {len(named)} that its lists name is there: {some(named)}"
    raise SettingError(
        f"{found.where}: the {split} split has no video of class {some(bare)}: "
        f"{why if named else 'its lists name none'}."
    )


def _refuse_unusable(found: Found, split: str, spec: ClipSpec, survey: _Survey) -> None:
    for label, faults in survey.skipped.items():
        if len(faults) == len(found.files[label]):
            raise SettingError(
                f"{found.where}: none of the {len(faults)} videos of class {label!r} in the "
                f"{split} split gives a clip of {spec.frames} frames, {spec.spacing_s:g} s apart: "
                f"{some(faults)}. Choose other --frames or --spacing, or other videos."
            )


_told: set[tuple[str, ...]] = set()  # in this process: a split is opened more than once


def _tell(found: Found, split: str, survey: _Survey) -> None:
    """Say which videos are not there, which are left out, and which are damaged; all with -v."""
    out = list(chain.from_iterable(survey.skipped.values()))
    missing = list(chain.from_iterable(found.missing.values()))
    listed = len(missing) + sum(map(len, found.files.values()))
    for names, of, fate in (
        (missing, listed, "are in the lists and not there, skipped"),
        (out, survey.tried, "skipped"),
        (survey.damaged, survey.tried, "used as far as they go"),
    ):
        line = (str(found.where), split, fate, *names)
        if names and line not in _told:
            _told.add(line)
            log.warning(
                "%s (%s): %d of %d videos %s: %s.",
                found.where, split, len(names), of, fate, some(names),
            )  # fmt: skip
            for name in names[NAMED:]:
                log.debug("%s: %s", fate, _printable(name))


def _in_turn(files: Files) -> Iterator[tuple[str, Path]]:
    for row in zip_longest(*files.values()):
        yield from ((label, path) for label, path in zip(files, row, strict=True) if path)


def is_video(path: Path) -> bool:
    """Return whether a file's name is that of a video."""
    return path.suffix.lower() in SUFFIXES


def some(names: Sequence[str]) -> str:
    """Return the first few names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(map(_printable, names[:NAMED])) + more


def _printable(name: str) -> str:
    """Return a name as any log can hold it: what is no UTF-8 in it is escaped."""
    return name.encode("utf-8", "backslashreplace").decode()
