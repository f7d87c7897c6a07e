"""What is known and kept of video files: the index of timestamps, prepared frames, bad files."""

from __future__ import annotations

import logging
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import layouts
from tests.videos import number_of, read, write
from vmoe import opencv
from vmoe.clips import ClipSpec, choose, every_clip
from vmoe.data import DataSettings, _index, _kept, open_data
from vmoe.data._decode import decode, timestamps
from vmoe.data._index import FILE, Index
from vmoe.errors import OutputError, SettingError

SPEC = ClipSpec(frames=4, spacing_s=0.1, height=96, width=128)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return a list that gets every file that is decoded for its timestamps."""
    files: list[Path] = []
    monkeypatch.setattr(_index, "timestamps", lambda path: files.append(path) or timestamps(path))
    return files


def test_an_opencv_before_4_13_is_quiet_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import cv2

    monkeypatch.delattr(cv2.utils, "logging")
    assert opencv.quiet() is cv2


def test_every_clip_is_what_choose_says_of_each_end() -> None:
    drawn = np.random.default_rng(0)
    for case in range(40):
        times = np.cumsum(drawn.choice([0.02, 0.05, 0.1, 0.15, 0.4], 30)) + drawn.uniform()
        times = times[: case if case < 3 else 30]
        spec = ClipSpec(frames=int(drawn.integers(1, 6)), spacing_s=float(drawn.uniform(0.05, 0.2)))
        wanted = [found for end in times if (found := choose(times, end, spec))]
        assert every_clip(times, spec).tolist() == wanted
        assert every_clip(times, spec).shape[1:] == (spec.frames,)


@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".mkv"])
def test_frames_by_number_are_those_of_a_walk_from_the_start(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", frames=20)
    assert np.allclose(timestamps(path).at_s, np.arange(20) / 20, atol=1e-3)
    wanted = read(path)
    for numbers in ([0, 3, 4, 19], [7], list(range(20))):
        found = decode(path, np.array(numbers), SPEC)
        assert [number_of(frame) for frame in found] == numbers
        assert all(np.array_equal(f, wanted[n]) for f, n in zip(found, numbers, strict=True))
    with pytest.raises(SettingError, match="has changed while it was in use: its frame 20 is gone"):
        decode(path, np.array([3, 20]), SPEC)


def test_a_file_is_looked_at_once_until_it_changes(tmp_path: Path, decoded: list[Path]) -> None:
    path = write(tmp_path / "a.avi", frames=8)
    first = Index(tmp_path / "cache").times(path)
    again = Index(tmp_path / "cache").times(path)
    assert np.array_equal(first.at_s, again.at_s)
    assert again.counted == 8
    assert decoded == [path]
    write(path, frames=9)
    assert len(Index(tmp_path / "cache").times(path).at_s) == 9
    assert decoded == [path, path]
    path.unlink()
    assert len(Index(tmp_path / "cache").times(path).at_s) == 0


def test_what_is_not_whole_is_asked_anew_by_every_process(
    tmp_path: Path, decoded: list[Path]
) -> None:
    """Its disk, not the file, may have been at fault."""
    path = tmp_path / "a.avi"
    path.write_bytes(write(tmp_path / "whole.avi", frames=60).read_bytes()[:60000])
    garbage = tmp_path / "b.avi"
    garbage.write_bytes(b"garbage")
    index = Index(tmp_path / "cache")
    for _ in range(2):
        half, none = index.look_at([path, garbage])
        assert 0 < len(half.at_s) < 60
        assert len(none.at_s) == 0
    assert sorted(decoded) == [path, garbage]
    Index(tmp_path / "cache").times(path)
    assert decoded[2:] == [path]
    assert index.unknown([path, garbage, tmp_path / "none.avi", tmp_path / "whole.avi"]) == 1


def test_an_index_that_cannot_be_used_is_said_and_done_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, decoded: list[Path]
) -> None:
    path = write(tmp_path / "a.avi", frames=8)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / FILE).write_bytes(b"this is no database" * 100)
    index = Index(tmp_path / "cache")
    for _ in range(2):
        assert len(index.times(path).at_s) == 8
    assert decoded == [path]
    (line,) = caplog.messages
    assert f"{FILE} cannot be used (file is not a database): videos are decoded again" in line
    caplog.clear()
    assert len(Index(path / "cache").times(path).at_s) == 8  # a file where a folder should be
    assert "cannot be used" in caplog.text
    caplog.clear()
    good = Index(tmp_path / "good")
    good.times(path)
    good._db.execute("DROP TABLE videos")  # it breaks in the middle
    assert len(good.times(path).at_s) == 8
    assert "cannot be used (no such table: videos)" in caplog.text


def test_a_kill_leaves_the_index_whole(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{i}.avi", frames=8) for i in range(2)]
    code = """
