"""HMDB-51 (Kuehne et al., ICCV 2011), as it is published: `hmdb51:/path`, `--fold 1`, 2 or 3.

    path/<class>/<source>_<class>_<more>.avi                 or under path/hmdb51_org/
    path/testTrainMulti_7030_splits/<class>_test_split1.txt  <name> 1 (train), 2 (test) or 0

test is the official one. val is held out of the official train videos, by the film they were cut
from (what stands before the class in a name): some of each class; train is the rest.
"""

from __future__ import annotations

from pathlib import Path

from vmoe.clips import ClipSpec
from vmoe.data import DataSettings
from vmoe.data._lists import Row, below, found_of, read_lines, trained_or_held_out
from vmoe.data._videos import VideoClips, folder_of, open_videos
from vmoe.errors import SettingError

LISTS = "testTrainMulti_7030_splits"
TRAIN, TEST, UNUSED = "1", "2", "0"


def open_clips(
    where: Path | None, split: str, spec: ClipSpec, settings: DataSettings
) -> VideoClips:
    """Open HMDB-51.

    Args:
        where: the folder that holds the class folders and testTrainMulti_7030_splits/.
        split: train, val or test.
        spec: the clips wanted.
        settings: of videos (`open_videos`), and `fold`.

    Raises:
        SettingError: a list is not there or cannot be read; a class has no video.
    """
    where = folder_of("hmdb51", where, f"hmdb51:/path, the folder with the classes and {LISTS}")
    end = f"_test_split{settings.fold}.txt"
    lists = sorted((where / LISTS).glob(f"*{end}"))
    if not lists:
        raise SettingError(f"{where / LISTS} has no lists <class>{end}: get them with the videos.")
    labels = [path.name.removesuffix(end) for path in lists]
    wanted = TEST if split == "test" else TRAIN
    rows = [
        row
        for path, label in zip(lists, labels, strict=True)
        for row, flag in _rows(path, label)
        if flag == wanted
    ]
    if split != "test":
        rows = trained_or_held_out(rows, split)
    videos = where / "hmdb51_org"
    find = below(videos if videos.is_dir() else where)
    found = found_of(where, labels, rows, find)
    return open_videos(found, split, spec, settings)


def _rows(path: Path, label: str) -> list[tuple[Row, str]]:
    rows = []
    for number, line in read_lines(path):
        name, _, flag = line.rpartition(" ")
        name = name.strip()
        if not name or flag not in (TRAIN, TEST, UNUSED):
            raise SettingError(
                f"{path}, line {number} is {line!r}: it must be <name>.avi 0, 1 or 2."
            )
        source = Path(name).stem.partition(f"_{label}_")[0]
        rows.append((Row(label, source, f"{label}/{name}"), flag))
    return rows
