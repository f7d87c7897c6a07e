"""The guard: does a window lead to what windows of clean video lead to?

Its terms (terms.py) cost nothing; with a filter the filter, and one more run of the routed expert
(of router and expert, where one graph holds them). A profile (profile.py) knows how they are
distributed on clean video, and the threshold that a stated share of clean windows exceeds.
`monitor` reports; `enforce` acts: it abstains, or lets all experts vote.

What it promises is the false-alarm rate, on video like that of the calibration. Whoever knows the
guard can attack it together with the model; it is a tripwire, no proof.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .profile import Profile
from .terms import Terms

OFF, MONITOR, ENFORCE, CALIBRATE = "off", "monitor", "enforce", "calibrate"
ABSTAIN, VOTE, NOTHING = "abstain", "vote", ""
REMEMBERED = 100  # windows over which votes are rationed


@dataclass(frozen=True)
class Verdict:
    """What the guard says of one window.

    Attributes:
        score: how strange it is: -ln of how often clean windows are as strange, summed over the
            terms; higher is stranger.
        alarm: whether the score is above the profile's threshold.
        why: the term that adds most; empty without an alarm.
        acted: what was done: nothing (empty), `abstain` or `vote`.
        terms: the terms themselves, by name; those that cannot be told are left out.
    """

    score: float
    alarm: bool
    why: str
    acted: str
    terms: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return {
            "score": round(self.score, 6),
            "alarm": self.alarm,
            "why": self.why,
            "acted": self.acted,
            "terms": {name: round(value, 6) for name, value in self.terms.items()},
        }


class Guard:
    """Judges the windows of one stream, in order."""

    def __init__(
        self,
        mode: str,
        profile: Profile | None,
        *,
        on_alarm: str = ABSTAIN,
        vote_share: float = 0.25,
        experts: int = 1,
    ) -> None:
        """Take what is done.

        Args:
            mode: monitor, enforce or calibrate.
            profile: of clean video; None only to calibrate.
            on_alarm: abstain or vote.
            vote_share: of the newest windows at most so many are voted on, the others abstain:
                votes cost as much as all experts, and an attacker could ask for them.
            experts: how many the model has.
        """
        self._mode, self._profile = mode, profile
        self._on_alarm, self._vote_share = on_alarm, vote_share
        clean = profile.histogram if profile is not None else None
        self._terms = Terms(experts, clean)
        self._voted: deque[bool] = deque(maxlen=REMEMBERED)

    def judge(
        self,
        shares: NDArray[np.float64],
        weights: NDArray[np.float64],
        route: int,
        *,
        epoch: int,
        t_first_s: float,
        t_s: float,
        age_s: float,
        filtered: NDArray[np.float64] | None = None,
    ) -> Verdict:
        """Judge the next window.

        Args:
            shares: softmax of its logits, [K].
            weights: softmax of its router's scores, [M].
            route: its expert.
            epoch: of its frames.
            t_first_s: time of its first frame, in seconds.
            t_s: time of its last.
            age_s: capture to label, in seconds.
            filtered: shares of the filtered clip, [K], where the profile has a filter.
        """
        terms = self._terms.of(
            shares, weights, route, epoch=epoch, t_first_s=t_first_s, t_s=t_s, age_s=age_s,
            filtered=filtered,
        )  # fmt: skip
        if self._profile is None:
            return Verdict(0.0, False, "", NOTHING, terms)
        parts = self._profile.strangeness(terms)
        score = sum(parts.values())
        alarm = score > self._profile.threshold
        why = max(parts, key=lambda name: parts[name]) if alarm else ""
        acted = self._act() if alarm and self._mode == ENFORCE else NOTHING
        self._voted.append(acted == VOTE)
        return Verdict(score, alarm, why, acted, terms)

    def _act(self) -> str:
        """Return what is done on an alarm: votes are rationed."""
        room = sum(self._voted) + 1 <= self._vote_share * REMEMBERED
        return VOTE if self._on_alarm == VOTE and room else ABSTAIN
