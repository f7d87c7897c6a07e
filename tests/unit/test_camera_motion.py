"""camera-motion: the label is exact, in closed form and in what is rendered."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from vmoe.clips import ClipSpec
from vmoe.data import SPLITS, DataSettings, open_data
from vmoe.data import camera_motion as cm
from vmoe.data._splits import split_of
from vmoe.data._textures import picture
from vmoe.errors import SettingError, UnknownNameError

SPEC = ClipSpec(frames=8, height=64, width=64)
SIZE = (64, 64)
TIMES = 0.1 * np.arange(8)
MOVES = [label for label in cm.LABELS if label not in ("static", "shake")]
AXES = {"pan": 0, "tilt": 1, "zoom": 2, "roll": 3}
# pan-left is towards smaller x, tilt-up towards smaller y, roll-right is clockwise
SIGNS = {"left": -1, "right": 1, "up": -1, "down": 1, "in": 1, "out": -1}
STATIC_DRIFT = 0.006 * 4.5  # per second; a normal draw exceeds 4.5 deviations once in 150 000


def spot(x: float, y: float) -> NDArray[np.uint8]:
    """Return a black picture, 256x256, with a round white spot."""
    across, down = np.meshgrid(np.arange(256), np.arange(256))
    far = np.square(across - x) + np.square(down - y)
    return np.repeat((255 * np.exp(-far / 18))[:, :, None], 3, axis=2).astype(np.uint8)


def where(frame: NDArray[np.uint8]) -> tuple[float, float]:
    """Return where the spot of a frame is, from its middle, right and down in pixels."""
    weights = frame[:, :, 0].astype(float)
    down, across = np.indices(weights.shape)
    total = weights.sum()
    return (across * weights).sum() / total - 32, (down * weights).sum() / total - 32


# view 0.5 of 256 is 128 picture pixels in 64 frame pixels: a frame pixel is 2 picture pixels.
@pytest.mark.parametrize(
    ("pose", "spot_at", "wanted"),
    [
        ((0, 0, 0, 0), (128, 128), (0, 0)),
        ((0, 0, 0, 0), (148, 118), (10, -5)),
        ((0.1, 0, 0, 0), (128, 128), (-6.4, 0)),  # the camera turns right: the scene goes left
        ((-0.1, 0, 0, 0), (128, 128), (6.4, 0)),
        ((0, 0.1, 0, 0), (128, 128), (0, -6.4)),  # the camera turns down: the scene goes up
        ((0, 0, np.log(2), 0), (148, 118), (20, -10)),  # zooming in: away from the middle
        ((0, 0, -np.log(2), 0), (148, 118), (5, -2.5)),
        ((0, 0, 0, np.pi / 2), (148, 128), (0, -10)),  # clockwise: what was right is on top
        ((0, 0, 0, -np.pi / 2), (148, 128), (0, 10)),
        ((0.1, 0, np.log(2), 0), (148, 128), (20 - 12.8, 0)),
    ],
)
def test_a_pose_moves_pixels_as_it_says(
    pose: tuple[float, ...], spot_at: tuple[float, float], wanted: tuple[float, float]
) -> None:
    seen = cm.look(spot(*spot_at), np.array(pose), SIZE)
    assert seen.shape == (64, 64, 3)
    assert where(seen) == pytest.approx(wanted, abs=0.1)


def test_frames_of_another_shape_keep_their_scale() -> None:
    seen = cm.look(spot(148, 118), np.zeros(4), (64, 96))
    down, across = np.unravel_index(seen[:, :, 0].argmax(), (64, 96))
    assert (across - 48, down - 32) == (10, -5)


@pytest.mark.parametrize("label", MOVES)
def test_a_path_moves_along_its_axis_with_its_sign(label: str) -> None:
    kind, way = label.split("-")
    for seed in range(50):
        poses = cm.camera_path(label, TIMES, np.random.default_rng(seed))
        assert not poses[0].any()
        steps = np.diff(poses, axis=0) / 0.1
        along = steps[:, AXES[kind]] * SIGNS[way]
        slowest, fastest = cm._SPEEDS[AXES[kind]]
        assert (along > 0.7 * slowest).all()
        assert (along < 1.3 * fastest).all()
        assert slowest * 0.999 <= along.mean() <= fastest * 1.001  # easing moves no mean
        others = np.delete(steps, AXES[kind], axis=1)
        assert np.abs(others).max() < STATIC_DRIFT


def test_static_is_static() -> None:
    for seed in range(200):
        poses = cm.camera_path("static", TIMES, np.random.default_rng(seed))
        assert np.abs(poses).max() < STATIC_DRIFT * TIMES[-1]
    slowest = min(cm.PAN_PER_S[0], cm.ZOOM_PER_S[0], cm.ROLL_PER_S[0])
    assert slowest / 4 > STATIC_DRIFT  # the slowest move is far from the fastest drift


def test_shake_goes_nowhere() -> None:
    for seed in range(50):
        poses = cm.camera_path("shake", 0.1 * np.arange(100), np.random.default_rng(seed))
        drift = np.abs(np.polyfit(0.1 * np.arange(100), poses, 1)[0]).max()
        assert drift < STATIC_DRIFT + 0.02
        turns = (np.diff(np.sign(np.diff(poses[:, 0]))) != 0).sum()
        assert turns > 10  # more than one oscillation per second
        assert cm.SHAKE[0] / 2 < poses[:, 0].std() < cm.SHAKE[1] * 1.5


@pytest.mark.parametrize("label", MOVES)
def test_backwards_a_path_is_the_reversed_labels(label: str) -> None:
    poses = cm.camera_path(label, TIMES, np.random.default_rng(1))
    backwards = poses[::-1] - poses[-1]
    kind, way = cm.REVERSED[label].split("-")
    assert kind == label.split("-")[0]
    assert (np.diff(backwards[:, AXES[kind]]) * SIGNS[way] > 0).all()


def test_reversed_is_its_own_inverse() -> None:
    assert sorted(cm.REVERSED) == sorted(MOVES)
    assert all(cm.REVERSED[cm.REVERSED[label]] == label for label in MOVES)
    assert all(cm.REVERSED[label] != label for label in MOVES)


def measured(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the camera's move between two frames: right, down (pixels), log zoom, roll.

    Found with ECC on the pixels, which knows nothing of how they were rendered.
    """
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (before, after)]
    warp = np.eye(2, 3, dtype=np.float32)  # from a place before to its place after
    stop = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 100, 1e-5)
    _, warp = cv2.findTransformECC(grey[0], grey[1], warp, cv2.MOTION_AFFINE, stop, None, 3)
    middle = np.array([31.5, 31.5, 1])
    right, down = middle[:2] - warp @ middle  # the scene moves against the camera
    zoom = np.log(np.abs(np.linalg.det(warp[:, :2]))) / 2
    roll = -np.arctan2(warp[1, 0] - warp[0, 1], warp[0, 0] + warp[1, 1])
    return np.array([right, down, zoom, roll])


