"""TT: temporal translation, PGD on a gradient averaged over copies shifted in time.

Made for transfer: what breaks the clip and its shifted copies hangs less on one model's frames.

Source: Wei, Chen, Wu and Jiang, "Boosting the transferability of video adversarial examples via
temporal translation", AAAI 2022; shifts between neighbours, that wrap around, as there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vmoe.attacks import losses
from vmoe.attacks.climbs import shaped
from vmoe.attacks.loop import AttackResult, LoopSettings, Search, route_grad_option
from vmoe.models import VideoMoE
from vmoe.settings import opt

PART = "model"
OPTIMAL = False  # it follows the average of several gradients


@dataclass(frozen=True)
class Settings(LoopSettings):
    """TT's settings; a step asks for a gradient of each copy."""

    shifts: int = opt(3, "copies are shifted by up to so many frames, both ways", at_least=0)
    shift_weights: str = opt(
        "gaussian", "weights of shifted copies", choices=("gaussian", "linear", "uniform")
    )
    route_grad: str = route_grad_option()


def attack(
    twin: VideoMoE, clip: Tensor, label: Tensor, settings: Settings, indices: Tensor | None = None
) -> AttackResult:
    """Maximise sum_i w_i CE(F(shift_i(x+d)), y), shifted back; success: the label is wrong.

    The clip itself, shift 0, is the only copy that is a candidate.
    """
    return losses.maximise(twin, clip, label, settings, indices, shaped(_average))


def weights(settings: Settings, frames: int) -> dict[int, float]:
    """Return the weight of each shift, which sum to 1; shifts that wrap to the same are one.

    Gaussian: of deviation shifts / 3. Linear: 1 - |i| / (shifts + 1). Both before the sum.
    """
    reach, found = settings.shifts, dict[int, float]()
    for i in range(-reach, reach + 1):
        weight = 1.0
        if settings.shift_weights == "linear":
            weight = 1 - abs(i) / (reach + 1)
        elif settings.shift_weights == "gaussian" and reach:
            weight = math.exp(-0.5 * (3 * i / reach) ** 2)
        found[i % frames] = found.get(i % frames, 0.0) + weight
    total = sum(found.values())
    return {shift: weight / total for shift, weight in found.items()}


def _average(search: Search, clip: Tensor, gradient: Tensor) -> Tensor:
    """Return the average of gradients at copies shifted in time, shifted back."""
    assert isinstance(search.settings, Settings)
    share = weights(search.settings, clip.shape[2])
    total = share.pop(0) * gradient
    for shift, weight in sorted(share.items()):
        _, found = search.slope(torch.roll(clip, shift, dims=2), probe=True)
        total += weight * torch.roll(found, -shift, dims=2)
    return total
