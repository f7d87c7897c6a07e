"""Augmentation: the same for all frames, drawn from seed, epoch and index, and label-safe."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from tests import layouts
from tests.videos import write
from vmoe.clips import ClipSpec
from vmoe.data import DataSettings, _augment, open_data
from vmoe.data._augment import augment, kinds, prepared
from vmoe.errors import SettingError

SPEC = ClipSpec(frames=4, spacing_s=0.1, height=56, width=70)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def ramp(spec: ClipSpec = SPEC) -> np.ndarray:
    """Return a still clip whose red says the column and whose green says the row, in %."""
    down, right = np.linspace(0, 200, spec.height), np.linspace(0, 200, spec.width)
    frame = np.zeros((spec.height, spec.width, 3))
    frame[..., 0], frame[..., 1] = right, down[:, None]
    return np.tile(frame.round().astype(np.uint8), (spec.frames, 1, 1, 1))


def test_a_crop_is_one_box_for_all_frames_and_lies_anywhere() -> None:
    larger = prepared(SPEC, ("crop",))
    assert (larger.height, larger.width) == (64, 80)
    corners, widths = [], []
    for seed in range(200):
        clip = augment(ramp(larger), ("crop",), SPEC, rng(seed))
        assert clip.shape == SPEC.shape
        assert clip.dtype == np.uint8
        assert (clip == clip[0]).all()
        left, right = int(clip[0, 0, 0, 0]), int(clip[0, 0, -1, 0])
        top, bottom = int(clip[0, 0, 0, 1]), int(clip[0, -1, 0, 1])
        assert abs((right - left) - (bottom - top)) <= 6  # no stretching
        corners.append((left, top))
        widths.append((right - left) / 200)
    assert 0.7 < min(widths) < 0.78
    assert max(widths) > 0.96
    assert np.ptp(np.array(corners), axis=0).min() > 35
    assert abs(np.corrcoef(np.array(corners).T)[0, 1]) < 0.6


def test_without_a_crop_frames_are_prepared_as_ever() -> None:
    assert prepared(SPEC, ("flip", "jitter")) is SPEC
    clip = rng(3).integers(0, 256, SPEC.shape, np.uint8)
    assert np.array_equal(augment(clip, (), SPEC, rng()), clip)


def test_half_of_the_clips_are_flipped() -> None:
    clip = ramp()
    flips = [augment(clip, ("flip",), SPEC, rng(seed)) for seed in range(200)]
    flipped = [np.array_equal(made, clip[:, :, ::-1]) for made in flips]
    assert all(f or np.array_equal(made, clip) for f, made in zip(flipped, flips, strict=True))
    assert 70 < sum(flipped) < 130
    assert all(made.flags.c_contiguous for made in flips)


def test_jitter_is_the_formula_and_one_for_all_frames() -> None:
    clip = rng(1).integers(0, 256, SPEC.shape, np.uint8)
    b, c, s = rng(5).uniform(0.8, 1.2, 3)
    grey = clip @ np.array([0.299, 0.587, 0.114])
    wanted = b * (c * (s * clip + (1 - s) * grey[..., None] - 128) + 128)
    made = augment(clip, ("jitter",), SPEC, rng(5))
    assert made.dtype == np.uint8
    assert np.abs(made - np.clip(wanted, 0, 255)).max() < 1  # rounded, in fixed point
    black = np.zeros(SPEC.shape, np.uint8)
    values = [int(augment(black, ("jitter",), SPEC, rng(k)).max()) for k in range(20)]
    assert 0 in values
    assert max(values) <= 128 * 0.2 * 1.2 + 1


def test_what_is_drawn_depends_on_seed_epoch_and_index(tmp_path: Path) -> None:
    data = layouts.folder(tmp_path)
    first = open_data(data, "train", SPEC, DataSettings(seed=1))
    again = open_data(data, "train", SPEC, DataSettings(seed=1, epoch=4, clips=3))
    forwards = [first.at_epoch(4)[i][0] for i in range(3)]
    backwards = [again[i][0] for i in (2, 1, 0)][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(forwards, backwards, strict=True))
    others = [first.at_epoch(5)[0][0], first.at_epoch(4)[2][0]]
    others.append(open_data(data, "train", SPEC, DataSettings(seed=2, epoch=4))[0][0])
    assert not any(np.array_equal(forwards[0], other) for other in others)


@pytest.mark.parametrize("split", ["val", "test"])
def test_only_training_clips_vary(tmp_path: Path, split: str) -> None:
    data = layouts.folder(tmp_path)
    varied = DataSettings(augment=("crop", "flip", "jitter"))
    plain = open_data(data, split, SPEC, DataSettings(augment=("none",)))
    for i in range(len(plain)):
        assert np.array_equal(open_data(data, split, SPEC, varied)[i][0], plain[i][0])


@pytest.mark.parametrize(
    "sided", ["turn-left", "Right hook", "TurnLeft", "walk_leftwards", "anticlockwise"]
)
def test_a_class_that_names_a_side_is_never_flipped(
    sided: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "vmoe")
    assert kinds(DataSettings(), "train", ("hug", sided)) == ("crop", "jitter")
    assert caplog.messages == [
        f"training clips are not flipped: it would make class {sided!r} wrong"
    ]
    with pytest.raises(SettingError, match=r"wrong: it swaps left and right\. Give .* crop\."):
        kinds(DataSettings(augment=("flip", "crop")), "train", (sided, "hug"))
    with pytest.raises(SettingError, match=r"Give --augment none\."):
        kinds(DataSettings(augment=("flip",)), "train", (sided, "hug"))
    assert kinds(DataSettings(augment=("flip",)), "val", (sided, "hug")) == ()


@pytest.mark.parametrize("other", ["hug", "bright light", "Copyright", "cleft", "upright"])
def test_a_class_that_names_none_is(other: str) -> None:
    assert kinds(DataSettings(), "train", (other, "kick")) == ("crop", "flip", "jitter")


def test_augmentations_that_exclude_each_other_are_refused() -> None:
    for given in (("none", "crop"), ("crop", "auto"), ()):
        with pytest.raises(
            SettingError, match=r"--augment is .*; give auto, none, or some of crop"
        ):
            DataSettings(augment=given)
    with pytest.raises(SettingError, match="did you mean 'flip'"):
        DataSettings(augment=("flipp",))


def test_camera_motion_refuses_what_it_draws_itself() -> None:
    for given in ("crop", "flip", "jitter"):
        with pytest.raises(SettingError, match=f"takes no --augment {given}: a flip would make"):
            open_data("camera-motion", "train", SPEC, DataSettings(augment=(given,)))
    for given in ("auto", "none"):
        open_data("camera-motion", "train", SPEC, DataSettings(augment=(given,)))


def test_cropped_frames_come_from_beyond_the_clip(tmp_path: Path) -> None:
    """Frames are prepared 8/7 as large: the whole of the video is in reach, sharper."""
    for label in ("a", "b"):
        for split in ("train", "val"):
            (tmp_path / split / label).mkdir(parents=True)
            write(tmp_path / split / label / "x.avi", frames=10)
    spec = ClipSpec(frames=4, spacing_s=0.1, height=48, width=64)
    data = open_data(str(tmp_path), "train", spec, DataSettings(augment=("crop",)))
    clips = [data.at_epoch(e)[0][0] for e in range(8)]
    assert all(clip.shape == spec.shape for clip in clips)
    assert len({clip.tobytes() for clip in clips}) == 8
    assert _augment.LARGER * _augment.SMALLEST < 1 < _augment.LARGER
