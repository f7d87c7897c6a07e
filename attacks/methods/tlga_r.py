"""TLGA-R: TLA-R, guided to the expert of the lowest score. Source: arXiv 2602.01369."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vmoe.attacks import losses
from vmoe.attacks.climbs import fixed
from vmoe.attacks.loop import AttackResult, TemporalSettings, ascend
from vmoe.models import VideoMoE
from vmoe.settings import opt

PART = "router"


@dataclass(frozen=True)
class Settings(TemporalSettings):
    """TLGA-R's settings."""

    gamma1: float = opt(1.0, "weight of the steering to the weakest expert", at_least=0)


def attack(
    twin: VideoMoE, clip: Tensor, label: Tensor, settings: Settings, indices: Tensor | None = None
) -> AttackResult:
    """Maximise TLA-R's loss - gamma1 CE(R(x+d), weakest(x)); success: the route has changed."""
    return ascend(
        twin,
        clip,
        settings,
        lambda x: losses.router(twin, x, settings, settings.gamma1),
        indices,
        climb=fixed,
    )
