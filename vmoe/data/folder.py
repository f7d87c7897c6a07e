r"""A folder with a folder per class of video files.

    folder/hug/a.mp4 ...            split 70/15/15 by a hash of each file's group, or
    folder/train/hug/a.mp4 ...      as it is sorted already: train/, val/ (or valid/) and test/

A group is what `--group`, a regular expression, finds in a file's name (`seq\d+`: what was
recorded together stays together); without it, files of one name are a group. Frames are chosen
by their true timestamps, as the live runtime chooses them.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from vmoe import opencv
from vmoe.clips import ClipSpec, Frame, choose, prepare
from vmoe.data import DataSettings
from vmoe.data._splits import share_of, split_of
from vmoe.errors import SettingError

log = logging.getLogger("vmoe")

SUFFIXES = {
    ".3gp", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts",
    ".webm", ".wmv",
}  # fmt: skip
SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "test": "test"}
CACHE_BYTES = 1 << 30  # of prepared frames, kept by one process for all folders that it opens
UNKNOWN_FPS = 25.0  # of a file that gives neither timestamps nor a rate
NAMED = 3  # how many videos a line names

Files = dict[str, list[Path]]  # of each class


class Video(NamedTuple):
    """What is known of a file, once it has been decoded.

    Attributes:
        clips: every clip that can be cut from it, as T numbers of frames, int [N, T].
        frames: all as the spec has them, uint8 [F, H, W, 3]; None where that is too much to keep.
        fault: why there is no clip; where there are clips, empty or what is damaged.
    """

    clips: NDArray[np.int64]
    frames: Frame | None
    fault: str


@dataclass(frozen=True)
class FolderClips:
    """Clips of video files, one of each: in `train` another in every epoch, else the middle one.

    The order takes every class in turn.
    """

    spec: ClipSpec
    split: str
    settings: DataSettings
    labels: tuple[str, ...]
    files: tuple[tuple[Path, int], ...]

    def __len__(self) -> int:
        """How many clips."""
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Frame, int]:
        """Cut clip uint8 [T, H, W, 3]; return it and its label."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        path, label = self.files[index]
        video = read(path, self.spec)
        count = len(video.clips)
        if not count:
            raise SettingError(f"{path} has changed while it was in use: it {video.fault}.")
        at = (count - 1) // 2
        if self.split == "train":
            key = (self.settings.seed, self.settings.epoch, index)
            at = int(np.random.default_rng(key).integers(count))
        chosen = video.clips[at]
        if video.frames is not None:
            return video.frames[chosen], label
        wanted = set(chosen.tolist())
        with _capture(path) as capture:
            again = (
                _fit(bgr, self.spec) for i, (_, bgr) in enumerate(_frames(capture)) if i in wanted
            )
            return np.stack(list(islice(again, len(wanted)))), label


def open_clips(
    where: Path | None, split: str, spec: ClipSpec, settings: DataSettings
) -> FolderClips:
    """Open a folder with a folder per class.

    Every video is decoded here, once; one that gives no clip is left out, and a line says so.

    Args:
        where: the folder.
        split: train, val or test.
        spec: the clips wanted.
        settings: `clips` takes so many, from all classes in turn; `group`, `seed`, `epoch`.

    Raises:
        SettingError: no classes there, none of a class in this split, or none that can be used.
    """
    if where is None:
        raise SettingError("data 'folder' needs a path: give a folder with a folder per class.")
    if not where.is_dir():
        raise SettingError(f"{where} is no folder: give a folder with a folder per class.")
    official = _official(where)
    files = _sorted_already(where, official, split) if official else _drawn(where, split, settings)
    labels = tuple(sorted(files))
    survey = _look_at(files, spec, settings.clips)
    _refuse_empty(where, split, spec, files, survey)
    if survey.fresh:  # a training opens its data again in every epoch
        _tell(where, split, survey)
    found = tuple((path, labels.index(label)) for label, path in survey.usable)
    return FolderClips(spec, split, settings, labels, found)


class _Survey(NamedTuple):
    """What looking at the videos of a split found.

    Attributes:
        usable: label and file of every video that gives a clip.
        skipped: of each class, the videos that give none, and why.
        damaged: usable videos that are not whole, and why.
        tried: how many were looked at.
        fresh: whether one of them was read for the first time.
    """

    usable: list[tuple[str, Path]]
    skipped: dict[str, list[str]]
    damaged: list[str]
    tried: int
    fresh: bool


