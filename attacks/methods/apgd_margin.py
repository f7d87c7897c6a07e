"""APGD on the margin: the best other logit less the label's.

Source: Croce and Hein, ICML 2020.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vmoe.attacks import losses
from vmoe.attacks.apgd import ApgdSettings, climb
from vmoe.attacks.loop import AttackResult
from vmoe.models import VideoMoE

PART = "model"


@dataclass(frozen=True)
class Settings(ApgdSettings):
    """APGD-margin's settings."""


def attack(
    twin: VideoMoE, clip: Tensor, label: Tensor, settings: Settings, indices: Tensor | None = None
) -> AttackResult:
    """Maximise max_{i != y} F_i(x+d) - F_y(x+d); success: the label is wrong."""
    return losses.maximise(twin, clip, label, settings, indices, climb, loss=losses.margin)
