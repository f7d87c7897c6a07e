"""TLA-R: the temporal Lipschitz attack on the router. Source: arXiv 2602.01369."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vmoe.attacks import losses
from vmoe.attacks.climbs import fixed
from vmoe.attacks.loop import AttackResult, TemporalSettings, ascend
from vmoe.models import VideoMoE

PART = "router"


@dataclass(frozen=True)
class Settings(TemporalSettings):
    """TLA-R's settings."""


def attack(
    twin: VideoMoE, clip: Tensor, label: Tensor, settings: Settings, indices: Tensor | None = None
) -> AttackResult:
    """Maximise CE(R(x+d), top1(x)) + lam L_Lip(R); success: the route has changed."""
    return ascend(
        twin, clip, settings, lambda x: losses.router(twin, x, settings), indices, climb=fixed
    )
