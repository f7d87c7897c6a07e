"""at-d: PGD adversarial training of the dense counterpart, one network of twice the width."""

from __future__ import annotations

from dataclasses import dataclass

from vmoe.errors import SettingError
from vmoe.models import ModelSettings, dense_counterpart
from vmoe.train.passes import RobustSettings, Walk
from vmoe.train.recipes import at_m


@dataclass(frozen=True)
class Settings(RobustSettings):
    """What at-d takes."""


def model(asked: ModelSettings) -> ModelSettings:
    """Return the dense counterpart of the mixture that was asked for.

    Raises:
        SettingError: it was no mixture.
    """
    if asked.experts == 1:
        raise SettingError(
            "--method at-d trains the dense counterpart of a mixture: give the mixture's --width "
            "and --experts 2 or more; what is trained is one network of twice that width."
        )
    return dense_counterpart(asked)


def walks(settings: Settings, done: float) -> list[Walk]:
    """Minimise CE(E(x'), y), x' from PGD on the one network E."""
    return at_m.walks(at_m.Settings(**vars(settings)), done)
