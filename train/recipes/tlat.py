"""tlat: J-TLAT's last step alone, with clips from TLA-M. Source: arXiv 2602.01369."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vmoe.attacks.methods import tla_m
from vmoe.batches import Batch
from vmoe.models import VideoMoE
from vmoe.train.passes import LipschitzSettings, Pass, Update, Walk, whole_update


@dataclass(frozen=True)
class Settings(LipschitzSettings):
    """What tlat takes."""


def walks(settings: Settings, done: float) -> list[Walk]:
    """Minimise CE(F(x'), y) + lam L_Lip(F) + balance, x' from TLA-M."""

    def prepare(twin: VideoMoE, batch: Batch, seed: int) -> tuple[Tensor, int]:
        how = tla_m.Settings(**settings.temporal_attack(seed))
        found = tla_m.attack(twin, batch.clip, batch.label, how, batch.index)
        return found.adversarial, int(found.backwards.sum())

    def update(twin: VideoMoE, batch: Batch, clip: Tensor) -> Update:
        return whole_update(twin, batch, clip, settings, settings.lam)

    return [(Pass("whole", "whole", update, prepare),)]
