"""The grid of a deployed clip: uint8. What an attack found is rounded to it, then judged.

A bundle takes uint8 [N, T, H, W, 3]; a perturbation that lives between two grey levels cannot be
deployed. The ball on the grid is one of integers, around the clean uint8 clip.
"""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

from vmoe.clips import Clips
from vmoe.errors import SettingError


def radius(eps: float) -> int:
    """Return the radius of the ball on the grid, in grey levels: floor(255 eps + 1e-6).

    Args:
        eps: L-infinity budget, on pixels in [0, 1].
    """
    return math.floor(255 * eps + 1e-6)


def to_grid(adversarial: Tensor, clean: Clips, eps: float) -> Clips:
    """Round an adversarial clip to the grid, within the integer ball around the clean clip.

    Args:
        adversarial: [N, 3, T, H, W], pixels in [0, 1].
        clean: the clip it was made from, uint8 [N, T, H, W, 3].
        eps: L-infinity budget, on pixels in [0, 1].

    Returns:
        uint8 [N, T, H, W, 3], each value at most radius(eps) from the clean one.

    Raises:
        SettingError: a value that is not finite.
    """
    values = adversarial.detach().permute(0, 2, 3, 4, 1).cpu().double().numpy()
    if not np.isfinite(values).all():
        raise SettingError("an adversarial clip holds NaN or infinity: it cannot be rounded.")
    r = radius(eps)
    rounded = np.rint(255 * values).clip(0, 255).astype(np.int16)
    ball = clean.astype(np.int16)
    grid: Clips = np.clip(rounded, ball - r, ball + r).clip(0, 255).astype(np.uint8)
    return grid


def linf(adversarial: Clips, clean: Clips) -> int:
    """Return the largest change of a value, in grey levels; 0 of no clips."""
    return int(np.abs(adversarial.astype(np.int16) - clean).max(initial=0))
