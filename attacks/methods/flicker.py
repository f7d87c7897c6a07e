"""Flicker: one colour for each frame is added to all of its pixels, as light in a room would.

Source: Pony, Naeh and Mannor, "Over-the-air adversarial flickering attacks against video
recognition networks", CVPR 2021: there thickness and roughness are penalised; here a ball bounds
the change.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vmoe.attacks import ball, losses
from vmoe.attacks.loop import AttackResult, LoopSettings, Search, route_grad_option
from vmoe.models import VideoMoE

PART = "model"
OPTIMAL = False  # all pixels of a frame change alike


@dataclass(frozen=True)
class Settings(LoopSettings):
    """Flicker's settings."""

    route_grad: str = route_grad_option()


def attack(
    twin: VideoMoE, clip: Tensor, label: Tensor, settings: Settings, indices: Tensor | None = None
) -> AttackResult:
    """Maximise max_{i != y} F_i - F_y of clamp(x + o), o one offset by frame and channel.

    Success: the label is wrong.
    """
    return losses.maximise(twin, clip, label, settings, indices, _climb, loss=losses.margin)


def _climb(search: Search, clip: Tensor) -> None:
    """Take PGD's steps in the space of offsets, [B, C, T, 1, 1], in their own ball."""
    how, clean = search.settings, search.clip
    assert isinstance(how, LoopSettings)
    radius = how.eps
    if how.norm == "l2":  # an offset moves all pixels of its frame
        radius /= (clean.shape[3] * clean.shape[4]) ** 0.5
    offset = clean.new_zeros(*clean.shape[:3], 1, 1)
    if how.random_start or search.number:  # restarts always do
        noise = ball.uniform(offset, how.seed, search.indices, search.number)
        offset = radius * (noise if how.norm == "linf" else ball.steepest(noise, "l2"))
    for _ in range(how.steps):
        shown = _levels(offset, how)
        _, gradient = search.slope(search.project(clean + shown))
        if not search.standing.any():
            return
        moved = clean + shown
        gradient = gradient * ((moved >= 0) & (moved <= 1))  # a pixel at its end stays there
        rise = ball.steepest(gradient.sum(dim=(3, 4), keepdim=True), how.norm)
        offset = ball.shorten(offset + how.step * radius * rise, radius, how.norm)
    search.judge(search.project(clean + _levels(offset, how)))


def _levels(offset: Tensor, settings: LoopSettings) -> Tensor:
    """Return offsets as clips hold them: on the grid, whole grey levels, the same for all pixels.

    Rounded as `grid.rounded` does: L2 towards 0, so that no value moves further.
    """
    if not settings.grid:
        return offset
    levels = 255 * offset
    if settings.norm == "linf":
        return levels.round() / 255
    return (levels + 1e-4 * levels.sign()).trunc() / 255
