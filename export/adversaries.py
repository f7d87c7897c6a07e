"""Adversarial clips for calibration: PGD on the twin, rounded to the grid."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from vmoe.attacks import grid
from vmoe.attacks.methods import pgd
from vmoe.batches import to_tensor
from vmoe.clips import Clips
from vmoe.models import VideoMoE

BATCH = 8  # clips that are attacked at a time


def make(
    twin: VideoMoE, clips: Clips, label: NDArray[np.int64], eps: float, steps: int, seed: int
) -> Clips:
    """Return what PGD makes of clips, rounded to uint8 within the ball.

    Args:
        twin: in eval mode.
        clips: uint8 [N, T, H, W, 3].
        label: [N].
        eps: L-infinity budget, on pixels in [0, 1].
        steps: gradient steps.
        seed: of the starts.
    """
    settings = pgd.Settings(eps=eps, steps=steps, seed=seed)
    device = next(twin.parameters()).device
    made = np.empty_like(clips)
    for start in range(0, len(clips), BATCH):
        at = slice(start, start + BATCH)
        clip = to_tensor(clips[at], device)
        target = torch.from_numpy(label[at]).to(device)
        found = pgd.attack(twin, clip, target, settings, torch.arange(len(clips))[at])
        made[at] = grid.to_grid(found.adversarial, clips[at], eps)
    return made
