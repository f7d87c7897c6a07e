"""J-TLAT: joint temporal Lipschitz adversarial training of router, weak experts and whole.

Three passes, each an adversarial min-max on its own part. The order (each a whole walk over the
data in every epoch; per batch on demand), the load balance in every pass that updates the router,
and the clips of the weak experts from router and experts together (on demand) are ours.

Source: arXiv 2602.01369, J-TLAT.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cross_entropy

from vmoe.attacks.methods import j_tlga, tlga_r
from vmoe.batches import Batch
from vmoe.lipschitz import l_lip
from vmoe.models import VideoMoE
from vmoe.settings import opt
from vmoe.train import weak
from vmoe.train.passes import (
    LipschitzSettings,
    Pass,
    Update,
    Walk,
    balance_term,
    constant,
    deployed_scores,
    full,
    whole_update,
)


@dataclass(frozen=True)
class Settings(LipschitzSettings):
    """What J-TLAT takes."""

    gamma1: float = opt(1.0, "weight of the steering to the weakest expert", at_least=0)
    gamma2: float = opt(0.1, "weight of the router's loss in the joint attack", at_least=0)
    order: str = opt(
        "epoch", "the three passes over all clips in turn, or over each batch",
        choices=("epoch", "batch"),
    )  # fmt: skip
    weak_clips: str = opt(
        "router", "what perturbs the weak experts' clips: TLGA-R, or it and TLA-E together",
        choices=("router", "both"),
    )  # fmt: skip
    without: str = opt(
        "", "leave a pass out, for an ablation", choices=("", "router", "experts", "whole")
    )


def walks(settings: Settings, done: float) -> list[Walk]:
    """Return the three passes: router, weak experts, whole."""

    def misroute(twin: VideoMoE, batch: Batch, seed: int) -> tuple[Tensor, int]:
        how = tlga_r.Settings(**settings.temporal_attack(seed, gamma1=settings.gamma1))
        found = tlga_r.attack(twin, batch.clip, batch.label, how, batch.index)
        return found.adversarial, 0  # of the router alone: next to nothing

    def for_experts(twin: VideoMoE, batch: Batch, seed: int) -> tuple[Tensor, int]:
        clip, _ = misroute(twin, batch, seed)
        if settings.weak_clips == "router":
            return clip, 0
        more = {"gamma1": settings.gamma1, "gamma2": settings.gamma2}
        how = j_tlga.Settings(**settings.temporal_attack(seed, **more))
        return weak.attack(twin, batch, clip, how)

    def joint(twin: VideoMoE, batch: Batch, seed: int) -> tuple[Tensor, int]:
        more = {"gamma1": settings.gamma1, "gamma2": settings.gamma2}
        how = j_tlga.Settings(**settings.temporal_attack(seed, **more))
        found = j_tlga.attack(twin, batch.clip, batch.label, how, batch.index)
        return found.adversarial, int(found.backwards.sum())

    def router(twin: VideoMoE, batch: Batch, clip: Tensor) -> Update:
        return router_update(twin, batch, clip, settings)

    def experts(twin: VideoMoE, batch: Batch, clip: Tensor) -> Update:
        return weak.update(twin, batch, clip, settings)

    def whole(twin: VideoMoE, batch: Batch, clip: Tensor) -> Update:
        return whole_update(twin, batch, clip, settings, settings.lam)

    passes = [
        Pass("router", "router", router, misroute),
        Pass("weak experts", "experts", experts, for_experts),
        Pass("whole", "whole", whole, joint),
    ]
    kept = [each for each in passes if each.part != settings.without]
    return [tuple(kept)] if settings.order == "batch" else [(each,) for each in kept]


def router_update(
    twin: VideoMoE, batch: Batch, clip: Tensor, settings: LipschitzSettings
) -> Update:
    """Return CE(R(x'), top1(x)) + lam L_Lip(R) + balance, x' from TLGA-R."""
    top1 = deployed_scores(twin, batch.clip).argmax(dim=1)
    clean = full(constant(twin, lambda: twin.scores(batch.clip)))
    scores = full(twin.scores(clip))
    loss = cross_entropy(scores, top1, reduction="none")
    loss = loss + settings.lam * l_lip(clean, scores, batch.clip, clip)
    return Update(loss.mean() + balance_term(twin, scores, settings), 0)
