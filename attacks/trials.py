"""Attacks run for their own sake, on uint8 clips: who breaks what, clip by clip.

Beside `evaluate`, on purpose: its clips are rounded as they are and never brought back into the
ball, so that an attack that leaves it is seen, and every success is judged on what uint8 holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from vmoe.attacks import methods
from vmoe.attacks.judge import Bools, Floats, Ints, Judge, of_twin
from vmoe.attacks.loop import AttackResult
from vmoe.batches import to_tensor
from vmoe.clips import Clips
from vmoe.models import VideoMoE

ALLOWED = 0.05  # the share of clips that chance, or an unlucky start, may explain
CONFIDENCE = 0.95
ENOUGH = 20  # clips; of fewer, more than a fifth could go against a rule unseen


def few(*against: tuple[int, int]) -> bool | None:
    """Return whether no count (of how many) is `beyond`; None where one is of too few to tell."""
    if any(beyond(count, of) for count, of in against):
        return False
    return True if all(of >= ENOUGH for _, of in against) else None


def beyond(count: int, of: int) -> bool:
    """Return whether a count is above the share ALLOWED, with CONFIDENCE: one-sided, exact.

    P(X >= count) < 1 - CONFIDENCE for X binomial of `of` and ALLOWED: 5 of 32, 4 of 20, 3 of 8. Of
    a single clip, which chance alone could explain, that one.
    """
    if of == 1:
        return count == 1
    below = sum(
        math.comb(of, k) * ALLOWED**k * (1 - ALLOWED) ** (of - k) for k in range(min(count, of + 1))
    )
    return 1 - below < 1 - CONFIDENCE


class Trial(NamedTuple):
    """What one attack did; one value for each clip.

    Attributes:
        clips: what it made, rounded, uint8 [N, T, H, W, 3].
        broken: whether the twin's label of them is wrong, [N].
        size: of the change, on uint8 clips: grey levels (linf) or on pixels in [0, 1] (l2), [N].
        dead: whether a gradient was zero or not finite, [N].
        backwards: backward passes, [N].
    """

    clips: Clips
    broken: Bools
    size: Floats
    dead: Bools
    backwards: Ints


@dataclass(frozen=True)
class Trials:
    """A twin, some clips, and the attacks that were run on them; each is run once.

    Attributes:
        twin: on `device`.
        clips: clean, uint8 [N, T, H, W, 3].
        label: [N].
        index: number of each clip in its data set, [N].
        norm: of the budget.
        seed: of all attacks.
        batch: clips attacked at once.
        device: where the twin is.
    """

    twin: VideoMoE
    clips: Clips
    label: Ints
    index: Ints
    norm: str = "linf"
    seed: int = 0
    batch: int = 16
    device: torch.device | str = "cpu"
    _done: dict[tuple[object, ...], Trial] = field(default_factory=dict)

    def run(self, attack: str, eps: float, **values: Any) -> Trial:
        """Run an attack on every clip; of the values it takes those that it has."""
        key = (attack, eps, *sorted(values.items()))
        if key not in self._done:
            self._done[key] = self._on(self.twin, attack, eps, np.arange(len(self.clips)), values)
        return self._done[key]

    def transfer(self, twin: VideoMoE, attack: str, eps: float, at: Ints, **values: Any) -> Trial:
        """Run an attack on another twin, on the clips `at`; broken is what this twin says."""
        return self._on(twin, attack, eps, at, values)

    def answer(self, judge: Judge, clips: Clips) -> tuple[Floats, Floats, Ints]:
        """Return logits, scores and routes that a model gives to all clips, batch by batch."""
        answers = [judge(clips[at]) for at in self._batches(len(clips))]
        logits, scores, route = (np.concatenate(each) for each in zip(*answers, strict=True))
        return logits, scores, route

    @property
    def own(self) -> Judge:
        """The twin itself, as a judge."""
        return of_twin(self.twin, self.device)

    def _batches(self, n: int) -> list[slice]:
        return [slice(i, i + self.batch) for i in range(0, n, self.batch)]

    def _on(
        self, twin: VideoMoE, attack: str, eps: float, rows: Ints, values: dict[str, Any]
    ) -> Trial:
        method = methods.load(attack)
        given = {"eps": eps, "norm": self.norm, "seed": self.seed, "grid": True, **values}
        settings = methods.settings_of(attack, given)
        found: list[AttackResult] = []
        for part in self._batches(len(rows)):
            at = rows[part]
            clip = to_tensor(self.clips[at], self.device)
            label = torch.as_tensor(self.label[at], device=self.device)
            found.append(
                method.attack(twin, clip, label, settings, torch.as_tensor(self.index[at]))
            )
        made = np.concatenate([_uint8(each.adversarial) for each in found])
        said = self.answer(self.own, made)[0].argmax(axis=1)
        return Trial(
            made,
            said != self.label[rows],
            _size(made, self.clips[rows], self.norm),
            np.concatenate([each.dead.cpu().numpy() > 0 for each in found]),
            np.concatenate([each.backwards.cpu().numpy() for each in found]),
        )


def _uint8(clip: torch.Tensor) -> Clips:
    levels = (255 * clip).round().clamp(0, 255).byte()
    made: Clips = levels.permute(0, 2, 3, 4, 1).contiguous().cpu().numpy()
    return made


def _size(made: Clips, clean: Clips, norm: str) -> Floats:
    delta = (made.astype(np.int16) - clean).reshape(len(made), -1)
    if norm == "linf":
        return np.asarray(np.abs(delta).max(axis=1, initial=0), np.float64)
    return np.asarray(np.sqrt(np.square(delta / 255).sum(axis=1)))
