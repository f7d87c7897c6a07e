"""FGSM: one whole step of PGD, without a random start. Source: Goodfellow et al., ICLR 2015."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vmoe.attacks.loop import AttackResult, route_grad_option
from vmoe.attacks.methods import pgd
from vmoe.models import VideoMoE
from vmoe.settings import Settings as Base
from vmoe.settings import opt

PART = "model"


@dataclass(frozen=True)
class Settings(Base):
    """FGSM's settings."""

    eps: float = opt(8 / 255, "L-infinity budget, on pixels in [0, 1]", at_least=0, at_most=1)
    route_grad: str = route_grad_option()


def attack(
    twin: VideoMoE, clip: Tensor, label: Tensor, settings: Settings, indices: Tensor | None = None
) -> AttackResult:
    """Maximise CE(F(x+d), y) in one step of eps; success: the label is wrong."""
    one = pgd.Settings(
        eps=settings.eps, steps=1, step=1.0, random_start=False, route_grad=settings.route_grad
    )
    return pgd.attack(twin, clip, label, one, indices)
