"""Frame-sparse: PGD that changes a few frames of a clip, and leaves the others as they are.

Source: Wei, Zhu, Yuan and Su, "Sparse adversarial perturbations for videos", AAAI 2019: there the
frames come from a penalty and a mask; here from the gradient, and their number is fixed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vmoe.attacks import losses
from vmoe.attacks.climbs import shaped
from vmoe.attacks.loop import AttackResult, LoopSettings, Search, route_grad_option
from vmoe.errors import SettingError
from vmoe.models import VideoMoE
from vmoe.settings import opt

PART = "model"
OPTIMAL = False  # some frames alone change


@dataclass(frozen=True)
class Settings(LoopSettings):
    """Frame-sparse's settings."""

    touched_frames: int = opt(2, "how many frames of a clip are changed", at_least=1)
    route_grad: str = route_grad_option()


def attack(
    twin: VideoMoE, clip: Tensor, label: Tensor, settings: Settings, indices: Tensor | None = None
) -> AttackResult:
    """Maximise max_{i != y} F_i(x+d) - F_y(x+d), d = 0 but in some frames.

    Success: the label is wrong. Each restart takes the frames by the gradient at the best clip so
    far, the first at the clean one.

    Raises:
        SettingError: a clip has fewer frames than are to be changed.
    """
    frames = clip.shape[2] if clip.ndim == 5 else settings.touched_frames
    if settings.touched_frames > frames:
        raise SettingError(
            f"--touched-frames is {settings.touched_frames}; a clip of this model has {frames}."
        )
    return losses.maximise(twin, clip, label, settings, indices, _climb, loss=losses.margin)


def _climb(search: Search, clip: Tensor) -> None:
    how = search.settings
    assert isinstance(how, Settings)
    _, gradient = search.slope(search.best)
    if not search.standing.any():
        return
    touched = choose(gradient, how.touched_frames, how.norm)
    begin = torch.where(touched, clip, search.clip)
    shaped(lambda search, at, gradient: gradient * touched)(search, begin)


def choose(gradient: Tensor, count: int, norm: str) -> Tensor:
    """Return the frames in which a change gains most, bool [B, 1, T, 1, 1].

    The gain in a ball is by the gradient's dual norm: its sum of sizes for linf, its length for l2.

    Args:
        gradient: [B, C, T, H, W].
        count: how many frames of each clip.
        norm: of the budget.
    """
    gain = gradient.abs() if norm == "linf" else gradient.square()
    frames = gain.sum(dim=(1, 3, 4))
    taken = torch.zeros_like(frames, dtype=torch.bool)
    taken.scatter_(1, frames.topk(count, dim=1).indices, True)
    return taken[:, None, :, None, None]
