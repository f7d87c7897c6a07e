"""What every source promises, and what each says when it cannot keep it."""

from __future__ import annotations

import itertools
import logging
import os
from pathlib import Path

import numpy as np
import pytest

from tests import videos
from vmoe import opencv, registry
from vmoe.errors import SourceError
from vmoe.runtime import sources
from vmoe.runtime.frames import Frame, Stop
from vmoe.runtime.sources import SourceSettings, _container, camera, file
from vmoe.runtime.sources import test as pattern

KINDS = registry.names(sources.SOURCES)
SUFFIXES = (".mp4", ".avi", ".mkv")


def take(source: sources.Source, count: int | None = None) -> list[Frame]:
    stop = Stop()
    frames = source.frames(stop)
    got = list(itertools.islice(frames, count))
    frames.close()
    return got


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_is_a_file_with_two_functions(kind: str) -> None:
    module = registry.load(sources.SOURCES, kind, "source")
    assert module.__doc__
    assert isinstance(module.claims("no-such-name"), bool)
    assert callable(module.open)


@pytest.mark.parametrize("name", ["file", "test"])
def test_frames_are_rgb_stamped_and_numbered(name: str, tmp_path: Path) -> None:
    given = str(videos.write(tmp_path / "a.mp4")) if name == "file" else name
    got = take(sources.open(given), 8)
    assert [f.sequence for f in got] == list(range(8))
    assert all(f.pixels.dtype == np.uint8 and f.pixels.shape[2] == 3 for f in got)
    assert all(b.t_s > a.t_s and b.arrived_s >= a.arrived_s for a, b in itertools.pairwise(got))
    assert {f.epoch for f in got} == {0}
    assert got[0].t_s == 0


@pytest.mark.parametrize("name", ["file", "test"])
def test_a_source_ends_when_asked(name: str, tmp_path: Path) -> None:
    given = str(videos.write(tmp_path / "a.mp4")) if name == "file" else name
    stop, seen = Stop(), 0
    for _ in sources.open(given).frames(stop):
        seen += 1
        stop.ask()
    assert seen == 1


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_frame_of_a_file_in_order_with_its_time(tmp_path: Path, suffix: str) -> None:
    source = sources.open(str(videos.write(tmp_path / f"a{suffix}", 50, 20.0)))
    got = take(source)
    assert [videos.number_of(f.pixels) for f in got] == list(range(50))
    np.testing.assert_allclose([f.t_s for f in got], np.arange(50) / 20, atol=0.002)
    assert source.fps == pytest.approx(20)
    assert not source.live


def test_a_file_in_a_loop_is_a_new_epoch_each_round_and_time_goes_on(tmp_path: Path) -> None:
    path = videos.write(tmp_path / "a.avi", 10, 20.0)
    got = take(sources.open(str(path), SourceSettings(loop=True)), 25)
    assert [f.epoch for f in got] == [0] * 10 + [1] * 10 + [2] * 5
    assert [f.sequence for f in got] == list(range(25))
    np.testing.assert_allclose([f.t_s for f in got], np.arange(25) / 20, atol=0.002)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_cut_in_the_middle_serves_what_it_has(tmp_path: Path, suffix: str) -> None:
    cut = videos.cut(videos.write(tmp_path / f"a{suffix}"), 0.5)
    got = []
    with pytest.raises(SourceError, match=rf"cut\{suffix} breaks off: \d+ of 60 frames"):  # noqa: PT012
        for frame in sources.open(str(cut)).frames(Stop()):
            got.append(frame)
    assert 15 <= len(got) <= 45
    assert [videos.number_of(f.pixels) for f in got[:-1]] == list(range(len(got) - 1))


