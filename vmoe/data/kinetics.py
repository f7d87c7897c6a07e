"""Kinetics-400, -600, -700 (Kay et al., 2017), as they are published: `kinetics:/path`.

    path/*.csv or path/annotations/*.csv     label,youtube_id,time_start,time_end,split
    path/**/<youtube_id>_<start>_<end>.mp4   seconds of six digits; in any folders below path

train, val and test are those of the column `split`. Where no row of a test list has a label (it
was kept secret for some versions), the official validation list is test, as the field reports it,
and val is held out of the train list.
"""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from vmoe.clips import ClipSpec
from vmoe.data import DataSettings
from vmoe.data._lists import Row, found_of, trained_or_held_out
from vmoe.data._videos import VideoClips, folder_of, is_video, open_videos
from vmoe.errors import SettingError

log = logging.getLogger("vmoe")

COLUMNS = ("label", "youtube_id", "time_start", "time_end", "split")
SPLIT_NAMES = {"train": "train", "val": "val", "validate": "val", "validation": "val",
               "test": "test"}  # fmt: skip

Lists = dict[str, list[Row]]  # of each split


def open_clips(
    where: Path | None, split: str, spec: ClipSpec, settings: DataSettings
) -> VideoClips:
    """Open Kinetics.

    Args:
        where: the folder that holds the CSV files and the videos.
        split: train, val or test.
        spec: the clips wanted.
        settings: of videos (`open_videos`).

    Raises:
        SettingError: no list there, or none of this split; a class has no video.
    """
    where = folder_of("kinetics", where, "kinetics:/path, the folder with the CSV files and videos")
    lists = _lists(where)
    labels = sorted({row.label for rows in lists.values() for row in rows})
    official = split
    if not lists["test"]:
        official = "val" if split == "test" else "train"
        log.info("%s: no list gives labels of test: the official validation is test", where)
    rows = lists[official]
    if not rows:
        raise SettingError(f"{where}: no CSV file has rows whose split is {official}: add it.")
    if official == "train" and not lists["test"]:
        rows = trained_or_held_out(rows, split)
    return open_videos(found_of(where, labels, rows, _videos(where).get), split, spec, settings)


def _lists(where: Path) -> Lists:
    """Return the rows of every split that have a label."""
    paths = [*sorted(where.glob("*.csv")), *sorted((where / "annotations").glob("*.csv"))]
    found: dict[str, dict[str, Row]] = {"train": {}, "val": {}, "test": {}}
    for path in paths:
        for split, row in _rows(path):
            found[split][row.name] = row  # a list may lie in both places
    if not any(found.values()):
        raise SettingError(
            f"{where} has no CSV file with the columns {', '.join(COLUMNS)}: Kinetics is known by "
            "its lists; put them there, or below annotations/."
        )
    return {split: list(rows.values()) for split, rows in found.items()}


def _rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield split and row of one CSV file; none where it is of other columns."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            if not set(COLUMNS) <= set(reader.fieldnames or ()):
                return
            for row in reader:
                yield _row(row, f"{path}, line {reader.line_num}")
    except OSError as e:
        raise SettingError(f"cannot read the list {path}: {e.strerror}.") from e
    except (UnicodeDecodeError, csv.Error) as e:
        raise SettingError(f"the list {path} is no CSV: {e}.") from e


def _row(row: dict[str, str], place: str) -> tuple[str, Row]:
    if any(not row[column] for column in COLUMNS):
        raise SettingError(f"{place} has no {next(c for c in COLUMNS if not row[c])}.")
    if row["split"] not in SPLIT_NAMES:
        raise SettingError(
            f"{place}: split is {row['split']!r}; it must be {', '.join(SPLIT_NAMES)}."
        )
    try:
        start, end = (round(float(row[column])) for column in ("time_start", "time_end"))
    except ValueError as e:
        raise SettingError(f"{place}: time_start and time_end must be seconds: {e}.") from e
    video = row["youtube_id"]
    return SPLIT_NAMES[row["split"]], Row(row["label"], video, f"{video}_{start:06d}_{end:06d}")


def _videos(where: Path) -> dict[str, Path]:
    """Return every video below a folder by its name without suffix."""
    found: dict[str, Path] = {}
    for folder, below, names in os.walk(where, followlinks=True):
        below.sort()
        for path in (Path(folder, name) for name in sorted(names)):
            if is_video(path):
                found.setdefault(path.stem, path)
    return found
