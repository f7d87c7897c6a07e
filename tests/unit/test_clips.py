"""Which frames a clip takes, by their timestamps; and how a frame is fitted to the spec."""

from __future__ import annotations

import itertools

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmoe.clips import ClipSpec, check_clips, choose, prepare, too_slow
from vmoe.errors import SettingError, UnknownNameError

SPEC = ClipSpec(frames=4, spacing_s=0.1, height=16, width=24)


def regular(count: int, period_s: float) -> list[float]:
    return [i * period_s for i in range(count)]


def test_exact_times_give_every_frame() -> None:
    assert choose(regular(4, 0.1), 0.3, SPEC) == [0, 1, 2, 3]
    assert choose(regular(10, 0.1), 0.9, SPEC) == [6, 7, 8, 9]


def test_faster_frames_are_thinned_by_time() -> None:
    assert choose(regular(31, 0.02), 0.6, SPEC) == [15, 20, 25, 30]


def test_uneven_rate_takes_the_nearest_frame() -> None:
    # wanted -0.2 .. 0.1 from 0.4: 0.1, 0.2, 0.3, 0.4
    assert choose([0.0, 0.08, 0.14, 0.19, 0.26, 0.33, 0.4], 0.4, SPEC) == [1, 3, 5, 6]


def test_a_tie_takes_the_earlier_frame() -> None:
    assert choose([0.0, 0.0625, 0.1875, 0.25], 0.25, ClipSpec(frames=2, spacing_s=0.125)) == [1, 3]


@pytest.mark.parametrize(("off_s", "taken"), [(0.049, True), (0.05, True), (0.051, False)])
def test_a_frame_may_be_half_a_spacing_off(off_s: float, taken: bool) -> None:
    spec = ClipSpec(frames=2, spacing_s=0.1)
    for early_or_late in (-off_s, off_s):
        found = choose([0.0, 0.3 + early_or_late, 0.4], 0.4, spec)
        assert found == ([1, 2] if taken else None)


def test_frames_too_far_apart_are_refused_and_resampled_when_asked() -> None:
    times = regular(5, 0.25)
    assert choose(times, 1.0, SPEC) is None
    assert choose(times, 1.0, SPEC, nearest=True) == [3, 3, 4, 4]


def test_a_gap_within_the_window_is_refused() -> None:
    assert choose([0.0, 0.1, 0.2, 0.5, 0.6], 0.6, SPEC) is None
    assert choose([0.0, 0.1, 0.2, 0.3, 0.6], 0.3, SPEC) == [0, 1, 2, 3]


def test_no_frame_stands_twice() -> None:
    # 0.05 is the nearest to both 0.0 and 0.1, and within half a spacing of both
    spec = ClipSpec(frames=3, spacing_s=0.1)
    assert choose([0.05, 0.2], 0.2, spec) is None
    assert choose([0.05, 0.2], 0.2, spec, nearest=True) == [0, 0, 1]
    assert choose([0.0, 0.05, 0.2], 0.2, spec) == [0, 1, 2]


@pytest.mark.parametrize("fps", [12.5, 25.0, 30.0, 50.0])
def test_windows_some_spacings_apart_share_frames(fps: float) -> None:
    """Timestamps are floats: of two frames that are as near, it is always the earlier one."""
    times = np.arange(400) / fps
    hop = round(0.4 * fps)
    ends = range(len(times) - 1 - 10 * hop, len(times), hop)
    found = [choose(times, times[end], SPEC) for end in ends]
    assert None not in found
    for one, other in itertools.pairwise(found):
        assert [i + hop for i in one] == other  # type: ignore[union-attr]


def test_too_few_frames() -> None:
    assert choose([], 0.0, SPEC) is None
    assert choose([0.0], 0.0, SPEC) is None
    assert choose([0.0], 0.0, SPEC, nearest=True) == [0, 0, 0, 0]
    assert choose([0.7], 0.7, ClipSpec(frames=1)) == [0]
    assert choose(regular(3, 0.1), 0.2, SPEC) is None


@given(
    st.lists(st.floats(0.001, 0.3), min_size=1, max_size=30),
    st.integers(1, 6),
    st.sampled_from([0.05, 0.1, 0.125]),
)
def test_choice_is_the_nearest_one_by_brute_force(
    steps: list[float], frames: int, spacing: float
) -> None:
    times = np.cumsum(steps)
    spec = ClipSpec(frames=frames, spacing_s=spacing)
    found = choose(times, float(times[-1]), spec, nearest=True)
    strict = choose(times.tolist(), float(times[-1]), spec)
    assert found is not None
    wanted = times[-1] - spacing * np.arange(frames - 1, -1, -1)
    least = np.abs(times[None] - wanted[:, None]).min(axis=1)
    np.testing.assert_allclose(np.abs(times[found] - wanted), least, atol=1e-6)  # up to a tie
    good = (least <= spacing / 2 + 1e-6).all() and len(set(found)) == frames
    assert strict == (found if good else None)


