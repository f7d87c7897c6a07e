"""How APGD moves: momentum, and a step that is halved where it no longer pays.

Source: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks", ICML 2020, section 3 and algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vmoe.attacks import ball
from vmoe.attacks.loop import IterativeSettings, Search, route_grad_option

MOMENTUM = 0.75  # alpha of the paper: the share of the new step
RISING = 0.75  # rho: a smaller share of steps that raise the loss halves the step


@dataclass(frozen=True)
class ApgdSettings(IterativeSettings):
    """What every form of APGD takes; it chooses its step by itself."""

    route_grad: str = route_grad_option()


def climb(search: Search, clip: Tensor, steps: int | None = None) -> None:
    """Take steps of 2 eps that carry on, halved by sample at checkpoints, from its best point.

    z = P(x_k + eta steepest(gradient)),  x_(k+1) = P(x_k + alpha (z - x_k) +
    (1 - alpha) (x_k - x_(k-1))).

    Args:
        search: under way.
        clip: where it starts, [B, C, T, H, W].
        steps: how many, each of one gradient; by default those of the settings.
    """
    settings = search.settings
    assert isinstance(settings, IterativeSettings)
    steps = settings.steps if steps is None else steps
    state, before = _State.begin(search, clip), clip
    marks, last = checkpoints(steps), 0
    for k in range(1, steps + 1):
        if not search.standing.any():
            return
        at = state.clip
        move = ball.spread(state.step, at) * ball.steepest(state.gradient, settings.norm)
        moved = search.project(move.add_(at))
        if k > 1:
            carried = MOMENTUM * (moved - at) + (1 - MOMENTUM) * (at - before)
            moved = search.project(carried.add_(at))
        before = at
        if k == steps:
            search.judge(moved)
            return
        state.arrive(moved, *search.slope(moved))
        if k in marks:
            state.check(k - last)
            last = k


def checkpoints(steps: int) -> set[int]:
    """Return the steps after which progress is looked at: at shares 0.22, 0.41, 0.57, ... of all.

    p_1 = 0.22, p_(j+1) = p_j + max(p_j - p_(j-1) - 0.03, 0.06); w_j = ceil(p_j steps).
    """
    marks, share, period = set(), 22, 22  # in hundredths, which floats would round up
    while share <= 100:
        marks.add(-(-share * steps // 100))
        period = max(period - 3, 6)
        share += period
    return marks


@dataclass
class _State:
    """Where each sample is, its best point by loss, and what was reached at the last checkpoint.

    Attributes:
        clip: x_k, [B, C, T, H, W].
        loss: of it, [B].
        gradient: of it.
        step: eta, [B].
        best: the point of the largest loss; its loss and gradient.
        rises: steps since the checkpoint that raised the loss, [B].
        reached: the largest loss at the checkpoint, [B].
        halved: whether the step was halved there, bool [B].
    """

    clip: Tensor
    loss: Tensor
    gradient: Tensor
    step: Tensor
    best: Tensor
    best_loss: Tensor
    best_gradient: Tensor
    rises: Tensor
    reached: Tensor
    halved: Tensor

    @classmethod
    def begin(cls, search: Search, clip: Tensor) -> _State:
        """Look at the start."""
        loss, gradient = search.slope(clip)
        return cls(
            clip, loss, gradient, torch.full_like(loss, 2 * search.settings.eps),
            clip, loss, gradient,
            torch.zeros_like(loss), loss, torch.zeros_like(loss, dtype=torch.bool),
        )  # fmt: skip

    def arrive(self, clip: Tensor, loss: Tensor, gradient: Tensor) -> None:
        """Move to a point, and remember it where it is the best."""
        self.rises = self.rises + (loss > self.loss)
        self.clip, self.loss, self.gradient = clip, loss, gradient
        better = loss > self.best_loss
        self.best_loss = torch.where(better, loss, self.best_loss)
        mask = ball.spread(better, clip)
        self.best = torch.where(mask, clip, self.best)
        self.best_gradient = torch.where(mask, gradient, self.best_gradient)

    def check(self, taken: int) -> None:
        """Halve the step of samples that gain too little, and return them to their best point.

        Args:
            taken: steps since the last checkpoint.
        """
        stuck = ~self.halved & (self.best_loss == self.reached)
        halve = (self.rises < RISING * taken) | stuck
        self.step = torch.where(halve, self.step / 2, self.step)
        self.loss = torch.where(halve, self.best_loss, self.loss)
        mask = ball.spread(halve, self.clip)
        self.clip = torch.where(mask, self.best, self.clip)
        self.gradient = torch.where(mask, self.best_gradient, self.gradient)
        self.rises = torch.zeros_like(self.rises)
        self.reached, self.halved = self.best_loss, halve
