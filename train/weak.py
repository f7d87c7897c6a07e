"""J-TLAT's second step: the weak experts, those that a misrouted clip may reach.

Source: arXiv 2602.01369, J-TLAT; clips perturbed against router and experts together are ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vmoe.attacks import losses
from vmoe.attacks.climbs import fixed
from vmoe.attacks.loop import Aim, Judged, ascend
from vmoe.attacks.methods import j_tlga
from vmoe.batches import Batch
from vmoe.lipschitz import l_lip
from vmoe.models import VideoMoE
from vmoe.train.passes import LipschitzSettings, Update, constant, full, label_loss

TOP = 2  # the paper's Top-2 experts of a misrouted clip


def update(twin: VideoMoE, batch: Batch, clip: Tensor, settings: LipschitzSettings) -> Update:
    """Return sum_i w_i [CE(E_i(x'), y) + lam L_Lip(E_i)] over the Top-2 experts of R(x').

    w_i is the softmax of R(x') over those two.
    """
    experts, weights = _of(twin, clip)
    total = clip.new_zeros(len(clip))
    for i in range(len(twin.experts)):
        rows, rank = torch.nonzero(experts == i, as_tuple=True)
        each = _expert_loss(twin, batch, clip, i, rows, settings)
        total = total.index_add(0, rows, weights[rows, rank] * each)
    return Update(total.mean(), experts.numel())


def attack(
    twin: VideoMoE, batch: Batch, misrouted: Tensor, settings: j_tlga.Settings
) -> tuple[Tensor, int]:
    """Return clips that maximise sum_i w_i CE(E_i(x+d), y) + gamma2 TLGA-R's loss.

    The best iterate is the one of highest loss, whether or not the route has changed.

    Args:
        twin: in eval mode.
        batch: the clips.
        misrouted: what TLGA-R made of them; its Top-2 experts and their weights are those attacked.
        settings: of the attack.

    Returns:
        The clips, and how many gradients through experts they took.
    """
    with torch.no_grad():
        experts, weights = _of(twin, misrouted)

    def prepare(clip: Tensor) -> Aim:
        of_router = losses.router(twin, clip, settings, settings.gamma1)

        def objective(moved: Tensor, rows: Tensor) -> Judged:
            judged = of_router.objectives[0](moved, rows)
            loss, label = settings.gamma2 * judged.loss, batch.label[rows]
            for i in range(len(twin.experts)):
                at, rank = torch.nonzero(experts[rows] == i, as_tuple=True)
                each = losses.ce(twin.run_expert(i, moved[at]), label[at])
                loss = loss.index_add(0, at, weights[rows[at], rank] * each)
            return judged._replace(loss=loss, success=torch.zeros_like(judged.success))

        return of_router._replace(objectives=(objective,))

    found = ascend(twin, batch.clip, settings, prepare, batch.index, climb=fixed)
    return found.adversarial, int(found.backwards.sum()) * experts.shape[1]


def _of(twin: VideoMoE, clip: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Top-2 experts of clips, int64 [B, 2], and their weights, [B, 2]."""
    with torch.no_grad():
        top, experts = full(twin.scores(clip)).topk(min(TOP, len(twin.experts)), dim=1)
    return experts, top.softmax(dim=1)


def _expert_loss(
    twin: VideoMoE, batch: Batch, clip: Tensor, index: int, rows: Tensor,
    settings: LipschitzSettings,
) -> Tensor:  # fmt: skip
    """Return CE(E_i(x'), y) + lam L_Lip(E_i) of some rows of a batch, [rows]."""
    clean = full(constant(twin, lambda: twin.run_expert(index, batch.clip[rows])))
    logits = full(twin.run_expert(index, clip[rows]))
    each = label_loss(logits, batch.label[rows], settings)
    return each + settings.lam * l_lip(clean, logits, batch.clip[rows], clip[rows])
