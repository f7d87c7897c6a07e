"""What is measured after every epoch: accuracy, robust accuracy, and the router's health."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vmoe.attacks.methods import pgd
from vmoe.batches import batches
from vmoe.data import ClipData
from vmoe.models import VideoMoE
from vmoe.models.moe import expert_shares

UNUSED = 0.01  # an expert below this share of the clips is lost
CROWDED = 0.9  # an expert above it has taken over


@dataclass(frozen=True)
class Validation:
    """One validation.

    Attributes:
        clean: clean accuracy.
        robust: accuracy under PGD; None where it was not measured.
        shares: share of the clips that each expert receives.
        entropy: of the mean route, 1 where all experts share alike; 0 for a dense model.
        margin: mean gap between the two highest scores; 0 for a dense model.
        flips: share of the clips whose route changes under PGD.
    """

    clean: float
    robust: float | None
    shares: list[float]
    entropy: float
    margin: float
    flips: float

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
            row |= {"entropy": self.entropy, "margin": self.margin}
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


def validate(twin: VideoMoE, data: ClipData, steps: int, eps: float, batch: int) -> Validation:
    """Measure a twin on validation clips.

    Args:
        twin: in eval mode.
        data: the clips; the test split is never used here.
        steps: of PGD; 0 measures clean clips alone.
        eps: its budget, on pixels in [0, 1].
        batch: clips of a batch.
    """
    device = next(twin.parameters()).device
    right, kept, stood = 0, 0, 0
    scores: list[Tensor] = []
    for part in batches(data, batch, device):
        with torch.no_grad():
            out = twin(part.clip, "frozen")
        is_right = out.logits.argmax(dim=1) == part.label
        right += int(is_right.sum())
        scores.append(out.scores.cpu())
        if steps:
            how = pgd.Settings(eps=eps, steps=steps, early_stop=False)  # flips, too
            found = pgd.attack(twin, part.clip, part.label, how, part.index)
            stood += int((is_right & ~found.success).sum())  # zero lies in the ball, too
            kept += int((found.route_before == found.route_after).sum())
    every, count = torch.cat(scores), len(data)
    shares = expert_shares(every.argmax(dim=1), every.shape[1])
    return Validation(
        clean=right / count,
        robust=stood / count if steps else None,
        shares=shares,
        entropy=_entropy(shares),
        margin=_margin(every),
        flips=1 - kept / count if steps else 0.0,
    )


def _entropy(shares: list[float]) -> float:
    """Return the entropy of the shares in units of its highest value, log M."""
    p = torch.tensor(shares, dtype=torch.float64)
    if len(p) == 1:
        return 0.0
    entropy = -(p * p.clamp(min=1e-12).log()).sum() / torch.tensor(float(len(p))).log()
    return max(0.0, float(entropy))


def _margin(scores: Tensor) -> float:
    if scores.shape[1] == 1:
        return 0.0
    top = scores.topk(2, dim=1).values
    return float((top[:, 0] - top[:, 1]).mean())
