"""standard: training on clean clips."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vmoe.batches import Batch
from vmoe.models import VideoMoE
from vmoe.train.passes import Pass, RecipeSettings, Update, Walk, clean_clips, whole_update


@dataclass(frozen=True)
class Settings(RecipeSettings):
    """What standard training takes."""


def walks(settings: Settings, done: float) -> list[Walk]:
    """Minimise CE(F(x), y) + balance."""

    def update(twin: VideoMoE, batch: Batch, clip: Tensor) -> Update:
        return whole_update(twin, batch, clip, settings)

    return [(Pass("whole", "whole", update, clean_clips),)]