def test_a_file_that_is_still_written_is_read_as_far_as_it_is(tmp_path: Path) -> None:
    data = videos.write(tmp_path / "a.ts", 60).read_bytes()
    growing = tmp_path / "growing.ts"
    growing.write_bytes(data[: len(data) // 2])
    half = [videos.number_of(f.pixels) for f in take(sources.open(str(growing)))]
    assert half[:-1] == list(range(len(half) - 1))  # the last one is only half there
    assert 20 < len(half) < 40
    growing.write_bytes(data)
    assert len(take(sources.open(str(growing)))) == 60


@pytest.mark.parametrize("suffix", [".mp4", ".avi"])
def test_a_file_overwritten_from_the_middle_on(tmp_path: Path, suffix: str) -> None:
    whole = videos.cut(videos.write(tmp_path / f"a{suffix}"), 1.0)
    data = whole.read_bytes()
    half = len(data) // 2
    whole.write_bytes(data[:half] + bytes(len(data) - half))
    with pytest.raises(SourceError, match=r"breaks off: \d+ of 60 frames"):
        take(sources.open(str(whole)))


def test_a_length_that_is_only_an_estimate_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Matroska file with audio is as long as its longest track; the video may end before."""
    path = videos.write(tmp_path / "a.mkv", 60, 20.0)
    data = path.read_bytes()
    at = data.index(b"\x83\x81\x01")  # track type 1: video
    other = tmp_path / "audio.mkv"
    other.write_bytes(data[:at] + b"\x83\x81\x02" + data[at + 3 :])
    assert _container.duration_s(path, 3.0) == 3.0
    assert _container.duration_s(other, 3.0) is None
    source = file.open(str(other), SourceSettings())
    source.fps = 20.0
    monkeypatch.setattr(logging.getLogger("vmoe"), "propagate", True)
    source._judge(counted=60, read=40, last_s=1.95)
    assert "40 of 60 frames were read" in caplog.text


def test_containers_know_whether_they_are_whole(tmp_path: Path) -> None:
    for suffix in SUFFIXES:
        whole = videos.write(tmp_path / f"a{suffix}", 60, 20.0)
        assert not _container.is_cut(whole)
        assert _container.is_cut(videos.cut(whole, 0.6))
        assert _container.duration_s(whole, 3.0) == pytest.approx(3.0, abs=0.06)
    text = tmp_path / "a.txt"
    text.write_text("no container")
    assert not _container.is_cut(text)
    assert _container.duration_s(text, 3.0) is None


def test_missing_empty_and_garbage_files_each_say_so(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="No such file or directory"):
        sources.open(str(tmp_path / "no.mp4"))
    with pytest.raises(SourceError, match="is a folder and holds no pictures"):
        sources.open(str(tmp_path))
    (tmp_path / "street.mp4").touch()
    with pytest.raises(SourceError, match=r"no pictures .* Name its videos: --source .*street"):
        sources.open(str(tmp_path))
    with pytest.raises(SourceError, match=r"No such file or directory: did you mean 'street\.mp4'"):
        sources.open(str(tmp_path / "stret.mp4"))
    with pytest.raises(SourceError, match=r"no/no\.mp4: No such file or directory\. Name a"):
        sources.open("no/no.mp4")
    empty = tmp_path / "empty.mp4"
    empty.touch()
    with pytest.raises(SourceError, match="is empty"):
        sources.open(str(empty))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SourceError, match="no plain file"):
        sources.open(str(tmp_path / "pipe"))
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(SourceError, match="symbolic links"):
        sources.open(str(tmp_path / "loop"))
    garbage = tmp_path / "garbage.mp4"
    garbage.write_bytes(np.random.default_rng(0).bytes(20000))
    with pytest.raises(SourceError, match="no video that can be decoded"):
        take(sources.open(str(garbage)))


def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = videos.write(tmp_path / "a.avi", 5)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(SourceError, match="Permission denied"):
        sources.open(str(path))


@pytest.mark.parametrize("folder", [".", os.fsdecode(b"caf\xe9")])
def test_a_name_that_is_no_utf8_is_refused(tmp_path: Path, folder: str) -> None:
    path = tmp_path / folder / os.fsdecode(b"caf\xe9.mkv")
    path.parent.mkdir(exist_ok=True)
    videos.write(tmp_path / "a.mkv", 5).rename(path)
    with pytest.raises(SourceError, match=r"caf\\udce9.* is no UTF-8.*rename it") as e:
        sources.open(str(path))
    str(e.value).encode()


def test_a_name_that_looks_like_an_address_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    videos.write(tmp_path / "a.avi", 10).rename("2024-01-01T12:30:00.avi")
    source = sources.open("2024-01-01T12:30:00.avi")
    assert len(take(source)) == 10
    assert source.name == "2024-01-01T12:30:00.avi"


@pytest.mark.parametrize("claimed_ns", [1_000_000, 2_000_000])
def test_a_rate_that_is_no_rate_is_measured(tmp_path: Path, claimed_ns: int) -> None:
    path = videos.write(tmp_path / "a.mkv", 60, 25.0)
    data = path.read_bytes()
    at = data.index(b"\x23\xe3\x83")  # the default duration of a frame, in nanoseconds
    assert data[at + 3] & 0x80
    width = data[at + 3] & 0x7F
    assert int.from_bytes(data[at + 4 : at + 4 + width], "big") == 40_000_000
    new = claimed_ns.to_bytes(width, "big")
    path.write_bytes(data[: at + 4] + new + data[at + 4 + width :])
    cv2 = opencv.quiet()
    capture = cv2.VideoCapture(str(path))
    assert capture.get(cv2.CAP_PROP_FPS) == 1e9 / claimed_ns
    capture.release()
    source = sources.open(str(path))
    assert len(take(source)) == 60
    assert source.fps == pytest.approx(25)


def test_an_unknown_kind_says_what_there_is() -> None:
    with pytest.raises(SourceError, match="--source is empty"):
        sources.open("")
    with pytest.raises(SourceError, match="source 'gopher://x': cannot read this kind"):
        sources.open("gopher://x")


def test_a_folder_called_test_does_not_take_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "test").mkdir()
    monkeypatch.chdir(tmp_path)
    assert sources.open("test").live


def test_camera_names() -> None:
    assert [camera._index(n) for n in ("0", "12", "/dev/video3", "camera 1")] == [0, 12, 3, 1]
    assert [camera._index(n) for n in ("a.mp4", "test", "-1", "/dev/sda")] == [None] * 4


@pytest.mark.skipif(Path("/dev/video77").exists(), reason="this machine has so many cameras")
def test_a_camera_that_is_not_there() -> None:
    with pytest.raises(SourceError, match="camera 77: /dev/video77 does not exist"):
        sources.open("77")


def test_the_pattern_moves_as_it_says() -> None:
    """Between two frames of a pan the picture shifts; what is static stays."""
    moves = {pattern.move_at(i * pattern.MOVE_S + 0.1): i for i in range(10)}
    assert len(moves) == 10

    def shift(label: str) -> tuple[float, float]:
        cv2 = opencv.quiet()
        at = round((moves[label] * pattern.MOVE_S + 1.0) * pattern.FPS)
        pair = [pattern.render(at + i).mean(axis=2).astype(np.float32) for i in (0, 6)]
        (x, y), _ = cv2.phaseCorrelate(*pair)
        return x, y

    assert shift("pan-left")[0] > 1 > abs(shift("static")[0])
    assert shift("pan-right")[0] < -1
    assert shift("tilt-up")[1] > 1 > abs(shift("static")[1])


def test_the_pattern_follows_its_seed() -> None:
    assert (pattern.render(5, seed=1) == pattern.render(5, seed=1)).all()
    assert (pattern.render(5, seed=1) != pattern.render(5, seed=2)).any()
