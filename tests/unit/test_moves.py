"""The demo's video: its moves are what their labels say, and it is written whole or not at all."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from vmoe import moves, video
from vmoe.clips import Frame
from vmoe.data.camera_motion import LABELS, REVERSED, read_picture
from vmoe.errors import OutputError, SettingError

AXES = {"pan": 0, "tilt": 1, "zoom": 2, "roll": 3}
SIGNS = {"left": -1, "right": 1, "up": -1, "down": 1, "in": 1, "out": -1}
DRIFT = 0.006 * 4.5  # per second; as in test_camera_motion


def plain(value: int, size: tuple[int, int] = (60, 80)) -> Frame:
    return np.full((*size, 3), value, np.uint8)


def write(path: Path, frames: Iterable[Frame], size: tuple[int, int] = (60, 80)) -> Path:
    with video.writing(path, 10, size) as append:
        for frame in frames:
            append(frame)
    return path


def frames_of(path: Path) -> list[NDArray[np.uint8]]:
    capture = cv2.VideoCapture(str(path))
    frames = []
    while (read := capture.read())[0]:
        frames.append(np.asarray(read[1], np.uint8))
    capture.release()
    return frames


def rates(frames: list[NDArray[np.uint8]], fps: float) -> NDArray[np.float64]:
    """Return the camera's motion between frames as Poses have it, per second, by optical flow."""
    found = []
    height, width = frames[0].shape[:2]
    middle = np.array([width / 2, height / 2])
    for a, b in pairwise(cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY) for frame in frames):
        points = cv2.goodFeaturesToTrack(a, 300, 0.01, 7)
        to, ok, _ = cv2.calcOpticalFlowPyrLK(a, b, points, np.empty_like(points))
        there = ok[:, 0] == 1
        turn, _ = cv2.estimateAffinePartial2D(points[there], to[there])
        right, down = turn[:, :2] @ middle + turn[:, 2] - middle
        unit = min(height, width)
        zoom, roll = np.log(np.hypot(*turn[:, 0])), np.arctan2(turn[1, 0], turn[0, 0])
        # What is seen moves against the camera; zooming in makes it larger.
        found.append([-right / unit, -down / unit, zoom, -roll])
    return np.array(found) * fps


