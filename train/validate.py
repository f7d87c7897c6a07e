"""What is measured after every epoch: accuracy, robust accuracy, and the router's health."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vmoe.attacks.methods import pgd
from vmoe.attacks.ranks import Ranks
from vmoe.batches import batches
from vmoe.data import ClipData
from vmoe.models import VideoMoE
from vmoe.models.moe import expert_shares
from vmoe.train import together

UNUSED = 0.01  # an expert below this share of the clips is lost
CROWDED = 0.9  # an expert above it has taken over


@dataclass(frozen=True)
class Validation:
    """One validation.

    Attributes:
        clean: clean accuracy.
        robust: accuracy under PGD; None where it was not measured.
        shares: share of the clips that each expert receives.
        load_entropy: of these shares, 1 where all experts share alike; 0 for a dense model.
        route_entropy: mean over the clips of the entropy of their weights, 1 where the router is
            undecided; 0 for a dense model.
        margin: mean gap between the two highest scores; 0 for a dense model.
        flips: share of the clips whose route changes under PGD.
        finite: whether every answer was a number; where one was not, the rest means nothing.
    """

    clean: float
    robust: float | None
    shares: list[float]
    load_entropy: float
    route_entropy: float
    margin: float
    flips: float
    finite: bool = True

    @property
    def figure(self) -> float:
        """What the best epoch is chosen by: robust accuracy where there is one."""
        return self.clean if self.robust is None else self.robust

    def row(self) -> dict[str, float]:
        """Return the columns of results.csv."""
        row = {"clean": self.clean}
        if self.robust is not None:
            row |= {"robust": self.robust, "flips": self.flips}
        if len(self.shares) > 1:
            row |= {"load_entropy": self.load_entropy, "route_entropy": self.route_entropy}
            row |= {"margin": self.margin}
            row |= {f"share{i}": share for i, share in enumerate(self.shares)}
        return row

    def collapse(self) -> str | None:
        """Return a warning where routing collapses, with what to change."""
        if len(self.shares) == 1:
            return None
        unused = [i for i, share in enumerate(self.shares) if share < UNUSED]
        if max(self.shares) <= CROWDED and not unused:
            return None
        shares = ", ".join(f"{share:.0%}" for share in self.shares)
        return (
            f"routing collapses: the experts receive {shares} of the clips. "
            "Give a higher --balance, or fewer --experts."
        )


def crowded(row: Mapping[str, float]) -> bool:
    """Return whether one expert has taken over, by a row of results.csv."""
    return (
        max((value for key, value in row.items() if key.startswith("share")), default=0) > CROWDED
    )


class _Seen(NamedTuple):
    """What one process saw: how many clips were right, stood, kept their route; and all scores."""

    right: int
    stood: int
    kept: int
    scores: Tensor
    finite: bool


def validate(
    twin: VideoMoE, data: ClipData, attack: pgd.Settings | None, batch: int,
    ranks: Ranks | None = None,
) -> Validation:  # fmt: skip
    """Measure a twin on validation clips.

    Args:
        twin: in eval mode.
        data: the clips; the test split is never used here.
        attack: PGD's settings, without early stop; None measures clean clips alone.
        batch: clips of a batch.
        ranks: this process among those that share the clips.
    """
    ranks = ranks or Ranks()
    mine = list(range(ranks.rank, len(data), ranks.world))
    seen = together.gathered(_look(twin, data, mine, attack, batch))
    every, count = torch.cat([each.scores for each in seen]), len(data)
    shares = expert_shares(every.argmax(dim=1), every.shape[1])
    return Validation(
        clean=sum(each.right for each in seen) / count,
        robust=sum(each.stood for each in seen) / count if attack else None,
        shares=shares,
        load_entropy=entropy(torch.tensor(shares, dtype=torch.float64)),
        route_entropy=entropy(every.double().softmax(dim=1)),
        margin=_margin(every),
        flips=1 - sum(each.kept for each in seen) / count if attack else 0.0,
        finite=all(each.finite for each in seen),
    )


def _look(
    twin: VideoMoE, data: ClipData, rows: list[int], attack: pgd.Settings | None, batch: int
) -> _Seen:
    device = next(twin.parameters()).device
    right, kept, stood, finite = 0, 0, 0, True
    scores: list[Tensor] = []
    for part in batches(data, batch, device, rows) if rows else ():
        with torch.no_grad():
            out = twin(part.clip, "frozen")
        is_right = out.logits.argmax(dim=1) == part.label
        right += int(is_right.sum())
        scores.append(out.scores.cpu())
        finite = finite and bool(out.logits.isfinite().all() and out.scores.isfinite().all())
        if attack and finite:  # an attack refuses a model that answers NaN
            found = pgd.attack(twin, part.clip, part.label, attack, part.index)
            stood += int((is_right & ~found.success).sum())  # zero lies in the ball, too
            kept += int((found.route_before == found.route_after).sum())
    none = torch.zeros(0, len(twin.experts))
    return _Seen(right, stood, kept, torch.cat([none, *scores]), finite)


def entropy(shares: Tensor) -> float:
    """Return the mean entropy of shares, [..., M], in units of its highest value, log M."""
    if shares.shape[-1] == 1:
        return 0.0
    nats = -(shares * shares.clamp(min=1e-12).log()).sum(dim=-1).mean()
    return max(0.0, float(nats) / math.log(shares.shape[-1]))


def _margin(scores: Tensor) -> float:
    if scores.shape[1] == 1:
        return 0.0
    top = scores.topk(2, dim=1).values
    return float((top[:, 0] - top[:, 1]).mean())
