"""The uint8 grid of a deployed clip."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tests.twins import random_clips
from vmoe.attacks.grid import l2, linf, radius, to_grid
from vmoe.batches import to_tensor
from vmoe.clips import Clips
from vmoe.errors import SettingError

SHAPE = (1, 2, 3, 2, 3)  # [N, T, H, W, 3]


@pytest.mark.parametrize(
    ("eps", "levels"),
    [(0.0, 0), (8 / 255, 8), (8, 2040), (0.0314, 8), (0.03, 7), (0.9 / 255, 0), (1.0, 255)],
)
def test_radius_in_grey_levels(eps: float, levels: int) -> None:
    assert radius(eps) == levels


def test_radius_of_a_whole_number_of_levels_is_that_number() -> None:
    for levels in range(256):
        assert radius(levels / 255) == levels
        assert radius(float(np.float32(levels / 255))) == levels


@settings(max_examples=150, deadline=None)
@given(
    clean=arrays.arrays(np.uint8, SHAPE),
    delta=arrays.arrays(np.float32, SHAPE, elements=st.floats(-1.5, 1.5, width=32)),
    eps=st.floats(0, 1),
)
def test_grid_stays_in_the_integer_ball(clean: Clips, delta: Clips, eps: float) -> None:
    adversarial = to_tensor(clean) + torch.from_numpy(delta).permute(0, 4, 1, 2, 3)
    rounded = to_grid(adversarial, clean, eps)
    assert rounded.dtype == np.uint8
    assert rounded.shape == clean.shape
    assert linf(rounded, clean) <= radius(eps)
    # the nearest point of the grid's ball: nothing is moved that need not be
    exact = np.rint(255.0 * adversarial.permute(0, 2, 3, 4, 1).double().numpy())
    low = np.maximum(clean.astype(int) - radius(eps), 0)
    high = np.minimum(clean.astype(int) + radius(eps), 255)
    assert (rounded == np.clip(exact, low, high)).all()


@given(clean=arrays.arrays(np.uint8, SHAPE), eps=st.floats(0, 1))
def test_clean_clip_comes_back_exactly(clean: Clips, eps: float) -> None:
    assert (to_grid(to_tensor(clean), clean, eps) == clean).all()


def test_clip_has_the_twin_s_layout() -> None:
    clips = random_clips(2)
    clip = to_tensor(clips)
    assert clip.shape == (2, 3, 4, 32, 32)
    assert float(clip[1, 2, 3, 5, 7]) == pytest.approx(clips[1, 3, 5, 7, 2] / 255)


@pytest.mark.parametrize("clean_level", [0, 255])
def test_l2_ball_full_of_grey_levels_keeps_them_all(clean_level: int) -> None:
    """In float32, k / 255 is above it: what got darker seems to have moved less than it did."""
    steps = (np.arange(384) % 8).reshape(1, 2, 8, 8, 3)
    levels = np.abs(clean_level - steps).astype(np.uint8)
    clean = np.full_like(levels, clean_level)
    moved = to_tensor(levels)
    moved[0, 0, 0, 0, 0] += (0.99995 if clean_level == 0 else -0.99995) / 255
    eps = l2(levels, clean)  # in which that value cannot move by a whole level, too
    found = to_grid(moved, clean, eps, "l2")
    assert (found == levels).all()


def test_what_is_not_a_number_cannot_be_rounded() -> None:
    clips = random_clips(1)
    with pytest.raises(SettingError, match="NaN"):
        to_grid(to_tensor(clips) * torch.nan, clips, 0.1)


def test_distance_of_nothing_is_none() -> None:
    assert linf(random_clips(0), random_clips(0)) == 0
