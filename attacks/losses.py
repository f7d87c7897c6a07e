"""What the attacks maximise, in the paper's letters: R router, E_i expert, F whole model.

Each loss is per sample, [b], and never averaged over a batch: a sample's step does not depend on
the clips beside it.

Source: arXiv 2602.01369 where nothing else is said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from vmoe.attacks.loop import (
    Aim,
    AttackResult,
    BallSettings,
    Climb,
    Judged,
    Objective,
    TemporalSettings,
    ascend,
)
from vmoe.errors import SettingError
from vmoe.lipschitz import l_lip
from vmoe.models import MoEOutput, VideoMoE

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # of logits and targets, to a loss


def ce(logits: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy of each sample, [B]."""
    return cross_entropy(logits, target, reduction="none")


def margin(logits: Tensor, target: Tensor) -> Tensor:
    """Return max_{i != y} z_i - z_y, [B]: above 0 where the answer is not y."""
    own = logits.gather(1, target[:, None])[:, 0]
    return logits.scatter(1, target[:, None], -torch.inf).amax(dim=1) - own


def dlr(logits: Tensor, target: Tensor) -> Tensor:
    """Return the difference of logits ratio, [B]; the margin where there are fewer than 3 labels.

    (max_{i != y} z_i - z_y) / (z_(1) - z_(3)), z_(i) the i-th largest: no scale or shift of the
    logits changes it.

    Source: Croce and Hein, ICML 2020 (AutoAttack), equation 5.
    """
    if logits.shape[1] < 3:
        return margin(logits, target)
    top = logits.topk(3, dim=1).values
    return margin(logits, target) / (top[:, 0] - top[:, 2] + 1e-12)


def toward(logits: Tensor, target: Tensor, other: Tensor) -> Tensor:
    """Return z_t - z_y, [B]: the margin towards one other label t.

    Args:
        logits: [B, K].
        target: y, [B].
        other: t, [B].
    """
    return (logits.gather(1, other[:, None]) - logits.gather(1, target[:, None]))[:, 0]


def targeted_dlr(logits: Tensor, target: Tensor, other: Tensor) -> Tensor:
    """Return the targeted difference of logits ratio, [B]; `toward` where K < 4.

    (z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2).

    Source: Croce and Hein, ICML 2020 (AutoAttack), equation 6.
    """
    if logits.shape[1] < 4:
        return toward(logits, target, other)
    top = logits.topk(4, dim=1).values
    return toward(logits, target, other) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


def router(
    twin: VideoMoE, clip: Tensor, settings: BallSettings, gamma1: float = 0.0, loss: Loss = ce
) -> Aim:
    """Return TLGA-R's objective on the router alone; success: the route has changed.

    loss(R(x+d), top1(x)) + lam L_Lip(R) - gamma1 CE(R(x+d), weakest(x)).

    Raises:
        SettingError: the model is dense.
    """
    require_router(twin)
    with torch.no_grad():
        scores = twin.scores(clip)
    top1 = scores.argmax(dim=1)
    of_router = _router_loss(clip, scores, settings, gamma1, loss)

    def objective(adversarial: Tensor, rows: Tensor) -> Judged:
        moved = twin.scores(adversarial)
        route = moved.argmax(dim=1)
        return Judged(of_router(moved, adversarial, rows), route != top1[rows], route)

    return Aim((objective,), top1, torch.zeros_like(top1, dtype=torch.bool), silent(scores))


def misroute(twin: VideoMoE, clip: Tensor, to: int | None) -> Aim:
    """Return the margin of scores towards another expert; success: the route has changed, or is it.

    Towards any, max_{i != top1(x)} R_i(x+d) - R_top1(x)(x+d); towards expert e,
    R_e(x+d) - max_{i != e} R_i(x+d), where a clip that is routed to e as it is has succeeded.

    Args:
        twin: in eval mode.
        clip: x, [B, C, T, H, W].
        to: e, or None for any.

    Raises:
        SettingError: the model is dense, or has no such expert.
    """
    require_router(twin)
    require_expert(twin, to or 0, "--to-expert")
    with torch.no_grad():
        scores = twin.scores(clip)
    before = scores.argmax(dim=1)
    goal = before if to is None else torch.full_like(before, to)

    def objective(adversarial: Tensor, rows: Tensor) -> Judged:
        moved = twin.scores(adversarial)
        route, away = moved.argmax(dim=1), margin(moved, goal[rows])
        if to is None:
            return Judged(away, route != goal[rows], route)
        return Judged(-away, route == goal[rows], route)

    reached = torch.zeros_like(before, dtype=torch.bool) if to is None else before == goal
    return Aim((objective,), before, reached, silent(scores))


