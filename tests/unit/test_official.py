"""UCF-101, HMDB-51 and Kinetics in their official layouts, and lists that are bad."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from tests import layouts
from vmoe.clips import ClipSpec
from vmoe.data import SPLITS, DataSettings, open_data
from vmoe.data._splits import held_out
from vmoe.data._videos import VideoClips
from vmoe.errors import SettingError

SPEC = ClipSpec(frames=4, spacing_s=0.1, height=32, width=32)


def names(data: str, split: str, fold: int = 1) -> set[str]:
    found = open_data(data, split, SPEC, DataSettings(fold=fold))
    assert isinstance(found, VideoClips)
    return {path.name for path, _ in found.files}


def refused(data: str, message: str, split: str = "train", fold: int = 1) -> None:
    with pytest.raises(SettingError, match=message) as e:
        open_data(data, split, SPEC, DataSettings(fold=fold))
    assert "\n" not in str(e.value)


def groups(of: set[str], label: str) -> set[str]:
    return {found[1] for n in of if (found := re.fullmatch(f"v_{label}_(g\\d+)_c01.avi", n))}


def test_ucf101_tests_on_the_official_list_and_validates_on_groups_of_train(tmp_path: Path) -> None:
    data = layouts.ucf101(tmp_path)
    for fold, tested in ((1, "g07"), (2, "g01")):
        of = {split: names(data, split, fold) for split in SPLITS}
        for label in layouts.LABELS:
            train, val, test = (groups(of[split], label) for split in SPLITS)
            assert test == {tested}
            assert len(val) == 1  # of six, 15 %
            assert train | val == {f"g{i:02d}" for i in layouts.GROUPS} - {tested}
            assert not train & val
    assert open_data(data, "val", SPEC).labels == layouts.LABELS


def test_what_validates_depends_on_the_list_not_on_what_is_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = layouts.ucf101(tmp_path)
    train, val = names(data, "train"), names(data, "val")
    gone = sorted(train)[0]
    next(tmp_path.rglob(gone)).unlink()
    caplog.clear()
    assert names(data, "train") == train - {gone}
    (line,) = caplog.messages
    label = gone.split("_")[1]
    said = f"1 of 10 videos are in the lists and not there, skipped: {label}/{gone}."
    assert line == f"{tmp_path} (train): {said}"
    assert names(data, "val") == val


def test_videos_may_lie_beside_the_lists(tmp_path: Path) -> None:
    data = layouts.ucf101(tmp_path)
    wanted = names(data, "test")
    for folder in (tmp_path / "UCF-101").iterdir():
        folder.rename(tmp_path / folder.name)
    (tmp_path / "UCF-101").rmdir()
    assert names(data, "test") == wanted
    hmdb = layouts.hmdb51(tmp_path / "hmdb")
    wanted = names(hmdb, "test")
    (tmp_path / "hmdb/hmdb51_org").mkdir()
    for label in ("brush_hair", "sit"):
        (tmp_path / "hmdb" / label).rename(tmp_path / "hmdb/hmdb51_org" / label)
    assert names(hmdb, "test") == wanted


def test_bad_lists_of_ucf101(tmp_path: Path) -> None:
    data = layouts.ucf101(tmp_path)
    lists = tmp_path / "ucfTrainTestlist"
    refused(data, r"cannot read the list .*trainlist03\.txt: No such file", fold=3)
    train = (lists / "trainlist01.txt").read_text()
    (lists / "trainlist01.txt").write_text(train + "YoYo/strange.avi 2\n")
    refused(data, r"trainlist01.txt, line 13 is 'YoYo/strange.avi 2': it must be <Class>/v_")
    (lists / "trainlist01.txt").write_text("Yoyo/v_YoYo_g01_c01.avi 2\n")
    refused(data, r"line 1: classInd.txt has no class 'Yoyo/v_YoYo_g01_c01.avi'")
    (lists / "trainlist01.txt").write_bytes(b"\xff\xfe\x00")
    refused(data, "trainlist01.txt is no text")
    (lists / "trainlist01.txt").write_text("YoYo/v_YoYo_g01_c01.avi 2\n")
    refused(data, "all training videos of class 'YoYo' are of one group, 'g01'")
    (lists / "trainlist01.txt").write_text(train.replace("YoYo", "ApplyEyeMakeup"))
    refused(data, "the train split has no video of class YoYo: its lists name none")


def test_a_class_without_a_video_is_refused(tmp_path: Path) -> None:
    data = layouts.ucf101(tmp_path)
    for path in (tmp_path / "UCF-101/YoYo").iterdir():
        path.unlink()
    refused(
        data, "the train split has no video of class YoYo: none of the 5 that its lists name is "
        r"there: YoYo/v_YoYo_g0\d_c01.avi, .* and 2 more",
    )  # fmt: skip


def test_hmdb51_validates_on_films_of_train(tmp_path: Path) -> None:
    data = layouts.hmdb51(tmp_path)
    of = {split: names(data, split) for split in SPLITS}
    for label in ("brush_hair", "sit"):
        films = {
            split: {n.split(f"_{label}_")[0] for n in of[split] if f"_{label}_" in n}
            for split in SPLITS
        }
        assert films["test"] == {"#Film_4"}
        assert len(films["val"]) == 1
        assert films["train"] | films["val"] == {f"#Film_{i}" for i in range(4)}
        assert not films["train"] & films["val"]
    assert sum(len(n) for n in of.values()) == 20  # flag 0 stands in none
    lists = tmp_path / "testTrainMulti_7030_splits"
    refused(data, "has no lists <class>_test_split2.txt", fold=2)
    (lists / "sit_test_split1.txt").write_text("a_sit_0.avi 3\n")
    refused(
        data, r"sit_test_split1.txt, line 1 is 'a_sit_0.avi 3': it must be <name>.avi 0, 1 or 2"
    )


def test_kinetics_by_its_column_of_splits(tmp_path: Path) -> None:
    data = layouts.kinetics(tmp_path)
    (tmp_path / "labels.csv").write_text("id,name\n0,abseiling\n")  # of other columns
    of = {split: names(data, split) for split in SPLITS}
    assert {split: len(n) for split, n in of.items()} == {"train": 6, "val": 2, "test": 2}
    assert all(n.startswith("-va") for n in of["val"])
    assert open_data(data, "train", SPEC).labels == ("abseiling", "tai chi")


def test_kinetics_without_labels_of_test(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = layouts.kinetics(tmp_path)
    unlabelled = [("-te_abs0", "7", "17", "test")]
    layouts.write_csv(tmp_path / "annotations/test.csv", unlabelled, layouts.COLUMNS[1:])
    caplog.set_level(logging.INFO, "vmoe")
    of = {split: names(data, split) for split in SPLITS}
    assert all(n.startswith("-va") for n in of["test"])
    assert len(of["val"]) == 2  # one of three of each class
    assert len(of["train"]) == 4
    assert not of["train"] & of["val"]
    assert "the official validation is test" in caplog.text


def test_bad_lists_of_kinetics(tmp_path: Path) -> None:
    data = layouts.kinetics(tmp_path)
    more = tmp_path / "more.csv"
    for row, message in (
        (
            ("tai chi", "x", "7", "17", "holdout"),
            "more.csv, line 2: split is 'holdout'; it must be",
        ),
        (
            ("tai chi", "x", "soon", "17", "train"),
            "line 2: time_start and time_end must be seconds",
        ),
        (("", "x", "7", "17", "train"), "line 2 has no label"),
        (("tai chi", "x", "7"), "line 2 has no time_end"),
    ):
        layouts.write_csv(more, [row])
        refused(data, message)
    more.write_bytes(b"label,\xff\n")
    refused(data, "more.csv is no CSV")
    more.unlink()
    for split in ("validate", "test"):
        (tmp_path / f"annotations/{split}.csv").unlink()
    refused(data, "no CSV file has rows whose split is val: add it", "test")
    (tmp_path / "annotations/train.csv").unlink()
    refused(data, "has no CSV file with the columns label, youtube_id, time_start")


def test_some_groups_of_every_class_are_held_out() -> None:
    groups = [f"g{i:02d}" for i in range(8, 26)]
    chosen = {label: held_out(label, groups) for label in ("a", "b", "c")}
    assert {len(found) for found in chosen.values()} == {3}
    assert len({frozenset(found) for found in chosen.values()}) > 1
    assert held_out("a", reversed(groups * 2)) == chosen["a"]
    assert len(held_out("a", groups[:2])) == 1