def _look_at(files: Files, spec: ClipSpec, most: int) -> _Survey:
    """Decode videos, every class in turn, until `most` of them give a clip; 0 is all."""
    usable: list[tuple[str, Path]] = []
    skipped: dict[str, list[str]] = {label: [] for label in sorted(files)}
    damaged: list[str] = []
    tried, fresh = 0, False
    for label, path in _in_turn(files):
        if most and len(usable) == most:
            break
        tried, fresh = tried + 1, fresh or _key(path, spec) not in _known
        video = read(path, spec)
        if len(video.clips):
            usable.append((label, path))
        if video.fault:
            (damaged if len(video.clips) else skipped[label]).append(f"{path.name} {video.fault}")
    return _Survey(usable, skipped, damaged, tried, fresh)


def _refuse_empty(where: Path, split: str, spec: ClipSpec, files: Files, survey: _Survey) -> None:
    for label, faults in survey.skipped.items():
        if len(faults) == len(files[label]):
            raise SettingError(
                f"{where}: none of the {len(faults)} videos of class {label!r} in the {split} "
                f"split gives a clip of {spec.frames} frames, {spec.spacing_s:g} s apart: "
                f"{_some(faults)}. Choose other --frames or --spacing, or other videos."
            )


def _tell(where: Path, split: str, survey: _Survey) -> None:
    """Say which videos are left out, and which are damaged."""
    out = list(chain.from_iterable(survey.skipped.values()))
    for names, fate in ((out, "skipped"), (survey.damaged, "used as far as they go")):
        if names:
            log.warning(
                "%s (%s): %d of %d videos %s: %s.",
                where, split, len(names), survey.tried, fate, _some(names),
            )  # fmt: skip


def _official(where: Path) -> dict[str, Path]:
    """Return the folders of splits that stand above the classes; none where there are none."""
    folders = _folders(where)
    splits = {SPLIT_FOLDERS[p.name]: p for p in folders if p.name in SPLIT_FOLDERS}
    # A class may be called train, beside bus and car.
    return splits if "train" in splits and (len(splits) > 1 or len(folders) == 1) else {}


def _sorted_already(where: Path, official: dict[str, Path], split: str) -> Files:
    if split not in official:
        raise SettingError(
            f"{where} has {', '.join(sorted(official))} but no folder {split}: add it, or give "
            f"{official['train']} as data, to have its videos split 70/15/15."
        )
    names = set(chain.from_iterable(_classes(folder) for folder in official.values()))
    files = _classes(official[split])
    missing = sorted(names - set(files))
    if missing or len(names) < 2:
        what = f"no video of class {_some(missing)}" if missing else "fewer than 2 classes"
        raise SettingError(
            f"{official[split]} has {what}: it must hold a folder of videos for each class."
        )
    return files


def _drawn(where: Path, split: str, settings: DataSettings) -> Files:
    """Return the files whose group's hash falls into the split."""
    every = _classes(where)
    if len(every) < 2:
        raise SettingError(
            f"{where} has {len(every)} folders of videos: data is a folder with a folder per "
            f"class, at least 2, of files such as {', '.join(sorted(SUFFIXES)[6:9])}."
        )
    groups = _groups(list(chain.from_iterable(every.values())), settings.group)
    files = {
        label: [path for path in paths if split_of(groups[path]) == split]
        for label, paths in every.items()
    }
    empty = [label for label, paths in files.items() if not paths]
    if empty:
        raise SettingError(
            f"{where}: the {split} split has no video of class {_some(empty)}: {len(groups)} "
            f"files in {len(set(groups.values()))} groups are split 70/15/15 by a hash of the "
            "group. Add videos, choose another --group, or sort them into train/, val/ and test/."
        )
    return files


def _groups(paths: list[Path], pattern: str) -> dict[Path, str]:
    """Return the group of each file: what the pattern finds in its name, else its stem."""
    if not pattern:
        return {path: path.stem for path in paths}
    try:
        found = {path: re.search(pattern, path.name) for path in paths}
    except re.error as e:
        raise SettingError(f"--group '{pattern}' is no regular expression: {e}.") from e
    missed = [path.name for path, match in found.items() if not match]
    if missed:
        raise SettingError(
            f"--group '{pattern}' finds nothing in {len(missed)} of {len(paths)} file names: "
            f"{_some(missed)}."
        )
    return {path: match[0] for path, match in found.items() if match}