def expert(twin: VideoMoE, clip: Tensor, label: Tensor, index: int, settings: BallSettings) -> Aim:
    """Return TLA-E_i's objective on one expert alone; success: that expert is wrong.

    CE(E_i(x+d), y) + lam L_Lip(E_i).

    Raises:
        SettingError: there is no such expert.
    """
    require_expert(twin, index, "--expert")
    with torch.no_grad():
        scores = twin.scores(clip)
        clean = twin.run_expert(index, clip) if settings.early_stop or _lam(settings) else None
    term = _lipschitz(clip, scores if clean is None else clean, settings)

    def objective(adversarial: Tensor, rows: Tensor) -> Judged:
        logits = twin.run_expert(index, adversarial)
        with torch.no_grad():
            moved = twin.scores(adversarial)
        y = label[rows]
        loss = term(ce(logits, y), logits, adversarial, rows)
        loss = loss.masked_fill(silent(moved), torch.nan)
        return Judged(loss, logits.argmax(dim=1) != y, moved.argmax(dim=1))

    route = scores.argmax(dim=1)
    if clean is None:  # nobody needs E_i(x)
        return Aim((objective,), route, None, silent(scores))
    return Aim((objective,), route, clean.argmax(dim=1) != label, silent(clean, scores))


def whole(
    twin: VideoMoE,
    clip: Tensor,
    label: Tensor,
    settings: BallSettings,
    *,
    route_grad: str,
    gamma1: float = 0.0,
    gamma2: float = 0.0,
    loss: Loss = ce,
) -> Aim:
    """Return J-TLGA's objective: TLA-M's loss + gamma2 TLGA-R's; success: the label is wrong.

    gamma2 = 0 is TLA-M, gamma1 = 0 is J-TLA. Success is always judged with the hard choice.
    """
    clean, hard = look(twin, clip, settings, route_grad=route_grad)
    term = _lipschitz(clip, clean.logits, settings)
    of_router = _router_loss(clip, clean.scores, settings, gamma1)

    def objective(adversarial: Tensor, rows: Tensor) -> Judged:
        out, now = answer(twin, adversarial, route_grad)
        y = label[rows]
        value = term(loss(out.logits, y), out.logits, adversarial, rows)
        if gamma2:
            value = value + gamma2 * of_router(out.scores, adversarial, rows)
        return judged(value, now, y, out)

    if hard is None:
        return Aim((objective,), clean.route, None, silent(clean.scores))
    wrong = hard.argmax(dim=1) != label
    return Aim((objective,), clean.route, wrong, silent(hard, clean.scores))


def maximise(
    twin: VideoMoE, clip: Tensor, label: Tensor, settings: BallSettings, indices: Tensor | None,
    climb: Climb, *, gamma1: float = 0.0, gamma2: float = 0.0, loss: Loss = ce,
) -> AttackResult:  # fmt: skip
    """Attack the whole model: climb `whole`'s objective, as `ascend` does.

    The route_grad is that of the settings; an attack that asks for no gradient has none.
    """
    way = getattr(settings, "route_grad", "frozen")

    def prepare(clean: Tensor) -> Aim:
        return whole(
            twin, clean, label, settings, route_grad=way, gamma1=gamma1, gamma2=gamma2, loss=loss
        )

    return ascend(twin, clip, settings, prepare, indices, climb=climb)


def targets(
    twin: VideoMoE, clip: Tensor, label: Tensor, settings: BallSettings, *,
    route_grad: str, count: int, loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    true_value: bool = False,
) -> Aim:  # fmt: skip
    """Return one objective for each of the labels that the clean clip is nearest to, but its own.

    Args:
        twin: in eval mode.
        clip: x, [B, C, T, H, W].
        label: y, [B].
        settings: of the attack.
        route_grad: how a gradient passes the hard choice.
        count: how many labels, at most K - 1.
        loss: of logits, y and the other label.
        true_value: give the loss of the hard choice by `soft`, too; the gradient is as it was.
    """
    with torch.no_grad():
        out, hard = answer(twin, clip, route_grad)
    ranked = hard.scatter(1, label[:, None], -torch.inf).argsort(dim=1, descending=True)

    def towards(other: Tensor) -> Objective:
        def objective(adversarial: Tensor, rows: Tensor) -> Judged:
            moved, now = answer(twin, adversarial, route_grad)
            y, logits = label[rows], moved.logits
            if true_value:
                logits = logits + (now - logits).detach()
            return judged(loss(logits, y, other[rows]), now, y, moved)

        return objective

    others: Sequence[Tensor] = ranked[:, : min(count, hard.shape[1] - 1)].unbind(dim=1)
    wrong = hard.argmax(dim=1) != label
    return Aim(tuple(map(towards, others)), out.route, wrong, silent(hard, out.scores))


