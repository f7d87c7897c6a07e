"""What the attacks maximise, in the paper's letters: R router, E_i expert, F whole model.

Source: arXiv 2602.01369. Each loss is per sample, [B], and never averaged over a batch: a sample's
step does not depend on the clips beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from vmoe.attacks.loop import Aim, Judged, LoopSettings, TemporalSettings
from vmoe.errors import SettingError
from vmoe.lipschitz import l_lip
from vmoe.models import MoEOutput, VideoMoE

# From what a part answers to an adversarial clip, and the clip, to a loss.
Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def ce(logits: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy of each sample, [B]."""
    return cross_entropy(logits, target, reduction="none")


def lipschitz_ce(clip: Tensor, clean: Tensor, target: Tensor, settings: LoopSettings) -> Loss:
    """Return CE(g(x+d), target) + lam L_Lip(g), g being any part; TLA's loss.

    Args:
        clip: x, [B, C, T, H, W].
        clean: g(x).
        target: what to leave, [B]: the label, or for the router its clean route.
        settings: lam, and whether a gradient passes the term's denominator.
    """

    def loss(moved: Tensor, adversarial: Tensor) -> Tensor:
        value = ce(moved, target)
        if isinstance(settings, TemporalSettings) and settings.lam:
            quotient = settings.lip == "quotient"
            value = value + settings.lam * l_lip(clean, moved, clip, adversarial, quotient=quotient)
        return value

    return loss


def guided(leave: Loss, weakest: Tensor, gamma1: float) -> Loss:
    """Return TLGA-R's loss: leave the clean route, towards the expert of the lowest score.

    TLA-R's loss - gamma1 CE(R(x+d), weakest(x)).
    """

    def loss(scores: Tensor, adversarial: Tensor) -> Tensor:
        value = leave(scores, adversarial)
        return value - gamma1 * ce(scores, weakest) if gamma1 else value

    return loss


def router(twin: VideoMoE, clip: Tensor, settings: LoopSettings, gamma1: float = 0.0) -> Aim:
    """Return TLGA-R's objective on the router alone; success: the route has changed.

    Raises:
        SettingError: the model is dense.
    """
    if twin.router is None:
        raise SettingError("this model is dense (1 expert): it has no router to attack. Use pgd.")
    with torch.no_grad():
        scores = twin.scores(clip)
    loss, top1 = _router_loss(clip, scores, settings, gamma1), scores.argmax(dim=1)

    def objective(adversarial: Tensor) -> Judged:
        moved = twin.scores(adversarial)
        route = moved.argmax(dim=1)
        return Judged(loss(moved, adversarial), route != top1, route)

    return Aim(objective, top1)


def expert(twin: VideoMoE, clip: Tensor, label: Tensor, index: int, settings: LoopSettings) -> Aim:
    """Return TLA-E_i's objective on one expert alone; success: that expert is wrong.

    Raises:
        SettingError: there is no such expert.
    """
    if not 0 <= index < len(twin.experts):
        last = len(twin.experts) - 1
        raise SettingError(f"--expert is {index}; this model has experts 0 to {last}.")
    with torch.no_grad():
        clean, before = twin.run_expert(index, clip), twin.scores(clip).argmax(dim=1)
    loss = lipschitz_ce(clip, clean, label, settings)

    def objective(adversarial: Tensor) -> Judged:
        logits = twin.run_expert(index, adversarial)
        with torch.no_grad():
            route = twin.scores(adversarial).argmax(dim=1)
        return Judged(loss(logits, adversarial), logits.argmax(dim=1) != label, route)

    return Aim(objective, before)


def whole(
    twin: VideoMoE,
    clip: Tensor,
    label: Tensor,
    settings: LoopSettings,
    *,
    route_grad: str,
    gamma1: float = 0.0,
    gamma2: float = 0.0,
) -> Aim:
    """Return J-TLGA's objective: TLA-M's loss + gamma2 TLGA-R's; success: the label is wrong.

    gamma2 = 0 is TLA-M, gamma1 = 0 is J-TLA. Success is always judged with the hard choice.
    """
    lipschitz = isinstance(settings, TemporalSettings) and settings.lam > 0
    with torch.no_grad():
        if lipschitz:
            (clean, scores, _), _ = answer(twin, clip, route_grad)
        else:  # F(x) stands in the Lipschitz term only; its route is cheaper
            clean = scores = twin.scores(clip)
    model_loss = lipschitz_ce(clip, clean, label, settings)
    router_loss = _router_loss(clip, scores, settings, gamma1)

    def objective(adversarial: Tensor) -> Judged:
        out, hard = answer(twin, adversarial, route_grad)
        loss = model_loss(out.logits, adversarial)
        if gamma2:
            loss = loss + gamma2 * router_loss(out.scores, adversarial)
        return Judged(loss, hard.argmax(dim=1) != label, out.route)

    return Aim(objective, scores.argmax(dim=1))


def answer(twin: VideoMoE, clip: Tensor, route_grad: str) -> tuple[MoEOutput, Tensor]:
    """Return what the twin answers, and the logits of the hard choice, [B, K], in one pass.

    `soft` is the only route_grad whose logits are not those of the hard choice.
    """
    if route_grad != "soft":
        out = twin(clip, route_grad)
        return out, out.logits
    scores, every = twin.scores(clip), twin.run_all(clip)
    route = scores.argmax(dim=1)
    mixture = (scores.softmax(dim=1)[:, :, None] * every).sum(dim=1)
    hard = every[torch.arange(len(route), device=route.device), route]
    return MoEOutput(mixture, scores, route), hard.detach()


def _router_loss(clip: Tensor, scores: Tensor, settings: LoopSettings, gamma1: float) -> Loss:
    leave = lipschitz_ce(clip, scores, scores.argmax(dim=1), settings)
    return guided(leave, scores.argmin(dim=1), gamma1)
