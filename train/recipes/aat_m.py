"""aat-m: alternating adversarial training of experts and router, each by TRADES on its own part.

Source: Zhang et al., "Robust Mixture-of-Expert Training for Convolutional Neural Networks"
(AdvMoE), ICCV 2023, algorithm 1: every batch updates the experts under the present router, then
the router under those experts. TRADES: Zhang et al., ICML 2019.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from vmoe.attacks import losses
from vmoe.attacks.climbs import fixed
from vmoe.attacks.loop import Aim, Judged, ascend
from vmoe.attacks.methods import pgd
from vmoe.batches import Batch
from vmoe.models import VideoMoE
from vmoe.settings import opt
from vmoe.train.passes import Pass, RobustSettings, Update, Walk, balance_term, full, label_loss


@dataclass(frozen=True)
class Settings(RobustSettings):
    """What aat-m takes."""

    trades: float = opt(6.0, "weight of TRADES' divergence (its 1/lambda)", at_least=0)


def walks(settings: Settings, done: float) -> list[Walk]:
    """Minimise CE(F(x), y) + trades KL(F(x) || F(x')) + balance, over each part in turn."""

    def prepare(twin: VideoMoE, batch: Batch, seed: int) -> tuple[Tensor, int]:
        return diverging(twin, batch, pgd.Settings(**settings.attack(seed)))

    def update(twin: VideoMoE, batch: Batch, clip: Tensor) -> Update:
        both = torch.cat([batch.clip, clip])  # one pass, one set of statistics
        out = twin(both)
        clean, moved = out.logits.chunk(2)
        loss = label_loss(clean, batch.label, settings)
        loss = loss + settings.trades * divergence(clean, moved)
        return Update(loss.mean() + balance_term(twin, out.scores, settings), len(both))

    return [tuple(Pass(part, part, update, prepare) for part in ("experts", "router"))]


def divergence(clean: Tensor, moved: Tensor) -> Tensor:
    """Return KL(softmax(clean) || softmax(moved)) of each clip, [B]."""
    clean, moved = full(clean).log_softmax(dim=1), full(moved).log_softmax(dim=1)
    return kl_div(moved, clean, reduction="none", log_target=True).sum(dim=1)


def diverging(twin: VideoMoE, batch: Batch, how: pgd.Settings) -> tuple[Tensor, int]:
    """Return clips that maximise KL(F(x) || F(x+d)), and how many gradients that took."""

    def prepare(clip: Tensor) -> Aim:
        with torch.no_grad():
            clean = twin(clip, "frozen")

        def objective(moved: Tensor, rows: Tensor) -> Judged:
            out = twin(moved, how.route_grad)
            loss = divergence(clean.logits[rows], out.logits)
            return losses.judged(loss, out.logits, batch.label[rows], out)

        return Aim((objective,), clean.route, None, losses.silent(clean.logits, clean.scores))

    found = ascend(twin, batch.clip, how, prepare, batch.index, climb=fixed)
    return found.adversarial, int(found.backwards.sum())
