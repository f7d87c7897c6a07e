"""What a recipe is made of: passes over the data, each updating a part of the twin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from vmoe.batches import Batch
from vmoe.lipschitz import l_lip
from vmoe.models import VideoMoE
from vmoe.settings import Settings, opt

PARTS = ("whole", "router", "experts")


@dataclass(frozen=True)
class RecipeSettings(Settings):
    """What every recipe takes."""

    balance: float = opt(0.5, "weight of the router's load balance (Switch)", at_least=0)


@dataclass(frozen=True)
class RobustSettings(RecipeSettings):
    """What every adversarial recipe takes: the attack inside of training."""

    eps: float = opt(8 / 255, "L-infinity budget, on pixels in [0, 1]", at_least=0, at_most=1)
    steps: int = opt(3, "gradient steps of the attack inside of training", at_least=1)
    step: float = opt(0.75, "its step size, as a share of eps", above=0)


class Update(NamedTuple):
    """What one batch says: the loss to minimise, and how many clips a gradient was taken of."""

    loss: Tensor
    gradients: int


@dataclass(frozen=True)
class Pass:
    """One walk over the data.

    Attributes:
        name: for the log.
        part: what it updates, of PARTS; the rest keeps its weights and its statistics.
        update: from a twin (the part being in train mode), a batch and its adversarial clips to
            an Update.
        prepare: from a twin in eval mode, a batch and a seed to the adversarial clips, and of how
            many clips it took a gradient through experts.
    """

    name: str
    part: str
    update: Callable[[VideoMoE, Batch, Tensor], Update]
    prepare: Callable[[VideoMoE, Batch, int], tuple[Tensor, int]]


def clean_clips(twin: VideoMoE, batch: Batch, seed: int) -> tuple[Tensor, int]:
    """Return the batch's clips as they are, at no cost."""
    return batch.clip, 0


@contextmanager
def training(twin: VideoMoE, part: str) -> Iterator[list[nn.Parameter]]:
    """Put one part in train mode, the rest in eval mode without gradients; yield its parameters.

    At its end the whole twin is in eval mode, and every parameter takes gradients again.
    """
    parts: dict[str, nn.Module | None] = {
        "whole": twin, "router": twin.router, "experts": twin.experts,
    }  # fmt: skip
    module = parts[part]
    try:
        twin.eval().requires_grad_(False)
        if module is not None:  # a dense model has no router
            module.train().requires_grad_(True)
        yield [p for p in twin.parameters() if p.requires_grad]
    finally:
        twin.eval().requires_grad_(True)


def constant(twin: VideoMoE, answer: Callable[[], Tensor]) -> Tensor:
    """Return what the twin answers in its present mode, without gradient or new statistics.

    The clean side of a Lipschitz term is a fixed target (ours). It must be normalised as the
    other side is, by its batch: the running statistics may lie so far off that the term, whose
    denominator is tiny, explodes. The statistics themselves see each batch once.
    """
    norms = [m for m in twin.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
        with torch.no_grad():
            return answer()
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def load_balance(scores: Tensor) -> Tensor:
    """Return Switch's load-balance loss, 1 where all experts share alike: M sum_i f_i P_i.

    Args:
        scores: [B, M]; f_i is the share of clips routed to i, P_i the mean weight of i.

    Source: Fedus et al., "Switch Transformers", JMLR 2022, equation 4.
    """
    experts = scores.shape[1]
    share = one_hot(scores.argmax(dim=1), experts).to(scores).mean(dim=0)
    return experts * (share * scores.softmax(dim=1).mean(dim=0)).sum()


def whole_update(
    twin: VideoMoE, batch: Batch, clip: Tensor, *, balance: float, lam: float = 0.0
) -> Update:
    """Return CE(F(clip), y) + lam L_Lip(F) + balance load_balance over a batch, by its mean.

    Both sides of L_Lip(F) are routed freely, as F is: a flip counts as a change of F.
    """
    clean = constant(twin, lambda: twin(batch.clip, "frozen").logits) if lam else None
    out = twin(clip)
    loss = cross_entropy(out.logits, batch.label)
    if clean is not None:
        loss = loss + lam * l_lip(clean, out.logits, batch.clip, clip).mean()
    if balance and twin.router is not None:
        loss = loss + balance * load_balance(out.scores)
    return Update(loss, len(clip))