@pytest.fixture(scope="module")
def rendered(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[list[moves.Segment], list[NDArray[np.uint8]]]:
    path = tmp_path_factory.mktemp("moves") / "moves.avi"
    segments = moves.render(moves.photographs()[:1], path, rounds=1, move_s=1.0, fps=20)
    return segments, frames_of(path)


def test_drawn_pictures_are_always_the_same_and_differ() -> None:
    first, second = moves.procedural(2)
    (again, _) = moves.procedural(2)
    assert [first.name, second.name] == ["procedural-0", "procedural-1"]
    assert first.frames[0].shape == (512, 512, 3)
    assert np.array_equal(first.frames[0], again.frames[0])
    assert not np.array_equal(first.frames[0], second.frames[0])


def test_every_move_is_made_once_in_each_round(tmp_path: Path) -> None:
    scenes = [moves.Scene("a", (plain(0),)), moves.Scene("b", (plain(255),))]
    path = tmp_path / "moves.avi"
    segments = moves.render(scenes, path, rounds=2, move_s=0.5, fps=10, size=(24, 32))
    for turn in (segments[:10], segments[10:]):
        assert sorted(s.label for s in turn) == sorted(LABELS)
    assert [s.start_s for s in segments] == [0.5 * i for i in range(20)]
    assert [s.end_s for s in segments] == pytest.approx([0.5 * i + 0.4 for i in range(20)])
    assert [s.picture for s in segments] == ["a", "b"] * 10
    frames = frames_of(path)
    assert len(frames) == 100
    assert {frame.shape for frame in frames} == {(24, 32, 3)}
    for number, frame in enumerate(frames):
        assert abs(frame.mean() - 255 * (number // 5 % 2)) < 3
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("label", LABELS)
def test_a_move_is_what_its_label_says(
    rendered: tuple[list[moves.Segment], list[NDArray[np.uint8]]], label: str
) -> None:
    segments, frames = rendered
    number = next(i for i, s in enumerate(segments) if s.label == label)
    steps = rates(frames[20 * number : 20 * (number + 1)], 20)
    mean = steps.mean(axis=0)
    if label == "static":
        assert np.abs(mean).max() < DRIFT
    elif label == "shake":
        assert np.abs(steps).mean(axis=0)[:2].min() > 0.05
    else:
        move, way = label.split("-")
        axis = AXES[move]
        assert mean[axis] * SIGNS[way] > 0.1
        assert np.delete(np.abs(mean), axis).max() < 2 * DRIFT
        assert REVERSED[label] != label


def test_a_window_over_two_moves_has_no_truth() -> None:
    segments = [moves.Segment("static", 0.0, 0.9, "a"), moves.Segment("shake", 1.0, 1.9, "a")]
    assert moves.truth(segments, 0.0, 0.9) is segments[0]
    assert moves.truth(segments, 1.0, 1.9005) is segments[1]  # a container's milliseconds
    assert moves.truth(segments, 0.5, 1.1) is None
    assert moves.truth([], 0.0, 0.1) is None


@pytest.mark.parametrize(
    ("count", "wanted"),
    [(1, [0, 0, 0, 0, 0, 0]), (2, [0, 1, 0, 1, 0, 1]), (4, [0, 1, 2, 3, 2, 1, 0, 1, 2])],
)
def test_a_video_runs_forth_and_back(tmp_path: Path, count: int, wanted: list[int]) -> None:
    scene = moves.Scene("video", tuple(plain(60 * i) for i in range(count)))
    path = tmp_path / "moves.avi"
    moves.render([scene], path, rounds=1, move_s=1.0, fps=3, size=(24, 32))
    shown = [round(frame.mean() / 60) for frame in frames_of(path)]
    assert shown[: len(wanted)] == wanted


def test_scenes_of_a_picture(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "12:30.PNG"), plain(7, (600, 1200)))
    (scene,) = moves.scenes_of(tmp_path / "12:30.PNG")
    assert scene.name == "12:30.PNG"
    assert [frame.shape for frame in scene.frames] == [(512, 1024, 3)]
    assert (scene.frames[0] == 7).all()


def test_scenes_of_a_folder(tmp_path: Path) -> None:
    for name in ("b.png", "a.bmp"):
        cv2.imwrite(str(tmp_path / name), plain(9))
    (tmp_path / "readme.txt").write_text("no picture")
    assert [scene.name for scene in moves.scenes_of(tmp_path)] == ["a.bmp", "b.png"]


def test_scenes_of_a_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "2024-01-01T12:30:00.avi", (plain(40 * i) for i in range(5)))
    monkeypatch.chdir(tmp_path)  # a bare name: FFmpeg would take it for an address
    (scene,) = moves.scenes_of(Path("2024-01-01T12:30:00.avi"))
    assert [round(frame.mean() / 40) for frame in scene.frames] == [0, 1, 2, 3, 4]


def test_a_video_and_a_folder_stay_small_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "large.avi", [plain(5, (720, 1280))] * 9, (720, 1280))
    for i in range(3):
        cv2.imwrite(str(tmp_path / f"{i}.png"), plain(i, (512, 910)))
    one = 512 * 910 * 3
    (scene,) = moves.scenes_of(path)
    assert [frame.nbytes for frame in scene.frames] == [one] * 9
    monkeypatch.setattr(moves, "MAX_BYTES", 2 * one)
    assert len(moves.scenes_of(path)[0].frames) == 2
    assert len(moves.scenes_of(tmp_path)) == 2
    monkeypatch.setattr(moves, "MAX_BYTES", 1)
    assert len(moves.scenes_of(path)[0].frames) == 1
    monkeypatch.setattr(moves, "MAX_BYTES", 1 << 30)
    monkeypatch.setattr(moves, "MAX_FRAMES", 4)
    assert len(moves.scenes_of(path)[0].frames) == 4


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("none.mp4", None, r"^--source .*none\.mp4 does not exist\.$"),
        ("mine.mp4", b"no video", "cannot be read as a picture or a video"),
        ("mine.mp4", b"", "cannot be read as a picture or a video"),
        ("mine.png", b"no picture", r"cannot read the picture .*mine\.png\.$"),
        ("mine.png", b"", r"cannot read the picture .*mine\.png\.$"),
        ("caf\udce9.mkv", b"x", r"caf\\udce9\.mkv' is no UTF-8: rename it\.$"),
        ("caf\udce9.png", b"x", r"caf\\udce9\.png' is no UTF-8: rename it\.$"),
    ],
)
def test_a_source_that_cannot_be_read_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, content: bytes | None, line: str
) -> None:
    source = tmp_path / name
    if content is not None:
        source.write_bytes(content)
    with pytest.raises(SettingError, match=line) as e:
        moves.scenes_of(source)
    assert "\n" not in str(e.value)
    assert str(e.value).isprintable()
    assert capfd.readouterr().err == ""


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"holds no picture \(\.bmp, \.jpeg, \.jpg"):
        moves.scenes_of(tmp_path)


def test_a_picture_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.png").mkdir()
    for name, why in (("x.png", "Is a directory"), ("none.png", "No such file or directory")):
        with pytest.raises(SettingError, match=rf"cannot read the picture .*{name}: {why}\.$"):
            read_picture(tmp_path / name)
    with pytest.raises(SettingError, match=r"the picture's name .*caf\\udce9\.png' is no UTF-8"):
        read_picture(tmp_path / "caf\udce9.png")


FULL = """
import resource, sys
import numpy as np
from pathlib import Path
from vmoe import moves
from vmoe.errors import OutputError

limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
picture = np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8)
try:
    moves.render([moves.Scene("noise", (picture,))], Path(sys.argv[1]), rounds=1)
except OutputError as e:
    print(e)
"""


@pytest.mark.parametrize("limit", [0, 4_000, 300_000, 3_000_000])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, limit: int) -> None:
    path = tmp_path / "moves.avi"
    path.write_bytes(b"" if limit == 0 else b"before")
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path), str(limit)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith(f"cannot write {path}: ")
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""
    assert [p.name for p in tmp_path.iterdir()] == ["moves.avi"]  # the one before
    assert path.stat().st_size < 10


def test_what_stops_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterable[Frame]:
        yield plain(1)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write(tmp_path / "a.avi", broken())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", video.CODECS)
def test_a_video_holds_what_was_written(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"12:30{suffix}", (plain(i) for i in range(30)))
    assert video.holds(path, 30)
    assert not video.holds(path, 32)
    (tmp_path / "none.avi").write_bytes(path.read_bytes()[:40])
    assert not video.holds(tmp_path / "none.avi", 30)


def test_a_video_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"caf\\udce9\.avi' is no UTF-8, so that OpenCV cannot"):
        write(tmp_path / "caf\udce9.avi", [])
    with pytest.raises(OutputError, match="has no encoder for it here"):
        write(tmp_path / "a.avi", [], size=(0, 0))
    with pytest.raises(OutputError, match="does not hold the 0 frames that were written"):
        write(tmp_path / "a.avi", [])
    assert not list(tmp_path.iterdir())
