"""Small data sets in the layouts that they are published in."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.videos import write

FRAMES = 10  # of a video, at 20 per second: a clip of 4 frames, 0.1 s apart, fits
LABELS = ("ApplyEyeMakeup", "YoYo")
GROUPS = range(1, 8)  # of UCF-101: group 7 tests in fold 1, group 1 in fold 2
COLUMNS = ("label", "youtube_id", "time_start", "time_end", "split")


def video(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return write(path, FRAMES)


def folder(where: Path) -> str:
    """Write folder/split/class/video."""
    for split in ("train", "val", "test"):
        for label in ("hug", "kick"):
            for number in range(2):
                video(where / split / label / f"{split}_{number}.avi")
    return str(where)


def ucf101(where: Path) -> str:
    """Write two classes of seven groups; folds 1 and 2."""
    lists = where / "ucfTrainTestlist"
    lists.mkdir(parents=True)
    names = {
        label: {group: f"{label}/v_{label}_g{group:02d}_c01.avi" for group in GROUPS}
        for label in LABELS
    }
    for name in (name for of_label in names.values() for name in of_label.values()):
        video(where / "UCF-101" / name)
    lines = [f"{i} {label}" for i, label in enumerate(LABELS, 1)]
    (lists / "classInd.txt").write_text("\r\n".join(lines) + "\r\n")
    for fold, tested in ((1, 7), (2, 1)):
        train = [
            f"{names[label][group]} {i}"
            for i, label in enumerate(LABELS, 1)
            for group in GROUPS
            if group != tested
        ]
        (lists / f"trainlist0{fold}.txt").write_text("\n".join(train) + "\n")
        test = [names[label][tested] for label in LABELS]
        (lists / f"testlist0{fold}.txt").write_text("\n".join(test) + "\n\n")
    return f"ucf101:{where}"


def hmdb51(where: Path) -> str:
    """Write two classes of five films, two videos of each; film 4 tests, one more is unused."""
    lists = where / "testTrainMulti_7030_splits"
    lists.mkdir(parents=True)
    for label in ("brush_hair", "sit"):
        lines = []
        for film in range(5):
            for take in range(2):
                name = f"#Film_{film}_{label}_u_nm_np1_ba_goo_{take}.avi"
                video(where / label / name)
                lines.append(f"{name} {2 if film == 4 else 1} ")
        name = f"Other_{label}_u_nm_np1_ba_goo_0.avi"
        lines.append(f"{video(where / label / name).name} 0 ")
        (lists / f"{label}_test_split1.txt").write_text("\n".join(lines) + "\n")
    return f"hmdb51:{where}"


def kinetics(where: Path) -> str:
    """Write two classes; lists of all three splits with labels."""
    rows: dict[str, list[tuple[str, ...]]] = {"train": [], "validate": [], "test": []}
    for split, of_split in rows.items():
        for label in ("abseiling", "tai chi"):
            for number in range(3 if split == "train" else 1):
                video_id = f"-{split[:2]}_{label[:3]}{number}"
                of_split.append((label, video_id, "7", "17", split))
                video(where / split / label.replace(" ", "_") / f"{video_id}_000007_000017.mp4")
        write_csv(where / "annotations" / f"{split}.csv", of_split)
    return f"kinetics:{where}"


def write_csv(
    path: Path, rows: Iterable[tuple[str, ...]], columns: Iterable[str] = COLUMNS
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def camera_motion(where: Path) -> str:
    """Name the rendered data set; it needs no file."""
    return "camera-motion"


# Of every file in vmoe/data: what writes a small one, and how a command line then calls it.
LAYOUTS: dict[str, Callable[[Path], str]] = {
    "camera-motion": camera_motion,
    "folder": folder,
    "hmdb51": hmdb51,
    "kinetics": kinetics,
    "ucf101": ucf101,
}
