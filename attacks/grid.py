"""The grid of a deployed clip: uint8. What an attack found is rounded to it, then judged.

A bundle takes uint8 [N, T, H, W, 3]; a perturbation that lives between two grey levels cannot be
deployed. The ball on the grid is one of integers, around the clean uint8 clip.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from vmoe.attacks import ball
from vmoe.batches import to_tensor
from vmoe.clips import Clips
from vmoe.errors import SettingError


def radius(eps: float) -> int:
    """Return the radius of the L-infinity ball on the grid, in grey levels: floor(255 eps + 1e-6).

    Args:
        eps: L-infinity budget, on pixels in [0, 1].
    """
    return math.floor(255 * eps + 1e-6)


def rounded(moved: Tensor, clip: Tensor, eps: float, norm: str = "linf") -> Tensor:
    """Round clips to the grid, within the ball around clean clips that lie on it.

    Args:
        moved: [B, 3, T, H, W], pixels in [0, 1].
        clip: clean, the same shape.
        eps: budget, on pixels in [0, 1].
        norm: linf rounds to the nearest level within the integer ball; l2 towards the clean clip,
            so that no value moves further than it did.

    Returns:
        Multiples of 1/255, as `to_tensor` gives them of uint8.
    """
    if norm == "linf":
        return nearest(moved, *bounds(clip, eps))
    clean = (255 * clip).round_()
    delta = 255 * moved - clean
    change = (delta.abs() + 1e-4).floor() * delta.sign()  # 1e-4: of float32
    far = ball.size(change, "l2") > 255 * eps * (1 + 1e-6)
    if far.any():  # then without it, but for what lies on the grid already
        near = delta.round()
        held = ((clean + near) / 255).float() == moved.float()
        least = torch.where(held, near, delta.trunc())
        change = torch.where(ball.spread(far, change), least, change)
    levels = clean + change
    return levels.clamp_(0, 255).div_(255)


def bounds(clip: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the ends of the integer L-infinity ball around each pixel, in grey levels."""
    clean, r = (255 * clip).round_(), radius(eps)
    return (clean - r).clamp_(min=0), (clean + r).clamp_(max=255)


def nearest(moved: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return the multiples of 1/255 nearest to clips, between two grey levels for each pixel."""
    return (255 * moved).round_().clamp_(low, high).div_(255)


def holds(clip: Tensor) -> bool:
    """Return whether uint8 can hold a clip: whether all of its pixels are multiples of 1/255."""
    levels = 255 * clip
    return bool((levels - levels.round()).abs().max() < 1e-3)


def to_grid(adversarial: Tensor, clean: Clips, eps: float, norm: str = "linf") -> Clips:
    """Round an adversarial clip to the grid, as `rounded` does.

    Args:
        adversarial: [N, 3, T, H, W], pixels in [0, 1].
        clean: the clip it was made from, uint8 [N, T, H, W, 3].
        eps: budget, on pixels in [0, 1].
        norm: linf or l2.

    Returns:
        uint8 [N, T, H, W, 3].

    Raises:
        SettingError: a value that is not finite.
    """
    values = adversarial.detach().cpu()
    if not values.isfinite().all():
        raise SettingError("an adversarial clip holds NaN or infinity: it cannot be rounded.")
    levels = 255 * rounded(values.double(), to_tensor(clean).double(), eps, norm)
    made: Clips = levels.round().byte().permute(0, 2, 3, 4, 1).contiguous().numpy()
    return made


def linf(adversarial: Clips, clean: Clips) -> int:
    """Return the largest change of a value, in grey levels; 0 of no clips."""
    return int(np.abs(adversarial.astype(np.int16) - clean).max(initial=0))


def l2(adversarial: Clips, clean: Clips) -> float:
    """Return the largest L2 change of a clip, on pixels in [0, 1]; 0 of no clips."""
    delta = (adversarial.astype(np.int16) - clean).reshape(len(clean), -1) / 255
    return float(np.sqrt(np.square(delta).sum(axis=1)).max(initial=0))
