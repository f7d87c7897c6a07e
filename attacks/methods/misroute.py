"""Misroute: send clips to another expert, any or a chosen one; which label follows is left open."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vmoe.attacks import losses
from vmoe.attacks.climbs import fixed
from vmoe.attacks.loop import AttackResult, LoopSettings, ascend
from vmoe.models import VideoMoE
from vmoe.settings import opt

PART = "router"


@dataclass(frozen=True)
class Settings(LoopSettings):
    """Misroute's settings."""

    to_expert: int | None = opt(None, "the expert to send clips to; default: any other", at_least=0)


def attack(
    twin: VideoMoE, clip: Tensor, label: Tensor, settings: Settings, indices: Tensor | None = None
) -> AttackResult:
    """Maximise the margin of scores, by steps of fixed size.

    Away from the clean route, max_{i != top1(x)} R_i(x+d) - R_top1(x)(x+d); success: the route has
    changed. To a chosen expert e, R_e(x+d) - max_{i != e} R_i(x+d); success: the route is e.

    Raises:
        SettingError: the model is dense, or has no such expert.
    """
    return ascend(
        twin,
        clip,
        settings,
        lambda x: losses.misroute(twin, x, settings.to_expert),
        indices,
        climb=fixed,
    )
