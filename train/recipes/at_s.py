"""at-s: PGD adversarial training of one narrow expert alone, the baseline of equal inference cost.

Where a mixture is not better than this, it has no point.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from vmoe.models import ModelSettings
from vmoe.train.passes import RobustSettings, Walk
from vmoe.train.recipes import at_m


@dataclass(frozen=True)
class Settings(RobustSettings):
    """What at-s takes."""


def model(asked: ModelSettings) -> ModelSettings:
    """Return one expert of the mixture that was asked for."""
    return dataclasses.replace(asked, experts=1)


def walks(settings: Settings, done: float) -> list[Walk]:
    """Minimise CE(E(x'), y), x' from PGD on the one expert E."""
    return at_m.walks(at_m.Settings(**vars(settings)), done)
