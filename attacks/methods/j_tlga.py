"""J-TLGA: TLA-M and TLGA-R jointly. Source: arXiv 2602.01369."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vmoe.attacks import losses
from vmoe.attacks.climbs import fixed
from vmoe.attacks.loop import AttackResult, TemporalSettings, route_grad_option
from vmoe.models import VideoMoE
from vmoe.settings import opt

PART = "model"


@dataclass(frozen=True)
class Settings(TemporalSettings):
    """J-TLGA's settings."""

    gamma1: float = opt(1.0, "weight of the steering to the weakest expert", at_least=0)
    gamma2: float = opt(0.1, "weight of the router's loss", at_least=0)
    route_grad: str = route_grad_option()


def attack(
    twin: VideoMoE, clip: Tensor, label: Tensor, settings: Settings, indices: Tensor | None = None
) -> AttackResult:
    """Maximise TLA-M's loss + gamma2 TLGA-R's loss; success: the label is wrong."""
    return losses.maximise(
        twin, clip, label, settings, indices, fixed, gamma1=settings.gamma1, gamma2=settings.gamma2
    )