import os, sys
from pathlib import Path
from vmoe.data import _index
index = _index.Index(Path(sys.argv[1]))
index.times(Path(sys.argv[2]))
index._db.execute("BEGIN")
index._db.execute("DELETE FROM videos")
os.kill(os.getpid(), 9)
"""
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path), str(paths[0])], check=False)
    assert ended.returncode == -9
    with sqlite3.connect(tmp_path / FILE) as db:
        assert db.execute("SELECT count(*) FROM videos").fetchall() == [(1,)]
    db.close()
    assert Index(tmp_path).unknown(paths) == 1


def test_prepared_frames_are_kept_in_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = layouts.folder(tmp_path / "data")
    plain = open_data(data, "train", SPEC)
    cached = open_data(data, "train", SPEC, DataSettings(cache=tmp_path / "cache"))
    wanted = [plain[i][0] for i in range(4)]
    assert all(np.array_equal(cached[i][0], wanted[i]) for i in range(4))
    kept = sorted((tmp_path / "cache/frames").rglob("*.npy"))
    assert len(kept) == 4
    assert {np.load(file).shape for file in kept} == {(10, 110, 146, 3)}
    monkeypatch.setattr(_kept, "decode", None)
    assert all(np.array_equal(cached[i][0], wanted[i]) for i in range(4))
    monkeypatch.undo()
    stored = kept[0].read_bytes()
    for damaged in (b"", stored[:1000], b"PK\x03\x04", b"\x80\x04N."):
        kept[0].write_bytes(damaged)
        assert all(np.array_equal(cached[i][0], wanted[i]) for i in range(4))
        assert kept[0].read_bytes() == stored
    longer = ClipSpec(frames=5, spacing_s=0.1, height=96, width=128, mean=(0, 0, 0))
    open_data(data, "train", longer, DataSettings(cache=tmp_path / "cache"))[0]
    assert len(list((tmp_path / "cache/frames").rglob("*"))) == len(
        {file.parent for file in kept}
    ) + len(kept)  # the same frames; no temporary file is left


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    data = layouts.folder(tmp_path / "data")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/frames").write_text("in the way")
    opened = open_data(data, "train", SPEC, DataSettings(cache=tmp_path / "cache"))
    with pytest.raises(OutputError, match=r"cannot write .*frames"):
        opened[0]


def test_an_empty_class_folder_is_refused_and_another_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = layouts.folder(tmp_path)
    (tmp_path / "train/notes").mkdir()
    (tmp_path / "train/notes/a.txt").write_text("x")
    assert open_data(data, "train", SPEC).labels == ("hug", "kick")
    assert "no class, since no video is in it: notes" in caplog.text
    (tmp_path / "train/punch").mkdir()
    with pytest.raises(SettingError, match=r"train/punch is empty: put videos of that class there"):
        open_data(data, "train", SPEC)


def test_a_video_of_one_frame_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = layouts.folder(tmp_path)
    write(tmp_path / "train/hug/one.avi", frames=1)
    assert len(open_data(data, "train", SPEC)) == 4
    assert "1 of 5 videos skipped: one.avi lasts 0.00 s, a clip 0.30 s" in caplog.text
    still = ClipSpec(frames=1, height=32, width=32)
    assert len(open_data(data, "train", still)) == 5


def test_all_that_is_skipped_is_listed_with_v(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = layouts.folder(tmp_path)
    for i in range(5):
        (tmp_path / f"train/hug/bad{i}.avi").write_bytes(b"x")
    caplog.set_level(logging.DEBUG, "vmoe")
    open_data(data, "train", SPEC)
    assert "5 of 9 videos skipped" in caplog.messages[0]
    assert all(f"bad{i}.avi cannot be decoded" in caplog.text for i in range(5))


def test_a_name_that_is_no_utf8_is_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = layouts.folder(tmp_path)
    bad = os.fsencode(write(tmp_path / "train/hug/x.avi"))
    os.rename(bad, bad.replace(b"x.avi", b"\xff.avi"))  # noqa: PTH104
    assert len(open_data(data, "train", SPEC)) == 4
    assert "1 of 5 videos skipped" in caplog.text
