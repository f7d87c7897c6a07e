"""Random noise, the floor: what a model loses without anyone looking at it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vmoe.attacks import losses
from vmoe.attacks.loop import AttackResult, BallSettings, Search
from vmoe.models import VideoMoE
from vmoe.settings import opt

PART = "model"
OPTIMAL = False  # it goes by chance


@dataclass(frozen=True)
class Settings(BallSettings):
    """The noise's settings."""

    random_start: ClassVar[bool] = True
    restarts: int = opt(10, "draws; the best counts", at_least=1)


def attack(
    twin: VideoMoE, clip: Tensor, label: Tensor, settings: Settings, indices: Tensor | None = None
) -> AttackResult:
    """Look at random points of the ball (of L2, of its surface); success: the label is wrong."""
    return losses.maximise(twin, clip, label, settings, indices, _look, loss=losses.margin)


def _look(search: Search, clip: Tensor) -> None:
    search.judge(clip)