def look(
    twin: VideoMoE, clip: Tensor, settings: BallSettings, *, route_grad: str
) -> tuple[MoEOutput, Tensor | None]:
    """Return what the twin answers the clean clips, and the logits of the hard choice, in one pass.

    Where nobody needs F(x), the pass is the router's alone; then R(x) stands in its place, and
    there are no logits of the hard choice.
    """
    with torch.no_grad():
        if settings.early_stop or _lam(settings):
            return answer(twin, clip, route_grad)
        scores = twin.scores(clip)
        return MoEOutput(scores, scores, scores.argmax(dim=1)), None


def answer(twin: VideoMoE, clip: Tensor, route_grad: str) -> tuple[MoEOutput, Tensor]:
    """Return what the twin answers, and the logits of the hard choice, [B, K], in one pass.

    `soft` is the only route_grad whose logits are not those of the hard choice; but those of `all`
    hold the NaN of any expert, and the hard choice, which may not, is then asked again.
    """
    if route_grad != "soft":
        out = twin(clip, route_grad)
        if route_grad == "all" and silent(out.logits).any():
            return out, twin.run_routed(clip, out.route).detach()
        return out, out.logits
    scores, every = twin.scores(clip), twin.run_all(clip)
    route = scores.argmax(dim=1)
    mixture = (scores.softmax(dim=1)[:, :, None] * every).sum(dim=1)
    hard = every[torch.arange(len(route), device=route.device), route]
    return MoEOutput(mixture, scores, route), hard.detach()


def judged(loss: Tensor, hard: Tensor, label: Tensor, out: MoEOutput) -> Judged:
    """Judge the whole model; a NaN among scores or logits, which may not reach the loss, does.

    Where only an expert that is not chosen is not finite, `all` and `soft` have nothing to follow:
    the loss is the least that there is, its gradient dead.
    """
    astray = ~out.logits.isfinite().all(dim=1) & hard.isfinite().all(dim=1)
    loss = loss.masked_fill(astray, torch.finfo(loss.dtype).min)
    loss = loss.masked_fill(silent(hard, out.scores), torch.nan)
    return Judged(loss, hard.argmax(dim=1) != label, out.route)


def silent(*answers: Tensor) -> Tensor:
    """Return in which rows of logits or scores, [b, ...], there is a NaN, bool [b]."""
    return torch.stack([answer.isnan().any(dim=1) for answer in answers]).any(dim=0)


def require_router(twin: VideoMoE) -> None:
    """Refuse a dense model where a router is attacked."""
    if twin.router is None:
        raise SettingError("this model is dense (1 expert): it has no router to attack. Use pgd.")


def require_expert(twin: VideoMoE, index: int, flag: str) -> None:
    """Refuse an expert that the model does not have."""
    last = len(twin.experts) - 1
    if not 0 <= index <= last:
        raise SettingError(f"{flag} is {index}; this model has experts 0 to {last}.")


Term: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _lipschitz(clip: Tensor, clean: Tensor, settings: BallSettings) -> Term:
    """Return what adds lam L_Lip(g; x, d) to a loss, g being any part and g(x) its clean answer."""

    def add(loss: Tensor, moved: Tensor, adversarial: Tensor, rows: Tensor) -> Tensor:
        if not isinstance(settings, TemporalSettings) or not settings.lam:
            return loss
        quotient = settings.lip == "quotient"
        term = l_lip(clean[rows], moved, clip[rows], adversarial, quotient=quotient)
        return loss + settings.lam * term

    return add


def _router_loss(
    clip: Tensor, scores: Tensor, settings: BallSettings, gamma1: float, loss: Loss = ce
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return TLGA-R's loss of scores, clips and rows."""
    term = _lipschitz(clip, scores, settings)
    top1, weakest = scores.argmax(dim=1), scores.argmin(dim=1)

    def of(moved: Tensor, adversarial: Tensor, rows: Tensor) -> Tensor:
        value = term(loss(moved, top1[rows]), moved, adversarial, rows)
        return value - gamma1 * ce(moved, weakest[rows]) if gamma1 else value

    return of


def _lam(settings: BallSettings) -> float:
    return settings.lam if isinstance(settings, TemporalSettings) else 0.0
