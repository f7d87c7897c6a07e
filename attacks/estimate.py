"""Gradients from answers alone: antithetic probes around a clip. What SPSA and NES share.

For directions v with E[v v'] = 1, the mean of (f(x + s v) - f(x - s v)) / (2 s) v over n pairs is
a gradient of f, blurred by s; of a linear f it is unbiased.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Generator, Tensor

from vmoe.attacks import ball
from vmoe.attacks.loop import BallSettings, Search
from vmoe.errors import SettingError
from vmoe.settings import opt

Draw: TypeAlias = Callable[[torch.Size, Generator], Tensor]  # a direction, of one clip's shape


@dataclass(frozen=True)
class EstimateSettings(BallSettings):
    """What attacks by estimated gradients take beside."""

    queries: int = opt(5000, "what each restart may ask the model about a clip", at_least=1)
    pairs: int = opt(25, "pairs of probes for each step", at_least=1)
    probe: float = opt(0.01, "how far a probe moves a pixel (sigma), on [0, 1]", above=0)
    step: float = opt(0.25, "step size (the paper's alpha), as a share of eps", above=0)
    restarts: int = opt(1, "random starts; the best counts", at_least=1)
    random_start: bool = opt(True, "start from a random point in the ball")

    def __post_init__(self) -> None:
        """Check every value; queries that pay for no step would make the attack void."""
        super().__post_init__()
        if not self.rounds:
            raise SettingError(
                f"--queries is {self.queries}; a step of {self.pairs} pairs takes "
                f"{2 * self.pairs + 2}. Give more queries, or fewer --pairs."
            )

    @property
    def rounds(self) -> int:
        """How many steps the queries pay for: each asks for its probes and its clip."""
        return (self.queries - 1) // (2 * self.pairs + 1)


class Estimator:
    """Estimates gradients of a search's loss, each sample's from directions of its own."""

    def __init__(self, search: Search, draw: Draw) -> None:
        """Begin the draws of a start."""
        settings = search.settings
        assert isinstance(settings, EstimateSettings)
        self._search, self._draw, self._settings = search, draw, settings
        # beside the start's own noise, which comes from (seed, index, number)
        self._own = ball.generators(settings.seed, search.indices, -1 - search.number)

    def slope(self, clip: Tensor) -> Tensor:
        """Return the gradient at clips, [B, C, T, H, W]; 0 of those that stand no more."""
        how, total = self._settings, torch.zeros_like(clip)
        for _ in range(how.pairs):
            toward = self._directions(clip)
            gain = self._search.judge(clip + how.probe * toward, probe=True)
            gain = gain - self._search.judge(clip - how.probe * toward, probe=True)
            total += ball.spread(gain, clip) * toward
        return total / (2 * how.probe * how.pairs)

    def _directions(self, clip: Tensor) -> Tensor:
        toward = torch.zeros_like(clip)
        for row in torch.nonzero(self._search.standing).flatten().tolist():
            toward[row] = self._draw(clip.shape[1:], self._own[row]).to(clip)
        return toward
