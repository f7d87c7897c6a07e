"""APGD on the cross-entropy.

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
    """APGD-CE's settings."""


def attack(
    twin: VideoMoE, clip: Tensor, label: Tensor, settings: Settings, indices: Tensor | None = None
) -> AttackResult:
    """Maximise CE(F(x+d), y); success: the label is wrong."""
    return losses.maximise(twin, clip, label, settings, indices, climb, loss=losses.ce)
