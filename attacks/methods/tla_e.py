"""TLA-E: the temporal Lipschitz attack on one expert. Source: arXiv 2602.01369."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vmoe.attacks import losses
from vmoe.attacks.climbs import fixed
from vmoe.attacks.loop import AttackResult, TemporalSettings, ascend
from vmoe.models import VideoMoE
from vmoe.settings import opt

PART = "expert"


@dataclass(frozen=True)
class Settings(TemporalSettings):
    """TLA-E's settings."""

    expert: int = opt(0, "which expert", at_least=0)


def attack(
    twin: VideoMoE, clip: Tensor, label: Tensor, settings: Settings, indices: Tensor | None = None
) -> AttackResult:
    """Maximise CE(E_i(x+d), y) + lam L_Lip(E_i); success: that expert is wrong."""
    return ascend(
        twin,
        clip,
        settings,
        lambda x: losses.expert(twin, x, label, settings.expert, settings),
        indices,
        climb=fixed,
    )
