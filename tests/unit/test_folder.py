"""A folder with a folder per class: splits, sampling by time, and videos that are bad."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from vmoe.clips import ClipSpec, prepare
from vmoe.data import SPLITS, ClipData, DataSettings, _decode, _index, _kept, folder, open_data
from vmoe.data._decode import Times, cut, decode, timestamps
from vmoe.data._splits import split_of
from vmoe.data._videos import VideoClips
from vmoe.errors import SettingError

SPEC = ClipSpec(frames=4, spacing_s=0.1, height=32, width=32)
SEQUENCE = r"seq\d+"


def write_video(path: Path, frames: int = 12, fps: float = 20, colour: int = 0) -> Path:
    """Write a video; its frame i is red 16 i, green `colour`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    wanted = cv2.VideoWriter_fourcc(*"MJPG")  # type: ignore[attr-defined]
    writer = cv2.VideoWriter(str(path), wanted, fps, (64, 48))
    assert writer.isOpened()
    for i in range(frames):
        writer.write(np.full((48, 64, 3), (0, colour, 16 * i % 256), np.uint8))  # BGR
    writer.release()
    return path


def number(frame: np.ndarray) -> int:
    """Return which frame of a written video this is."""
    return round(float(frame[:, :, 0].mean()) / 16)


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    """Return a folder whose videos are split by a hash; their names are of all three splits."""
    for label, colour in (("hug", 100), ("kick", 200)):
        for split in SPLITS:
            for name in names_of(split, 2):
                write_video(tmp_path / label / f"{label}_{name}_1.avi", colour=colour)
    return tmp_path


def names_of(split: str, count: int) -> list[str]:
    every = (f"seq{i:02d}" for i in range(1, 100))
    return [name for name in every if split_of(name) == split][:count]


@pytest.fixture
def sorted_already(tmp_path: Path) -> Path:
    for split in ("train", "valid", "test"):
        for label in ("hug", "kick"):
            write_video(tmp_path / split / label / "a.avi")
    return tmp_path


def test_groups_are_split_and_stay_together(drawn: Path) -> None:
    seen: dict[str, set[str]] = {}
    for split in SPLITS:
        data = open_data(str(drawn), split, SPEC, DataSettings(group=SEQUENCE))
        assert data.labels == ("hug", "kick")
        assert len(data) == 4
        assert [data[i][1] for i in range(4)] == [0, 1, 0, 1]
        seen[split] = groups(data)
        assert seen[split] == set(names_of(split, 2))
    assert set.union(*seen.values()) == set(names_of("train", 2)).union(
        names_of("val", 2), names_of("test", 2)
    )


def groups(data: ClipData) -> set[str]:
    assert isinstance(data, VideoClips)
    return {re.findall(SEQUENCE, path.name)[0] for path, _ in data.files}


def test_without_a_group_the_stem_decides(drawn: Path) -> None:
    paths = list(drawn.rglob("*.avi"))
    for split in SPLITS:
        mine = {path for path in paths if split_of(path.stem) == split}
        try:
            data = folder.open_clips(drawn, split, SPEC, DataSettings())
        except SettingError:
            assert len({path.parent for path in mine}) < 2
        else:
            assert {path for path, _ in data.files} == mine


def test_folders_of_splits_are_taken_as_they_are(sorted_already: Path) -> None:
    for split, name in (("train", "train"), ("val", "valid"), ("test", "test")):
        data = folder.open_clips(sorted_already, split, SPEC, DataSettings())
        assert {path.parent.parent.name for path, _ in data.files} == {name}
        assert data.labels == ("hug", "kick")


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for label in ("bus", "train"):
        write_video(tmp_path / label / f"{names_of('train', 1)[0]}.avi")
    data = folder.open_clips(tmp_path, "train", SPEC, DataSettings())
    assert data.labels == ("bus", "train")


def test_the_middle_clip_by_true_times(drawn: Path) -> None:
    data = open_data(str(drawn), "val", SPEC, DataSettings(group=SEQUENCE))
    clip, label = data[1]
    assert clip.shape == SPEC.shape
    assert clip.dtype == np.uint8
    # 12 frames 0.05 s apart, clips of frames 0.1 s apart: clips end with frame 6 .. 11, or with 5
    # whose first frame is half a spacing off, on frame 0 that nothing else takes.
    assert [number(frame) for frame in clip] == [2, 4, 6, 8]
    assert abs(int(clip[0, 0, 0, 1]) - 200) < 6  # green of label 1: channels are RGB
    assert label == 1
    assert np.array_equal(data[1][0], clip)