def _classes(folder: Path) -> Files:
    """Return the video files of each class, in an order that is drawn from their names."""
    classes = {}
    for sub in _folders(folder):
        paths = [path for path in sub.rglob("*") if path.suffix.lower() in SUFFIXES]
        if paths:
            classes[sub.name] = sorted(paths, key=lambda path: (share_of(path.name), path))
    return classes


def _folders(where: Path) -> list[Path]:
    return [path for path in sorted(where.iterdir()) if path.is_dir() and path.name[0] != "."]


def _in_turn(files: Files) -> Iterator[tuple[str, Path]]:
    labels = sorted(files)
    for row in zip_longest(*(files[label] for label in labels)):
        yield from ((label, path) for label, path in zip(labels, row, strict=True) if path)


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


_Key = tuple[Path, int, int, ClipSpec]
_known: dict[_Key, Video] = {}  # of this process: a training opens its data again in every epoch
_kept_bytes = 0
_lock = threading.Lock()


def _key(path: Path, spec: ClipSpec) -> _Key:
    if not path.exists():  # a link to nothing
        return path, 0, 0, spec
    stat = path.stat()
    return path, stat.st_mtime_ns, stat.st_size, spec


def read(path: Path, spec: ClipSpec) -> Video:
    """Decode a file, once in a process; its frames are kept while there is room for them."""
    global _kept_bytes
    key = _key(path, spec)
    if key in _known:
        return _known[key]
    times: list[float] = []
    frames: list[Frame] | None = []
    room = CACHE_BYTES - _kept_bytes
    with _capture(path) as capture:
        for at_s, bgr in _frames(capture):
            times.append(at_s)
            if frames is not None:
                frames.append(_fit(bgr, spec))
                if len(frames) * frames[0].nbytes > room:
                    frames = None
        counted = capture.get(cv2.CAP_PROP_FRAME_COUNT)
    clips, fault = _cut(np.array(times), counted, spec)
    video = Video(clips, np.stack(frames) if frames and len(clips) else None, fault)
    with _lock:
        _known[key] = video
        _kept_bytes += video.frames.nbytes if video.frames is not None else 0
    return video


def _cut(
    times: NDArray[np.float64], counted: float, spec: ClipSpec
) -> tuple[NDArray[np.int64], str]:
    """Return every clip of frames with these timestamps, int [N, T], and what is wrong."""
    chosen = [choose(times, end, spec) for end in times]
    clips = np.array([c for c in chosen if c], np.int64).reshape(-1, spec.frames)
    if not len(times):
        return clips, "cannot be decoded"
    if len(times) < counted * 0.98 - 1:  # of some formats it is an estimate
        return clips, f"gives {len(times)} of its {counted:.0f} frames"
    if len(clips):
        return clips, ""
    lasts_s = times[-1] - times[0]
    if lasts_s < spec.window_s - spec.spacing_s / 2:
        return clips, f"lasts {lasts_s:.2f} s, a clip {spec.window_s:.2f} s"
    return clips, f"has frames up to {np.diff(times).max():.3f} s apart"


@contextmanager
def _capture(path: Path) -> Iterator[cv2.VideoCapture]:
    """Open a file for one thread; the file may turn out to hold no video."""
    opencv.quiet()
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    try:
        yield capture
    finally:
        capture.release()


def _frames(capture: cv2.VideoCapture) -> Iterator[tuple[float, Frame]]:
    """Yield the time in seconds and the pixels (BGR) of every frame; times rise."""
    last_s, fps = -np.inf, capture.get(cv2.CAP_PROP_FPS)
    period_s = 1 / (fps if 0 < fps < 10000 else UNKNOWN_FPS)
    while True:
        ok, bgr = capture.read()
        if not ok:
            return
        at_s = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
        if not at_s > last_s:  # some formats carry no timestamps, or step back
            at_s = last_s + period_s
        yield at_s, bgr
        last_s = at_s


def _fit(bgr: Frame, spec: ClipSpec) -> Frame:
    small: Frame = cv2.cvtColor(prepare(bgr, spec), cv2.COLOR_BGR2RGB)
    return small
