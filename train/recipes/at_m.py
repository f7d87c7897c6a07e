"""at-m: PGD adversarial training of the mixture as a whole. Source: Madry et al., ICLR 2018."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vmoe.batches import Batch
from vmoe.models import VideoMoE
from vmoe.train.passes import Pass, RobustSettings, Update, Walk, pgd_clips, whole_update


@dataclass(frozen=True)
class Settings(RobustSettings):
    """What at-m takes."""


def walks(settings: Settings, done: float) -> list[Walk]:
    """Minimise CE(F(x'), y) + balance, x' from PGD on F."""

    def update(twin: VideoMoE, batch: Batch, clip: Tensor) -> Update:
        return whole_update(twin, batch, clip, settings)

    return [(Pass("whole", "whole", update, pgd_clips(settings)),)]
