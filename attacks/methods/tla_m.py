"""TLA-M: the temporal Lipschitz attack on the whole model. Source: arXiv 2602.01369."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vmoe.attacks import losses
from vmoe.attacks.climbs import fixed
from vmoe.attacks.loop import AttackResult, TemporalSettings, route_grad_option
from vmoe.models import VideoMoE

PART = "model"


@dataclass(frozen=True)
class Settings(TemporalSettings):
    """TLA-M's settings."""

    route_grad: str = route_grad_option()


def attack(
    twin: VideoMoE, clip: Tensor, label: Tensor, settings: Settings, indices: Tensor | None = None
) -> AttackResult:
    """Maximise CE(F(x+d), y) + lam L_Lip(F); success: the label is wrong."""
    return losses.maximise(twin, clip, label, settings, indices, fixed)
