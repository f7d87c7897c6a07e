"""J-TLAT-plus: experts that are one until they can see, and a router that leaves no expert out.

What is changed of J-TLAT, and compared with it in benchmarks/reproduce.py:

* For the first share of the training (`shared`) all experts are one, adversarially trained alone:
  at a given budget each then learns from all of the clips, not from a share of them. Then they
  part (sparse upcycling, inside of the training), all of them, or their last stages alone
  (`apart`): what stands in front of those goes on to learn from all clips, as one.
* The router is trained from the start, since its passes cost next to nothing: for a margin under
  TLGA-R, max(0, margin - (R_t - max_i R_i)), where J-TLAT's cross-entropy goes on to sharpen what
  no attack can flip any more. Its targets t are its own routes, shared out over the batch
  (Sinkhorn), so that experts get about as much; by its own routes alone it soon has two.
* No weak experts' pass, Lipschitz term or temporal step; the whole is trained on clips of PGD.

Source: ours, after arXiv 2602.01369; upcycling: Komatsuzaki et al., ICLR 2023.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from vmoe.attacks import losses
from vmoe.attacks.methods import tla_e, tlga_r
from vmoe.batches import Batch
from vmoe.models import VideoMoE
from vmoe.settings import opt
from vmoe.train import together
from vmoe.train.passes import (
    Pass,
    RobustSettings,
    Update,
    Walk,
    balance_term,
    deployed_scores,
    full,
    label_loss,
    pgd_clips,
    whole_update,
)
from vmoe.train.state import State

ROUNDS = 10  # of scaling
# Of every family, the last stage and the classifier.
LAST = re.compile(r"\b(layer4|slow\.4|fast\.4|fc)\.")


@dataclass(frozen=True)
class Settings(RobustSettings):
    """What j-tlat-plus takes."""

    shared: float = opt(
        0.6, "share of the training in which all experts are one", at_least=0, at_most=1
    )
    apart: str = opt(
        "last", "what of the experts parts: the last stage and the classifier, or all",
        choices=("last", "all"),
    )  # fmt: skip
    margin: float = opt(2.0, "of scores under attack, that the router is trained for", at_least=0)
    gamma1: float = opt(1.0, "weight of the steering to the weakest expert", at_least=0)


def walks(settings: Settings, done: float) -> list[Walk]:
    """Return the passes of an epoch: router and shared expert, later router and whole."""

    def misroute(twin: VideoMoE, batch: Batch, seed: int) -> tuple[Tensor, int]:
        how = tlga_r.Settings(**settings.attack(seed, gamma1=settings.gamma1, temporal="off"))
        found = tlga_r.attack(twin, batch.clip, batch.label, how, batch.index)
        return found.adversarial, 0  # of the router alone: next to nothing

    def of_one(twin: VideoMoE, batch: Batch, seed: int) -> tuple[Tensor, int]:
        how = tla_e.Settings(**settings.attack(seed, expert=0, temporal="off"))
        found = tla_e.attack(twin, batch.clip, batch.label, how, batch.index)
        return found.adversarial, int(found.backwards.sum())

    def router(twin: VideoMoE, batch: Batch, clip: Tensor) -> Update:
        return margin_update(twin, batch, clip, settings)

    def one(twin: VideoMoE, batch: Batch, clip: Tensor) -> Update:
        loss = label_loss(twin.run_expert(0, clip), batch.label, settings)
        return Update(loss.mean(), len(clip))

    def whole(twin: VideoMoE, batch: Batch, clip: Tensor) -> Update:
        return whole_update(twin, batch, clip, settings)

    of_router = Pass("router", "router", router, misroute)
    if done < settings.shared:
        return [(of_router,), (Pass("shared expert", "expert0", one, of_one, after=share_out),)]
    around = fronts_as_one if settings.apart == "last" else None
    return [(of_router,), (Pass("whole", "whole", whole, pgd_clips(settings), around=around),)]


def margin_update(twin: VideoMoE, batch: Batch, clip: Tensor, settings: Settings) -> Update:
    """Return max(0, margin - (R_t(x') - max_{i != t} R_i(x'))) + balance, t shared out of R(x)."""
    target = shared_out(deployed_scores(twin, batch.clip)).argmax(dim=1)
    scores = full(twin.scores(clip))
    short = (settings.margin + losses.margin(scores, target)).clamp(min=0)
    return Update(short.mean() + balance_term(twin, scores, settings), 0)


def shared_out(scores: Tensor) -> Tensor:
    """Return weights of a batch's clips that give every expert as much, [B, M].

    Rows and columns of softmax(R) are scaled in turn, so that each clip weighs 1 and each expert
    receives B / M: the assignment that is nearest to the router's own and leaves nobody out.

    Source: Sinkhorn and Knopp, 1967; as targets: Caron et al., "SwAV", NeurIPS 2020.
    """
    weights = scores.double().softmax(dim=1)
    for _ in range(ROUNDS):
        weights = weights / together.total(weights.sum(dim=0)).clamp(min=1e-12)
        weights = weights / weights.sum(dim=1, keepdim=True)
    return weights


def share_out(state: State) -> None:
    """Give every expert the first one's weights and statistics, and what its optimiser knows."""
    for twin in (state.twin, state.kept):
        first, *others = twin.experts
        for other in others:
            other.load_state_dict(first.state_dict())
    known, (first, *others) = state.optimiser.state, state.twin.experts
    for other in others:
        for mine, theirs in zip(first.parameters(), other.parameters(), strict=True):
            known[theirs] = {key: value.clone() for key, value in known[mine].items()}


@contextmanager
def fronts_as_one(twin: VideoMoE) -> Iterator[None]:
    """Let the first expert's front take the step of all experts' gradients, and the others follow.

    The front is what stands before the last stage, LAST. BatchNorm's statistics stay each expert's
    own.
    """
    fronts = [
        [p for name, p in expert.named_parameters() if not LAST.search(name)]
        for expert in twin.experts
    ]
    for first, *others in zip(*fronts, strict=True):
        grads = [p.grad for p in (first, *others) if p.grad is not None]
        first.grad = torch.stack(grads).sum(dim=0) if grads else None
        for other in others:
            other.grad = None
    yield
    with torch.no_grad():
        for first, *others in zip(*fronts, strict=True):
            for other in others:
                other.copy_(first)
