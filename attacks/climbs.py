"""How gradient attacks of fixed step move: PGD's step, and the paper's temporal one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from vmoe.attacks import ball
from vmoe.attacks.loop import Climb, LoopSettings, Search, TemporalSettings

# Of clips and the loss's gradient there, the gradient that an attack follows.
Shape: TypeAlias = Callable[[Search, Tensor, Tensor], Tensor]


def fixed(search: Search, clip: Tensor) -> None:
    """Take steps of fixed size: d <- project(d + a_f steepest(gradient)).

    a_f = step eps, or smaller where the settings have a temporal step.
    """
    _walk(search, clip, None)


def shaped(shape: Shape) -> Climb:
    """Return the same climb along other gradients, such as those cut to what may change."""

    def climb(search: Search, clip: Tensor) -> None:
        _walk(search, clip, shape)

    return climb


def _walk(search: Search, clip: Tensor, shape: Shape | None) -> None:
    settings = search.settings
    assert isinstance(settings, LoopSettings)
    velocity = clip.new_zeros(clip.shape[0], clip.shape[2])
    for _ in range(settings.steps):
        _, gradient = search.slope(clip)
        if not search.standing.any():
            return
        if shape is not None:
            gradient = shape(search, clip, gradient)
        direction = ball.steepest(gradient, settings.norm)
        if isinstance(settings, TemporalSettings) and settings.temporal != "off":
            size, velocity = temporal_step(gradient, velocity, settings)
            direction.mul_(size[:, None, :, None, None])
        else:
            direction.mul_(settings.step * settings.eps)
        del gradient  # else it is held while the next is made
        clip = search.project(direction.add_(clip))
    search.judge(clip)


def temporal_step(
    gradient: Tensor, velocity: Tensor, settings: TemporalSettings
) -> tuple[Tensor, Tensor]:
    """Return each frame's step size, smaller where gradients have been large, and the new V.

    V_f <- beta V_f + ||grad_f||_2;  a_f = step eps / (1 + log(1 + sqrt V_f)). With
    `temporal=frames` V runs along the frames instead: V_f = beta V_(f-1) + ||grad_f||_2.

    Args:
        gradient: of the loss with respect to the clip, [B, C, T, H, W], per sample.
        velocity: V, [B, T]; not used along frames.
        settings: eps, step, beta and the reading.

    Returns:
        Step sizes, [B, T], in (0, step eps], and V, [B, T].

    Source: arXiv 2602.01369, the temporal step of TLA, in both readings of its text.
    """
    norms = gradient.square().sum(dim=(1, 3, 4)).sqrt()
    # Ours: a norm whose square overflows would make V infinite, for good, and the step 0.
    norms = norms.clamp(max=torch.finfo(norms.dtype).max ** 0.5)
    if settings.temporal == "frames":
        running, rows = torch.zeros_like(norms[:, 0]), []
        for norm in norms.unbind(dim=1):
            running = settings.beta * running + norm
            rows.append(running)
        velocity = torch.stack(rows, dim=1)
    else:
        velocity = settings.beta * velocity + norms
    size = settings.step * settings.eps / (1 + torch.log1p(velocity.sqrt()))
    return size, velocity
