"""J-TLAT: joint temporal Lipschitz adversarial training of router, weak experts and whole.

Three passes in every epoch, each an adversarial min-max on its own part. The order (whole passes
rather than batches) and the load balance in every pass that updates the router are ours.

Source: arXiv 2602.01369, J-TLAT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from vmoe.attacks.loop import as_found
from vmoe.attacks.methods import j_tlga, tlga_r
from vmoe.batches import Batch
from vmoe.lipschitz import l_lip
from vmoe.models import VideoMoE
from vmoe.settings import opt
from vmoe.train.passes import Pass, RobustSettings, Update, constant, load_balance, whole_update

WEAK = 2  # the paper's Top-2 experts of a misrouted clip


@dataclass(frozen=True)
class Settings(RobustSettings):
    """What J-TLAT takes."""

    lam: float = opt(1e-4, "weight of the Lipschitz terms", at_least=0)
    beta: float = opt(0.9, "decay of the temporal step's V", at_least=0, at_most=1)
    temporal: str = opt(
        "iterations", "temporal step of the attack", choices=("iterations", "frames", "off")
    )
    gamma1: float = opt(1.0, "weight of the steering to the weakest expert", at_least=0)
    gamma2: float = opt(0.1, "weight of the router's loss in the joint attack", at_least=0)


def passes(settings: Settings) -> list[Pass]:
    """Return the three passes: router, weak experts, whole."""

    def misroute(twin: VideoMoE, batch: Batch, seed: int) -> tuple[Tensor, int]:
        how = tlga_r.Settings(**_loop(settings, seed), gamma1=settings.gamma1)
        found = tlga_r.attack(twin, batch.clip, batch.label, how, batch.index)
        return found.adversarial, 0  # of the router alone: next to nothing

    def joint(twin: VideoMoE, batch: Batch, seed: int) -> tuple[Tensor, int]:
        how = j_tlga.Settings(
            **_loop(settings, seed), gamma1=settings.gamma1, gamma2=settings.gamma2
        )
        found = j_tlga.attack(twin, batch.clip, batch.label, how, batch.index)
        return found.adversarial, int(found.backwards.sum())

    def router(twin: VideoMoE, batch: Batch, clip: Tensor) -> Update:
        return router_update(twin, batch, clip, settings)

    def experts(twin: VideoMoE, batch: Batch, clip: Tensor) -> Update:
        return experts_update(twin, batch, clip, settings)

    def whole(twin: VideoMoE, batch: Batch, clip: Tensor) -> Update:
        return whole_update(twin, batch, clip, balance=settings.balance, lam=settings.lam)

    return [
        Pass("router", "router", router, misroute),
        Pass("weak experts", "experts", experts, misroute),
        Pass("whole", "whole", whole, joint),
    ]


def router_update(twin: VideoMoE, batch: Batch, clip: Tensor, settings: Settings) -> Update:
    """Return CE(R(x'), top1(x)) + lam L_Lip(R) + balance load_balance, x' from TLGA-R."""
    with as_found(twin), torch.no_grad():  # the route of inference: not by the batch's statistics
        top1 = twin.scores(batch.clip).argmax(dim=1)
    clean = constant(twin, lambda: twin.scores(batch.clip))
    scores = twin.scores(clip)
    loss = cross_entropy(scores, top1)
    loss = loss + settings.lam * l_lip(clean, scores, batch.clip, clip).mean()
    return Update(loss + settings.balance * load_balance(scores), 0)


def experts_update(twin: VideoMoE, batch: Batch, clip: Tensor, settings: Settings) -> Update:
    """Return sum_i w_i [CE(E_i(x'), y) + lam L_Lip(E_i)] over the Top-2 experts of R(x').

    w_i is the softmax of R(x') over those two; x' from TLGA-R.
    """
    with torch.no_grad():
        top, weak = twin.scores(clip).topk(min(WEAK, len(twin.experts)), dim=1)
    weights = top.softmax(dim=1)
    total = clip.new_zeros(())
    for i in range(len(twin.experts)):
        rows, rank = torch.nonzero(weak == i, as_tuple=True)
        if not len(rows):
            continue
        total = (
            total + (weights[rows, rank] * _expert_loss(twin, batch, clip, i, rows, settings)).sum()
        )
    return Update(total / len(clip), weak.numel())


def _expert_loss(
    twin: VideoMoE, batch: Batch, clip: Tensor, index: int, rows: Tensor, settings: Settings
) -> Tensor:
    """Return CE(E_i(x'), y) + lam L_Lip(E_i) of some rows of a batch, [rows]."""
    clean = constant(twin, lambda: twin.run_expert(index, batch.clip[rows]))
    logits = twin.run_expert(index, clip[rows])
    each = cross_entropy(logits, batch.label[rows], reduction="none")
    return each + settings.lam * l_lip(clean, logits, batch.clip[rows], clip[rows])


def _loop(settings: Settings, seed: int) -> dict[str, Any]:
    return {
        "eps": settings.eps, "steps": settings.steps, "step": settings.step, "seed": seed,
        "beta": settings.beta, "temporal": settings.temporal, "lam": settings.lam,
        "early_stop": False,  # the strongest clip, not the first that succeeds
    }  # fmt: skip
