r"""A folder with a folder per class of video files.

    folder/hug/a.mp4 ...            split 70/15/15 by a hash of each file's group, or
    folder/train/hug/a.mp4 ...      as it is sorted already: train/, val/ (or valid/) and test/

A group is what `--group`, a regular expression, finds in a file's name (`seq\d+`: what was
recorded together stays together); without it, files of one name are a group.
"""

from __future__ import annotations

import logging
import re
from itertools import chain
from pathlib import Path

from vmoe.clips import ClipSpec
from vmoe.data import DataSettings
from vmoe.data._decode import SUFFIXES
from vmoe.data._splits import in_drawn_order, split_of
from vmoe.data._videos import (
    Files,
    Found,
    VideoClips,
    folder_of,
    is_video,
    open_videos,
    some,
)
from vmoe.errors import SettingError

log = logging.getLogger("vmoe")

SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "test": "test"}


def open_clips(
    where: Path | None, split: str, spec: ClipSpec, settings: DataSettings
) -> VideoClips:
    """Open a folder with a folder per class.

    Args:
        where: the folder.
        split: train, val or test.
        spec: the clips wanted.
        settings: of videos (`open_videos`), and `group`.

    Raises:
        SettingError: no classes there, none of a class in this split, or none that can be used.
    """
    where = folder_of("folder", where, "a folder with a folder per class")
    official = _official(where)
    files = _sorted_already(where, official, split) if official else _drawn(where, split, settings)
    return open_videos(Found(where, dict(sorted(files.items()))), split, spec, settings)


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
        what = f"no video of class {some(missing)}" if missing else "fewer than 2 classes"
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
            f"{where}: the {split} split has no video of class {some(empty)}: {len(groups)} "
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
            f"{some(missed)}."
        )
    return {path: match[0] for path, match in found.items() if match}


def _classes(folder: Path) -> Files:
    """Return the video files of each class, in an order that is drawn from their names."""
    classes, others = {}, []
    for sub in _folders(folder):
        paths = [path for path in sub.rglob("*") if is_video(path)]
        if paths:
            classes[sub.name] = in_drawn_order(paths)
        elif any(sub.iterdir()):
            others.append(sub.name)
        else:
            raise SettingError(f"{sub} is empty: put videos of that class there, or remove it.")
    if others:
        log.warning("%s: no class, since no video is in it: %s.", folder, some(others))
    return classes


def _folders(where: Path) -> list[Path]:
    return [path for path in sorted(where.iterdir()) if path.is_dir() and path.name[0] != "."]
