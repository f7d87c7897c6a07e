"""SPSA: Adam on gradients estimated from probes of random signs; a black-box attack.

Source: Uesato, O'Donoghue, van den Oord and Kohli, "Adversarial risk and the dangers of evaluating
against weak attacks", ICML 2018.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from vmoe.attacks import losses
from vmoe.attacks.estimate import EstimateSettings, Estimator
from vmoe.attacks.loop import AttackResult, Search
from vmoe.models import VideoMoE

PART = "model"
OPTIMAL = False  # it goes by chance
DECAY = 0.9, 0.999  # of Adam's two means


@dataclass(frozen=True)
class Settings(EstimateSettings):
    """SPSA's settings."""


def attack(
    twin: VideoMoE, clip: Tensor, label: Tensor, settings: Settings, indices: Tensor | None = None
) -> AttackResult:
    """Maximise max_{i != y} F_i(x+d) - F_y(x+d); success: the label is wrong."""
    return losses.maximise(twin, clip, label, settings, indices, _climb, loss=losses.margin)


def signs(shape: torch.Size, own: Generator) -> Tensor:
    """Return a direction of independent values -1 and 1."""
    return 2 * torch.randint(2, shape, generator=own) - 1


def _climb(search: Search, clip: Tensor) -> None:
    """Take Adam's steps: d <- project(d + a m / sqrt(v)), m and v means of gradient and square.

    a is step eps; of L2, a pixel's share of it.
    """
    how = search.settings
    assert isinstance(how, EstimateSettings)
    size = how.step * how.eps
    if how.norm == "l2":  # a step that moves every pixel by its size has the length step eps
        size /= clip[0].numel() ** 0.5
    estimator = Estimator(search, signs)
    mean, square = torch.zeros_like(clip), torch.zeros_like(clip)
    search.judge(clip)
    for k in range(1, how.rounds + 1):
        if not search.standing.any():
            return
        gradient = estimator.slope(clip)
        mean = DECAY[0] * mean + (1 - DECAY[0]) * gradient
        square = DECAY[1] * square + (1 - DECAY[1]) * gradient.square()
        spread = (square / (1 - DECAY[1] ** k)).sqrt().clamp(min=torch.finfo(clip.dtype).tiny)
        clip = search.project(clip + size * mean / (1 - DECAY[0] ** k) / spread)
        search.judge(clip)
