"""PGD on the whole model. Source: Madry et al., ICLR 2018."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vmoe.attacks import losses
from vmoe.attacks.climbs import fixed
from vmoe.attacks.loop import AttackResult, LoopSettings, route_grad_option
from vmoe.models import VideoMoE

PART = "model"


@dataclass(frozen=True)
class Settings(LoopSettings):
    """PGD's settings."""

    route_grad: str = route_grad_option()


def attack(
    twin: VideoMoE, clip: Tensor, label: Tensor, settings: Settings, indices: Tensor | None = None
) -> AttackResult:
    """Maximise CE(F(x+d), y); success: the label is wrong."""
    return losses.maximise(twin, clip, label, settings, indices, fixed)