@pytest.mark.parametrize("label", MOVES)
def test_what_is_rendered_moves_as_its_label_says(label: str) -> None:
    kind, way = label.split("-")
    for seed in range(4):
        image = picture(np.random.default_rng(seed))
        path = cm.camera_path(label, TIMES, np.random.default_rng(seed))
        start = np.array([0.1, -0.1, 0.05, 0.4])  # rolled: the axes are the camera's own
        frames = [cm.look(image, cm._after(start, pose), SIZE) for pose in path[:4]]
        moves = np.sum([measured(a, b) for a, b in pairwise(frames)], axis=0)
        wanted = path[3] * [64, 64, 1, 1]
        assert moves[AXES[kind]] * SIGNS[way] > 0
        np.testing.assert_allclose(moves[:2], wanted[:2], atol=0.12 * np.abs(wanted).max() + 0.3)
        np.testing.assert_allclose(moves[2:], wanted[2:], atol=0.02)


def test_a_static_camera_sees_nothing_move() -> None:
    path = cm.camera_path("static", TIMES, np.random.default_rng(0))
    image = picture(np.random.default_rng(0))
    moved = measured(cm.look(image, path[0], SIZE), cm.look(image, path[-1], SIZE))
    assert np.abs(moved[:2]).max() < 64 * STATIC_DRIFT * TIMES[-1]
    assert np.abs(moved[2:]).max() < STATIC_DRIFT


def test_clips_are_what_the_spec_says() -> None:
    spec = ClipSpec(frames=3, height=32, width=48)
    data = open_data("camera-motion", "val", spec, DataSettings(clips=20))
    assert len(data) == 20
    assert data.labels == cm.LABELS
    found = [data[i] for i in range(20)]
    assert [label for _, label in found] == [*range(10), *range(10)]
    for clip, _ in found:
        assert clip.shape == (3, 32, 48, 3)
        assert clip.dtype == np.uint8
        assert clip.flags.c_contiguous
        assert clip.std() > 3  # something can be seen
    for index in (-1, 20):
        with pytest.raises(IndexError):
            data[index]
    assert len(open_data("camera-motion", "val", spec)) == cm.DEFAULT_CLIPS


