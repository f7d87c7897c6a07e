"""What a recipe is made of: walks over the data, and passes that update a part of the twin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vmoe.attacks import ball
from vmoe.attacks.budget import BallSettings
from vmoe.attacks.loop import as_found
from vmoe.attacks.methods import pgd
from vmoe.batches import Batch
from vmoe.lipschitz import l_lip
from vmoe.models import VideoMoE
from vmoe.settings import Settings, opt
from vmoe.train.balance import BALANCES, balance_loss
from vmoe.train.state import State


@dataclass(frozen=True)
class RecipeSettings(Settings):
    """What every recipe takes."""

    balance: float = opt(0.5, "weight of the router's load balance", at_least=0)
    balance_loss: str = opt("switch", "form of the load balance", choices=BALANCES)
    smoothing: float = opt(0.0, "label smoothing", at_least=0, at_most=1)
    bf16: bool = opt(False, "passes in bfloat16; weights and losses in float32")


@dataclass(frozen=True)
class RobustSettings(RecipeSettings):
    """What every adversarial recipe takes: the attack inside of training."""

    eps: float = opt(8 / 255, "budget, on pixels in [0, 1]", at_least=0)
    norm: str = opt("linf", "norm of the budget", choices=ball.NORMS)
    steps: int = opt(3, "gradient steps of the attack inside of training", at_least=1)
    step: float = opt(0.75, "its step size, as a share of eps", above=0)

    def __post_init__(self) -> None:
        """Check every value, as the attack would later."""
        super().__post_init__()
        BallSettings(eps=self.eps, norm=self.norm)

    def attack(self, seed: int, **more: Any) -> dict[str, Any]:
        """Return the settings of an attack inside of training.

        Without early stop: the strongest clip is wanted, not the first that succeeds.
        """
        return {
            "eps": self.eps, "norm": self.norm, "steps": self.steps, "step": self.step,
            "seed": seed, "bf16": self.bf16, "early_stop": False, **more,
        }  # fmt: skip


@dataclass(frozen=True)
class LipschitzSettings(RobustSettings):
    """What the paper's recipes take beside: Lipschitz terms, and a temporal step in the attack."""

    lam: float = opt(1e-4, "weight of the Lipschitz terms", at_least=0)
    beta: float = opt(0.9, "decay of the temporal step's V", at_least=0, at_most=1)
    temporal: str = opt(
        "iterations", "temporal step of the attack", choices=("iterations", "frames", "off")
    )

    def temporal_attack(self, seed: int, **more: Any) -> dict[str, Any]:
        """Return the settings of a temporal Lipschitz attack inside of training."""
        how = {"beta": self.beta, "temporal": self.temporal, "lam": self.lam}
        return self.attack(seed, **how, **more)


class Update(NamedTuple):
    """What one batch says: the loss to minimise, and how many clips a gradient was taken of."""

    loss: Tensor
    gradients: int


@dataclass(frozen=True)
class Pass:
    """One update of one part.

    Attributes:
        name: for the log.
        part: what it updates, `whole`, `router`, `experts` or `expert0`; the rest keeps its
            weights and its statistics.
        update: from a twin (the part being in train mode), a batch and its adversarial clips to
            an Update, whose loss is a mean over the batch.
        prepare: from a twin in eval mode, a batch and a seed to the adversarial clips, and of how
            many clips it took a gradient through experts.
        after: what is done when the walk is over, if anything: to twin, average and optimiser.
        around: what stands around each step of the optimiser, the gradients being there.
    """

    name: str
    part: str
    update: Callable[[VideoMoE, Batch, Tensor], Update]
    prepare: Callable[[VideoMoE, Batch, int], tuple[Tensor, int]]
    after: Callable[[State], None] | None = None
    around: Callable[[VideoMoE], AbstractContextManager[None]] | None = None


# One walk over the data: each batch goes through its passes in turn.
Walk: TypeAlias = "tuple[Pass, ...]"


def clean_clips(twin: VideoMoE, batch: Batch, seed: int) -> tuple[Tensor, int]:
    """Return the batch's clips as they are, at no cost."""
    return batch.clip, 0


def pgd_clips(settings: RobustSettings) -> Callable[[VideoMoE, Batch, int], tuple[Tensor, int]]:
    """Return what prepares clips by PGD on the whole model."""

    def prepare(twin: VideoMoE, batch: Batch, seed: int) -> tuple[Tensor, int]:
        how = pgd.Settings(**settings.attack(seed))
        found = pgd.attack(twin, batch.clip, batch.label, how, batch.index)
        return found.adversarial, int(found.backwards.sum())

    return prepare


@contextmanager
def training(twin: VideoMoE, part: str, *, statistics: bool = True) -> Iterator[list[nn.Parameter]]:
    """Put one part in train mode, the rest in eval mode without gradients; yield its parameters.

    At its end the whole twin is in eval mode, and every parameter takes gradients again.

    Args:
        twin: the model.
        part: `whole`, `router`, `experts` or `expert0`.
        statistics: normalise by the batch, and keep its statistics; else by those that are kept.
    """
    parts: dict[str, nn.Module | None] = {
        "whole": twin, "router": twin.router, "experts": twin.experts, "expert0": twin.experts[0],
    }  # fmt: skip
    module = parts[part]
    try:
        twin.eval().requires_grad_(False)
        if module is not None:  # a dense model has no router
            module.train(statistics).requires_grad_(True)
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


def deployed_scores(twin: VideoMoE, clip: Tensor) -> Tensor:
    """Return scores as inference has them: by the running statistics, in float32, no gradient."""
    with as_found(twin), torch.no_grad(), torch.autocast(clip.device.type, enabled=False):
        return twin.scores(clip)


def full(x: Tensor) -> Tensor:
    """Return values of bfloat16 as float32, others as they are: losses are never in half."""
    return x.float() if x.dtype == torch.bfloat16 else x


def label_loss(logits: Tensor, label: Tensor, settings: RecipeSettings) -> Tensor:
    """Return the cross-entropy of each clip, with label smoothing, [B]."""
    return cross_entropy(full(logits), label, reduction="none", label_smoothing=settings.smoothing)


def balance_term(twin: VideoMoE, scores: Tensor, settings: RecipeSettings) -> Tensor | float:
    """Return the weighted load balance of a batch; 0 where there is none."""
    if twin.router is None or not settings.balance or settings.balance_loss == "none":
        return 0.0
    return settings.balance * balance_loss(full(scores), settings.balance_loss)


def whole_update(
    twin: VideoMoE, batch: Batch, clip: Tensor, settings: RecipeSettings, lam: float = 0.0
) -> Update:
    """Return CE(F(clip), y) + lam L_Lip(F) + balance over a batch, by its mean.

    Both sides of L_Lip(F) are routed freely, as F is: a flip counts as a change of F.
    """
    clean = constant(twin, lambda: twin(batch.clip, "frozen").logits) if lam else None
    out = twin(clip)
    loss = label_loss(out.logits, batch.label, settings)
    if clean is not None:
        loss = loss + lam * l_lip(full(clean), full(out.logits), batch.clip, clip)
    return Update(loss.mean() + balance_term(twin, out.scores, settings), len(clip))
