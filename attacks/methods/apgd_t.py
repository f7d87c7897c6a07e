"""APGD-T: APGD towards one other label after the other, the nearest first.

Source: Croce and Hein, ICML 2020.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vmoe.attacks import losses
from vmoe.attacks.apgd import ApgdSettings, climb
from vmoe.attacks.loop import AttackResult, ascend
from vmoe.models import VideoMoE
from vmoe.settings import opt

PART = "model"


@dataclass(frozen=True)
class Settings(ApgdSettings):
    """APGD-T's settings; steps are those towards one label."""

    targets: int = opt(9, "other labels that are tried, the nearest first", at_least=1)


def attack(
    twin: VideoMoE, clip: Tensor, label: Tensor, settings: Settings, indices: Tensor | None = None
) -> AttackResult:
    """Maximise the targeted DLR towards each label t, below 4 labels F_t(x+d) - F_y(x+d).

    Success: the label is wrong, whichever it is.
    """
    return ascend(
        twin,
        clip,
        settings,
        lambda x: losses.targets(
            twin,
            x,
            label,
            settings,
            route_grad=settings.route_grad,
            count=settings.targets,
            loss=losses.targeted_dlr,
        ),
        indices,
        climb=climb,
    )
