"""at-m: PGD adversarial training of the mixture as a whole. Source: Madry et al., ICLR 2018."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vmoe.attacks.methods import pgd
from vmoe.batches import Batch
from vmoe.models import VideoMoE
from vmoe.train.passes import Pass, RobustSettings, Update, whole_update


@dataclass(frozen=True)
class Settings(RobustSettings):
    """What at-m takes."""


def passes(settings: Settings) -> list[Pass]:
    """Minimise CE(F(x'), y) + balance, x' from PGD on F."""

    def prepare(twin: VideoMoE, batch: Batch, seed: int) -> tuple[Tensor, int]:
        how = pgd.Settings(
            eps=settings.eps, steps=settings.steps, step=settings.step, seed=seed, early_stop=False
        )
        found = pgd.attack(twin, batch.clip, batch.label, how, batch.index)
        return found.adversarial, int(found.backwards.sum())

    def update(twin: VideoMoE, batch: Batch, clip: Tensor) -> Update:
        return whole_update(twin, batch, clip, balance=settings.balance)

    return [Pass("whole", "whole", update, prepare)]