def hashes(split: str, **settings: int) -> list[str]:
    data = open_data("camera-motion", split, SPEC, DataSettings(clips=5, **settings))
    return [hashlib.sha256(data[i][0].tobytes()).hexdigest() for i in range(5)]


def test_clips_are_drawn_from_seed_split_epoch_and_index() -> None:
    ways = [hashes(split, seed=seed) for split in SPLITS for seed in (0, 1)]
    ways.append(hashes("train", epoch=1))
    every = [value for way in ways for value in way]
    assert len(set(every)) == len(every)
    assert hashes("train") == ways[0]
    data = open_data("camera-motion", "train", SPEC, DataSettings(clips=5))
    backwards = [hashlib.sha256(data[i][0].tobytes()).hexdigest() for i in reversed(range(5))]
    assert backwards[::-1] == ways[0]


def test_what_is_drawn_does_not_change() -> None:
    """Models were trained on these clips. Means, since codecs and resizing differ a little."""
    data = open_data("camera-motion", "test", ClipSpec(), DataSettings(clips=10))
    means = [float(data[i][0].mean()) for i in range(10)]
    first = [94.8, 194.9, 242.9, 111.8, 44.5, 66.2, 217.2, 88.6, 41.4, 192.4]
    np.testing.assert_allclose(means, first, atol=0.5)


def test_another_process_renders_the_same() -> None:
    code = """
import hashlib
from vmoe.clips import ClipSpec
from vmoe.data import DataSettings, open_data
data = open_data("camera-motion", "test", ClipSpec(), DataSettings(clips=5, seed=3))
print([hashlib.sha256(data[i][0].tobytes()).hexdigest() for i in range(5)])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == repr(hashes("test", seed=3))


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    for i in range(12):
        noise = np.random.default_rng(i).integers(0, 256, (40, 60, 3), np.uint8)
        assert cv2.imwrite(str(tmp_path / f"{i}.png"), noise)
    (tmp_path / "notes.txt").write_text("x")
    return tmp_path


def test_photographs_of_a_folder(photographs: Path) -> None:
    seen = {}
    for split in SPLITS:
        data = open_data(f"camera-motion:{photographs}", split, SPEC, DataSettings(clips=2))
        assert data[0][0].shape == (8, 64, 64, 3)
        seen[split] = data.photographs  # type: ignore[attr-defined]
        assert all(split_of(path.name) == split for path in seen[split])
    assert sorted(p for paths in seen.values() for p in paths) == sorted(photographs.glob("*.png"))


def test_a_large_photograph_is_made_small_and_keeps_its_colours(tmp_path: Path) -> None:
    red = np.zeros((600, 1200, 3), np.uint8)
    red[:, :, 2] = 255  # OpenCV writes BGR
    cv2.imwrite(str(tmp_path / "red.png"), red)
    found = cm.read_picture(tmp_path / "red.png")
    assert found.shape == (512, 1024, 3)
    assert (found == (255, 0, 0)).all()


def test_bad_folders_and_names(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="has 0 pictures, none of which falls into the val"):
        open_data(f"camera-motion:{tmp_path}", "val", SPEC)
    with pytest.raises(SettingError, match="none is no folder; name one of pictures"):
        open_data(f"camera-motion:{tmp_path}/none", "val", SPEC)
    with pytest.raises(UnknownNameError, match="Known: a folder with a folder per class, camera-"):
        open_data("nodata", "val", SPEC)
    (tmp_path / "bad.png").write_bytes(b"x")
    with pytest.raises(SettingError, match=r"cannot read the picture .*bad\.png"):
        cm.read_picture(tmp_path / "bad.png")
    with pytest.raises(SettingError, match=r"cannot read the picture .*no\.png: No such file"):
        cm.read_picture(tmp_path / "no.png")
    with pytest.raises(UnknownNameError, match="data set 'ucf102': did you mean 'ucf101'"):
        open_data("ucf102:/path", "test", SPEC)
    with pytest.raises(UnknownNameError, match="'camera-mtion': did you mean 'camera-motion'"):
        open_data("camera-mtion", "val", SPEC)
    with pytest.raises(UnknownNameError, match="split 'vla': did you mean 'val'"):
        open_data("camera-motion", "vla", SPEC)
    with pytest.raises(SettingError, match="is no folder"):
        open_data(f"{tmp_path}/none", "val", SPEC)
