"""NES: PGD with momentum, on gradients estimated from Gaussian probes; a black-box attack.

Source: Ilyas, Engstrom, Athalye and Lin, "Black-box adversarial attacks with limited queries and
information", ICML 2018.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from vmoe.attacks import ball, losses
from vmoe.attacks.estimate import EstimateSettings, Estimator
from vmoe.attacks.loop import AttackResult, Search
from vmoe.models import VideoMoE

PART = "model"
OPTIMAL = False  # it goes by chance
MOMENTUM = 0.9  # of the authors' code


@dataclass(frozen=True)
class Settings(EstimateSettings):
    """NES's settings."""


def attack(
    twin: VideoMoE, clip: Tensor, label: Tensor, settings: Settings, indices: Tensor | None = None
) -> AttackResult:
    """Maximise max_{i != y} F_i(x+d) - F_y(x+d); success: the label is wrong."""
    return losses.maximise(twin, clip, label, settings, indices, _climb, loss=losses.margin)


def gaussian(shape: torch.Size, own: Generator) -> Tensor:
    """Return a direction of independent standard normal values."""
    return torch.randn(shape, generator=own)


def _climb(search: Search, clip: Tensor) -> None:
    """Take steps of fixed size: d <- project(d + step eps steepest(mean of gradients))."""
    how = search.settings
    assert isinstance(how, EstimateSettings)
    estimator, mean = Estimator(search, gaussian), torch.zeros_like(clip)
    search.judge(clip)
    for _ in range(how.rounds):
        if not search.standing.any():
            return
        mean = MOMENTUM * mean + (1 - MOMENTUM) * estimator.slope(clip)
        clip = search.project(clip + how.step * how.eps * ball.steepest(mean, how.norm))
        search.judge(clip)