def test_training_draws_the_start_from_seed_epoch_and_index(drawn: Path) -> None:
    starts = {}
    for epoch in range(20):
        settings = DataSettings(group=SEQUENCE, epoch=epoch, seed=1, augment=("none",))
        data = open_data(str(drawn), "train", SPEC, settings)
        clips = [data[i][0] for i in range(4)]
        for clip in clips:
            taken = [number(frame) for frame in clip]
            assert set(np.diff(taken)) <= {1, 2}
        assert all(np.array_equal(data[i][0], clips[i]) for i in range(4))
        starts[epoch] = [number(clip[0]) for clip in clips]
    drawn_starts = {start for row in starts.values() for start in row}
    assert drawn_starts >= {0, 1, 2, 3, 4, 5}
    assert len({tuple(row) for row in starts.values()}) > 10
    other = open_data(str(drawn), "train", SPEC, DataSettings(group=SEQUENCE, seed=2))
    assert isinstance(other, VideoClips)
    assert other.files == data.files  # type: ignore[attr-defined]


def test_some_clips_are_spread_over_the_classes(drawn: Path) -> None:
    whole = open_data(str(drawn), "train", SPEC, DataSettings(group=SEQUENCE))
    some = open_data(str(drawn), "train", SPEC, DataSettings(group=SEQUENCE, clips=2))
    assert [some[i][1] for i in range(len(some))] == [0, 1]
    assert some.files == whole.files[:2]  # type: ignore[attr-defined]
    many = open_data(str(drawn), "train", SPEC, DataSettings(group=SEQUENCE, clips=100))
    assert len(many) == 4


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return a list that gets every video file that is opened, in an empty memory."""
    files: list[Path] = []
    capture = _decode._capture
    monkeypatch.setattr(_decode, "_capture", lambda path: files.append(path) or capture(path))
    monkeypatch.setattr(_kept, "_memory", _kept._Memory())
    return files


def test_a_video_is_looked_at_once_ever_and_decoded_once_in_a_process(
    drawn: Path, opened: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def epoch(number: int) -> list[np.ndarray]:
        settings = DataSettings(group=SEQUENCE, epoch=number)
        data = open_data(str(drawn), "train", SPEC, settings)
        return [data[i][0] for i in range(4)]

    first = epoch(0)
    assert sorted(opened) == sorted([*set(opened), *set(opened)])  # timestamps, pixels
    assert len(opened) == 8
    epoch(1)
    assert len(opened) == 8
    _index.at.cache_clear()  # as in another process
    monkeypatch.setattr(_kept, "_memory", _kept._Memory())
    assert all(np.array_equal(a, b) for a, b in zip(epoch(0), first, strict=True))
    assert len(opened) == 12


def test_what_does_not_fit_into_memory_is_decoded_again(
    drawn: Path, opened: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = open_data(str(drawn), "train", SPEC, DataSettings(group=SEQUENCE))
    wanted = [data[i][0] for i in range(4)]
    monkeypatch.setattr(_kept, "_memory", _kept._Memory())
    _kept.share_memory(1 << 30)  # of so many processes
    for times in (1, 2):
        assert all(np.array_equal(data[i][0], wanted[i]) for i in range(4))
        assert len(opened) == 8 + 4 * times


def test_a_file_that_changes_is_read_again(drawn: Path) -> None:
    data = folder.open_clips(drawn, "val", SPEC, DataSettings(group=SEQUENCE))
    path = data.files[0][0]
    write_video(path, frames=2)
    with pytest.raises(SettingError, match=r"has changed while it was in use: it lasts 0\.05 s"):
        data[0]


def test_bad_videos_are_skipped_in_one_line(
    drawn: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    good = folder.open_clips(drawn, "train", SPEC, DataSettings(group=SEQUENCE)).files
    name = names_of("train", 1)[0]
    write_video(drawn / "hug" / f"short_{name}.avi", frames=3)
    write_video(drawn / "hug" / f"slow_{name}.avi", fps=4)
    (drawn / "hug" / f"garbage_{name}.avi").write_bytes(b"garbage")
    (drawn / "hug" / f"empty_{name}.avi").touch()
    (drawn / "hug" / f"nowhere_{name}.avi").symlink_to("nothing.avi")
    (drawn / "hug" / "notes.txt").write_text("no video")
    with caplog.at_level(logging.WARNING, "vmoe"):
        data = folder.open_clips(drawn, "train", SPEC, DataSettings(group=SEQUENCE))
    assert sorted(data.files) == sorted(good)
    (line,) = caplog.messages
    assert line.startswith(f"{drawn} (train): 5 of 9 videos skipped: ")
    assert line.endswith(" and 2 more.")
    assert "\n" not in line
    caplog.clear()
    folder.open_clips(drawn, "train", SPEC, DataSettings(group=SEQUENCE, epoch=1))
    assert not caplog.messages  # it has been said
    assert capfd.readouterr().err == ""  # nor does FFmpeg talk


@pytest.mark.parametrize(
    ("frames", "fps", "fault"),
    [
        (3, 20, "lasts 0.10 s, a clip 0.30 s"),
        (12, 4, "has frames up to 0.250 s apart"),
        (0, 20, "cannot be decoded"),
    ],
)
def test_why_a_video_gives_no_clip(tmp_path: Path, frames: int, fps: float, fault: str) -> None:
    path = write_video(tmp_path / "a.avi", frames, fps)
    clips, why = cut(timestamps(path), SPEC)
    assert why == fault
    assert clips.shape == (0, 4)


def test_a_video_that_breaks_off_is_used_as_far_as_it_goes(
    sorted_already: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_video(sorted_already / "train" / "hug" / "b.avi", frames=150)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    found = folder.open_clips(sorted_already, "train", SPEC, DataSettings())
    assert path in {p for p, _ in found.files}
    (line,) = caplog.messages
    assert re.search(r"1 of 3 videos used as far as they go: b\.avi gives \d+ of its 150", line)


def test_uneven_times() -> None:
    times = np.array([0.0, 0.08, 0.14, 0.19, 0.26, 0.33, 0.4])
    clips, fault = cut(Times(times, len(times)), SPEC)
    assert fault == ""
    assert [1, 3, 5, 6] in clips.tolist()
    gap = np.array([0.0, 0.1, 0.2, 0.3, 0.7, 0.8])
    assert cut(Times(gap, 6), SPEC)[0].tolist() == [[0, 1, 2, 3]]
    assert cut(Times(gap[1:], 5), SPEC)[1] == "has frames up to 0.400 s apart"


def test_frames_are_prepared_as_the_runtime_prepares_them(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.avi")
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    rgb = cv2.cvtColor(capture.read()[1], cv2.COLOR_BGR2RGB)
    assert np.array_equal(decode(path, np.array([0]), SPEC)[0], prepare(rgb, SPEC))


def refused(where: Path, message: str, split: str = "val", group: str = SEQUENCE) -> None:
    with pytest.raises(SettingError, match=message) as e:
        folder.open_clips(where, split, SPEC, DataSettings(group=group))
    assert "\n" not in str(e.value)


def test_what_cannot_be_used_says_what_to_do(
    drawn: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    refused(drawn, r"'\(' is no regular expression", group="(")
    refused(
        drawn, r"'take\\d' finds nothing in 12 of 12 file names: .* and 9 more", group=r"take\d"
    )
    refused(drawn, "12 files in 1 groups are split 70/15/15 .* Add videos, choose", group="s")
    for path in drawn.glob(f"kick/*{names_of('val', 1)[0]}*"):
        path.unlink()
    for path in drawn.glob(f"kick/*{names_of('val', 2)[1]}*"):
        path.write_bytes(b"x")
    refused(drawn, "none of the 1 videos of class 'kick' in the val split .* cannot be decoded")
    shutil.rmtree(drawn / "kick")
    refused(drawn, "has 1 folders of videos: data is a folder with a folder per class")
    refused(tmp_path_factory.mktemp("empty"), "has 0 folders of videos")
    refused(drawn / "none", "is no folder")
    with pytest.raises(SettingError, match="'folder' needs a path"):
        open_data("folder", "val", SPEC)


def test_sorted_folders_that_lack_something(sorted_already: Path) -> None:
    shutil.rmtree(sorted_already / "test" / "kick")
    refused(sorted_already, "test has no video of class kick", "test")
    shutil.rmtree(sorted_already / "test")
    refused(sorted_already, "has train, val but no folder test: add it, or give .*train", "test")


@pytest.mark.parametrize("split", SPLITS)
def test_real_clips(real_data: Path, split: str) -> None:
    """83 clips of 32 frames, 15 per second, of 14 recording sequences."""
    where = real_data / "ut_interaction" / "train"
    spec = ClipSpec(frames=16, height=48, width=64)
    data = open_data(str(where), split, spec, DataSettings(group=SEQUENCE))
    assert data.labels == ("hug", "kick", "point", "punch", "push", "shake_hands")
    assert {data[i][1] for i in range(len(data))} == set(range(6))
    for i in range(len(data)):
        clip, _ = data[i]
        assert clip.shape == (16, 48, 64, 3)
        assert clip.std() > 5
    others = [s for s in SPLITS if s != split]
    for other in others:
        theirs = open_data(str(where), other, spec, DataSettings(group=SEQUENCE))
        assert not groups(data) & groups(theirs)
    every = [open_data(str(where), s, spec, DataSettings(group=SEQUENCE)) for s in SPLITS]
    assert sum(len(one) for one in every) == 83
