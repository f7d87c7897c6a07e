"""FGSM: one whole step of PGD, without a random start. Source: Goodfellow et al., ICLR 2015."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vmoe.attacks.loop import AttackResult, BallSettings, route_grad_option
from vmoe.attacks.methods import pgd
from vmoe.models import VideoMoE
from vmoe.settings import to_mapping

PART = "model"


@dataclass(frozen=True)
class Settings(BallSettings):
    """FGSM's settings."""

    route_grad: str = route_grad_option()


def attack(
    twin: VideoMoE, clip: Tensor, label: Tensor, settings: Settings, indices: Tensor | None = None
) -> AttackResult:
    """Maximise CE(F(x+d), y) in one step of eps; success: the label is wrong."""
    one = pgd.Settings(steps=1, step=1.0, random_start=False, **to_mapping(settings))
    return pgd.attack(twin, clip, label, one, indices)
