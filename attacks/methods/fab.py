"""FAB, towards labels: the smallest perturbation that reaches another label, linear step by step.

It walks along decision boundaries, in and out of the ball; what it finds within the ball counts.
Where the loss of other attacks is flat, a boundary still has a side.

Source: Croce and Hein, "Minimally distorted adversarial examples with a fast adaptive boundary
attack", ICML 2020, in the targeted form of AutoAttack (Croce and Hein, ICML 2020).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vmoe.attacks import ball, losses
from vmoe.attacks.loop import AttackResult, BallSettings, Search, ascend, route_grad_option
from vmoe.models import VideoMoE
from vmoe.settings import opt

PART = "model"
OPTIMAL = False  # it stops at the boundary
ALPHA_MAX = 0.1  # the largest share of the step that starts at the clean clip
ETA = 1.05  # how far beyond the linear boundary a step goes
BETA = 0.9  # a clip that succeeds is moved back to this share of its perturbation


@dataclass(frozen=True)
class Settings(BallSettings):
    """FAB's settings; steps are those towards one label."""

    steps: int = opt(20, "gradient steps", at_least=1)
    restarts: int = opt(1, "starts, the first from the clip itself; the best counts", at_least=1)
    targets: int = opt(9, "other labels that are tried, the nearest first", at_least=1)
    route_grad: str = route_grad_option()


def attack(
    twin: VideoMoE, clip: Tensor, label: Tensor, settings: Settings, indices: Tensor | None = None
) -> AttackResult:
    """Minimise the perturbation that makes the label wrong; the loss is its size, negative.

    Success: the label is wrong, within the ball.
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
            loss=losses.toward,
            true_value=True,  # the boundary is that of the hard choice
        ),
        indices,
        climb=_climb,
    )


def _climb(search: Search, clip: Tensor) -> None:
    """Step onto the linear boundary, from where it is and a little from the clean clip.

    x <- (1 - alpha) (x + eta d) + alpha (x_0 + eta d_0), cut to [0, 1].
    """
    how, clean = search.settings, search.clip
    assert isinstance(how, Settings)
    clip = clean + _nearness(search) * (clip - clean)  # of the first start, the clean clip
    for _ in range(how.steps):
        if not search.standing.any():
            return
        value, gradient = _scaled(*search.slope(clip, probe=True))
        there = value + (gradient * (clean - clip)).flatten(1).sum(dim=1)
        own = onto_boundary(clip, value, gradient, how.norm)
        biased = onto_boundary(clean, there, gradient, how.norm)
        near, far = ball.size(own, how.norm), ball.size(biased, how.norm)
        alpha = (near / (near + far).clamp(min=1e-12)).clamp(max=ALPHA_MAX)
        alpha = ball.spread(alpha, clip)
        clip = (1 - alpha) * (clip + ETA * own) + alpha * (clean + ETA * biased)
        clip = clip.clamp_(0, 1)
        over = search.breaks(clip)
        _claim(search, clip, over)
        clip = torch.where(ball.spread(over, clip), clean + BETA * (clip - clean), clip)


def _nearness(search: Search) -> Tensor:
    """Return the share of eps at which later starts begin: half of the smallest size found."""
    how, clean = search.settings, search.clip
    share = ball.size(search.best - clean, how.norm) / max(how.eps, 1e-12)
    return ball.spread(torch.where(search.success, share, 1) / 2, clean)


def _scaled(value: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same boundary with a gradient of at most 1: no sum of it overflows or vanishes."""
    largest = gradient.abs().flatten(1).amax(dim=1).clamp(min=torch.finfo(gradient.dtype).tiny)
    return value / largest, gradient / ball.spread(largest, gradient)


def _claim(search: Search, clip: Tensor, over: Tensor) -> None:
    """Put forward the clips that succeed within the ball.

    On the grid with the whole budget, as rounding would undo what is barely over the boundary.
    """
    how = search.settings
    delta = clip - search.clip
    size = ball.size(delta, how.norm)
    if how.grid:
        stretch = how.eps / size.clamp(min=1e-12)
        clip = search.project(search.clip + ball.spread(stretch, delta) * delta)
    search.claim(clip, over & (size <= how.eps), -ball.size(clip - search.clip, how.norm))


def onto_boundary(clip: Tensor, value: Tensor, gradient: Tensor, norm: str) -> Tensor:
    """Return the smallest d with value + <gradient, d> = 0 that keeps clip + d in [0, 1].

    Every pixel moves by min(s g_i, room_i): g_i = 1 in L-infinity, |gradient_i| in L2, room_i what
    is left to the end of [0, 1]. What that gains is concave and piecewise linear in s, so that
    Newton's method from s = 0 climbs to the exact root, and stops there. Where no d suffices, the
    clip goes to the nearest corner.

    Args:
        clip: x, [B, C, T, H, W], pixels in [0, 1].
        value: of a linear function at x, [B].
        gradient: of it, as the clip.
        norm: linf or l2.

    Returns:
        d, as the clip.
    """
    direction = -ball.spread(value.sign(), gradient) * gradient.sign()
    room = torch.where(direction > 0, 1 - clip, clip)
    pull = gradient.abs()
    pace = torch.ones_like(pull) if norm == "linf" else pull
    rate = pull * pace
    limit = room / pace  # the s at which a pixel stops; infinite or NaN where it does not move
    scale = torch.zeros_like(value)
    while True:
        free = limit > ball.spread(scale, limit)
        gain = torch.where(free, 0, pull * room).flatten(1).sum(dim=1)
        slope = torch.where(free, rate, 0).flatten(1).sum(dim=1)
        further = torch.where(slope > 0, (value.abs() - gain) / slope, scale)
        if not (further > scale).any():
            break
        scale = torch.maximum(further, scale).clamp(max=torch.finfo(scale.dtype).max)
    return direction * torch.minimum(ball.spread(scale, pace) * pace, room)
