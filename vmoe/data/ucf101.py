"""UCF-101 (Soomro et al., 2012), as it is published: `ucf101:/path`, `--fold 1`, 2 or 3.

    path/UCF-101/<Class>/v_<Class>_g01_c01.avi
    path/ucfTrainTestlist/{classInd,trainlist01,testlist01}.txt

test is the official test list. val is held out of the official train list, by groups (g01: what
was cut from one recording): some of each class, the same for every run; train is the rest.
"""

from __future__ import annotations

import re
from pathlib import Path

from vmoe.clips import ClipSpec
from vmoe.data import DataSettings
from vmoe.data._lists import Row, below, found_of, read_lines, trained_or_held_out
from vmoe.data._videos import VideoClips, folder_of, open_videos
from vmoe.errors import SettingError

LISTS = "ucfTrainTestlist"
NAME = re.compile(r"(?P<label>[^/]+)/v_.+_(?P<group>g\d+)_c\d+\.avi")


def open_clips(
    where: Path | None, split: str, spec: ClipSpec, settings: DataSettings
) -> VideoClips:
    """Open UCF-101.

    Args:
        where: the folder that holds UCF-101/ and ucfTrainTestlist/.
        split: train, val or test.
        spec: the clips wanted.
        settings: of videos (`open_videos`), and `fold`.

    Raises:
        SettingError: a list is not there or cannot be read; a class has no video.
    """
    where = folder_of("ucf101", where, f"ucf101:/path, the folder with UCF-101 and {LISTS}")
    lists = where / LISTS
    labels = [line.split()[-1] for _, line in read_lines(lists / "classInd.txt")]
    if split == "test":
        rows = _rows(lists / f"testlist{settings.fold:02d}.txt", labels)
    else:
        official = _rows(lists / f"trainlist{settings.fold:02d}.txt", labels)
        rows = trained_or_held_out(official, split)
    videos = where / "UCF-101"
    find = below(videos if videos.is_dir() else where)
    found = found_of(where, labels, rows, find)
    return open_videos(found, split, spec, settings)


def _rows(path: Path, labels: list[str]) -> list[Row]:
    rows = []
    for number, line in read_lines(path):
        name = line.split()[0]
        match = NAME.fullmatch(name)
        if not match:
            raise SettingError(
                f"{path}, line {number} is {line!r}: it must be <Class>/v_<Class>_g01_c01.avi."
            )
        if match["label"] not in labels:
            raise SettingError(f"{path}, line {number}: classInd.txt has no class {name!r}.")
        rows.append(Row(match["label"], match["group"], name))
    return rows
