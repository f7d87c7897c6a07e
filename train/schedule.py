"""How far a training is, by epochs or by the budget that it has spent, and the rate that follows.

By a budget, the last epoch goes over as many clips, in each of its walks, as the budget still pays
for by what those walks cost before: no walk of it is left out. Only where a walk is new to the
training, and what it costs unknown, may the budget end in the middle of one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from vmoe.cli import log
from vmoe.train.state import State

TERA = 1e12
FIRST_RATE = 0.02  # share of the highest rate that a training begins with


class Course:
    """Where a training stands on its way.

    Attributes:
        clips: how many clips each walk of this epoch goes over.
    """

    def __init__(self, epochs: int, budget: float, state: State, smallest: int = 2) -> None:
        """Begin where a state stands.

        Args:
            epochs: how many; they do not count where there is a budget.
            budget: in TFLOPs; 0 is none.
            state: what is spent and done, and what walks cost; kept up to date.
            smallest: clips of a walk, at least: fewer would be a bad batch.
        """
        self._epochs, self._budget, self._state = epochs, budget, state
        self._smallest = smallest
        self.clips = 0
        self._walks, self._walked, self._planned = 1, 0, True

    @property
    def done(self) -> float:
        """Share of the training that is done, in [0, 1]."""
        if self._budget:
            return min(self._state.tflops / self._budget, 1.0)
        walked = self._walked / max(self.clips * self._walks, 1)
        return min((self._state.epoch + walked) / self._epochs, 1.0)

    @property
    def over(self) -> bool:
        """Whether nothing is left."""
        return self._spent if self._budget else self._state.epoch >= self._epochs

    def begin(self, clips: int, walks: Sequence[str]) -> None:
        """Plan an epoch over so many clips, of walks of these names."""
        state, self.clips = self._state, clips
        self._walks, self._walked = len(walks), 0
        self._planned = all(name in state.costs for name in walks)
        if self._budget and self._planned:
            each = sum(state.costs[name] for name in walks)
            left = max(self._budget - state.tflops, 0) * TERA / max(each, 1.0)
            self.clips = min(clips, max(math.ceil(left), self._smallest))

    def stops(self, walk: str) -> bool:
        """Return whether the budget ends here, in the middle of a walk."""
        if not self._budget or self._planned or not self._spent:
            return False
        log.warning(
            "the budget ends within the walk %r, whose cost was not known before: give fewer "
            "--clips, so that an epoch is a small part of it.", walk,
        )  # fmt: skip
        return True

    def spend(self, walk: str, flops: float, clips: int) -> None:
        """Count what a walk spent on some clips, each as much."""
        self._state.costs[walk] = flops
        self._state.tflops += flops * clips / TERA
        self._walked += clips

    def end(self) -> None:
        """End the epoch."""
        self._walked = 0

    @property
    def _spent(self) -> bool:
        return self._state.tflops >= self._budget * (1 - 1e-9)


def rate(done: float, warmup: float, schedule: str = "cosine") -> float:
    """Return the learning rate as a share of its highest: a linear rise, then half a cosine.

    Args:
        done: share of the training that is done, in [0, 1].
        warmup: share over which the rate rises.
        schedule: `cosine`, or `constant` after the rise.
    """
    if done < warmup:
        return FIRST_RATE + (1 - FIRST_RATE) * done / warmup
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (done - warmup) / max(1 - warmup, 1e-9)))