def test_window_is_first_to_last() -> None:
    assert ClipSpec(frames=8, spacing_s=0.1).window_s == pytest.approx(0.7)
    assert ClipSpec(frames=1).window_s == 0


@pytest.mark.parametrize(("frame_s", "slow"), [(0.04, False), (0.101, False), (0.125, True)])
def test_too_slow(frame_s: float, slow: bool) -> None:
    assert too_slow(frame_s, SPEC) is slow


@pytest.mark.parametrize("shape", [(16, 24), (32, 48), (480, 640), (100, 30), (9, 200), (8, 8)])
@pytest.mark.parametrize("resize", ["cover", "stretch"])
@pytest.mark.parametrize("interpolation", ["area", "linear"])
def test_every_size_is_fitted(shape: tuple[int, int], resize: str, interpolation: str) -> None:
    spec = ClipSpec(height=16, width=24, resize=resize, interpolation=interpolation)
    frame = np.full((*shape, 3), (10, 120, 250), np.uint8)
    fitted = prepare(frame, spec)
    assert fitted.shape == (16, 24, 3)
    assert fitted.dtype == np.uint8
    assert fitted.flags.c_contiguous
    assert (fitted == (10, 120, 250)).all()  # channels keep their order


def test_right_size_is_left_alone() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    np.testing.assert_array_equal(prepare(frame, SPEC), frame)
    np.testing.assert_array_equal(prepare(frame[:, ::-1], SPEC), frame[:, ::-1])


def test_area_is_the_mean_of_blocks() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    means = frame.reshape(16, 2, 24, 2, 3).mean(axis=(1, 3))
    assert np.abs(prepare(frame, SPEC) - means).max() <= 0.5


def test_a_large_frame_is_halved_first_and_is_still_the_mean_of_its_pixels() -> None:
    rng = np.random.default_rng(0)
    rough = rng.integers(0, 256, (16, 24, 3), dtype=np.uint8)
    frame = cv2.resize(rough, (241, 161), interpolation=cv2.INTER_CUBIC)  # no even halves
    means = frame[:160, :240].reshape(16, 10, 24, 10, 3).mean(axis=(1, 3))
    off = prepare(frame, SPEC) - means
    assert np.abs(off).mean() < 5  # of 60, what the pixels themselves differ by
    assert abs(off.mean()) < 0.5


def test_cover_crops_the_centre() -> None:
    wide = np.zeros((16, 64, 3), np.uint8)
    wide[:] = np.arange(64)[None, :, None]
    np.testing.assert_array_equal(prepare(wide, SPEC)[0, :, 0], np.arange(20, 44))
    tall = np.zeros((56, 24, 3), np.uint8)
    tall[:] = np.arange(56)[:, None, None]
    np.testing.assert_array_equal(prepare(tall, SPEC)[:, 0, 0], np.arange(20, 36))


def test_stretch_keeps_all_of_it() -> None:
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 48:] = 200
    spec = ClipSpec(height=16, width=24, resize="stretch")
    np.testing.assert_array_equal(prepare(wide, spec)[3, :, 1], [0] * 12 + [200] * 12)


def test_check_clips_names_what_is_wanted() -> None:
    check_clips(np.zeros((0, *SPEC.shape), np.uint8), SPEC)
    for wrong in (
        np.zeros((1, 4, 16, 24, 3), np.float32),
        np.zeros((4, 16, 24, 3), np.uint8),
        np.zeros((1, 5, 16, 24, 3), np.uint8),
    ):
        with pytest.raises(SettingError, match=r"takes uint8 \[N, 4, 16, 24, 3\]"):
            check_clips(wrong, SPEC)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"frames": 0}, "--frames is 0; it must be at least 1"),
        ({"spacing_s": 0.0}, "--spacing-s is 0.0; it must be above 0"),
        ({"spacing_s": float("nan")}, "finite"),
        ({"height": 4}, "--height is 4; it must be at least 8"),
        ({"std": (0.2, 0.0, 0.2)}, "--std is 0.0; it must be above 0"),
        ({"mean": (0.5,)}, "mean is .* 3 numbers"),
    ],
)
def test_a_bad_spec_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        ClipSpec(**values)  # type: ignore[arg-type]


def test_an_unknown_rule_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'cover'"):
        ClipSpec(resize="covr")
