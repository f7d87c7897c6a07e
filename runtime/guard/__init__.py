"""The guard: does what a window leads to look as it does on clean video?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Verdict:
    """What the guard says of one window.

    Attributes:
        score: how strange it is; what is calibrated on clean video, higher is stranger.
        alarm: whether the score is above the profile's threshold.
        why: the term that adds most to the score; empty without an alarm.
        acted: what was done: nothing (`monitor`), `abstain` or `vote`.
    """

    score: float
    alarm: bool
    why: str
    acted: str

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return {
            "score": round(self.score, 6),
            "alarm": self.alarm,
            "why": self.why,
            "acted": self.acted,
        }
