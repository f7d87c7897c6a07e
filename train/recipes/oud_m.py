"""oud-m: adversarial training of the mixture behind an over-complete denoiser.

Source: Lo et al., "Overcomplete Representations Against Adversarial Videos", ICIP 2021, in front
of a mixture as in arXiv 2602.01369's OUD-M; the denoiser is `vmoe.models.denoiser`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from vmoe.models import ModelSettings
from vmoe.train.passes import RobustSettings, Walk
from vmoe.train.recipes import at_m


@dataclass(frozen=True)
class Settings(RobustSettings):
    """What oud-m takes."""


def model(asked: ModelSettings) -> ModelSettings:
    """Return the mixture that was asked for, with a denoiser."""
    return dataclasses.replace(asked, denoise=True)


def walks(settings: Settings, done: float) -> list[Walk]:
    """Minimise CE(F(P(x')), y) + balance, P the denoiser and x' from PGD on F(P)."""
    return at_m.walks(at_m.Settings(**vars(settings)), done)
