"""Fourteen checks of an evaluation: whether attacks that fail do so because the model is robust.

    sanity = check(twin, clips, label, index, eps=8 / 255)
    for each in sanity.checks:
        print(each.number, each.verdict, each.line)
    print(sanity.verdict())

Where a share of clips decides, one rule holds (`trials.few`): a check fails when more than 5 % of
the clips go against it, with a one-sided confidence of 95 %, so that one unlucky clip of a few does
not fail it. Of fewer than 20 clips that are right it can fail, but not pass: it is undecided, as is
one that could not be run. What can be checked exactly is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from vmoe.attacks.checks import CHECKS, Case
from vmoe.attacks.judge import Ints, Judge
from vmoe.attacks.outcomes import Evaluation
from vmoe.attacks.trials import ENOUGH, Trials
from vmoe.cli import progress
from vmoe.clips import Clips
from vmoe.models import VideoMoE

OK, FAILED, UNDECIDED = "ok", "FAILED", "undecided"
MASKING = frozenset({1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 13})  # the checks that bear on it


@dataclass(frozen=True)
class Check:
    """What one check came to.

    Attributes:
        number: 1 to 14.
        name: in a few words.
        verdict: `ok`, `FAILED` or `undecided`.
        measured: figures by name: counts of clips, sizes, shares.
        line: one sentence with the figures, or why there are none.
    """

    number: int
    name: str
    verdict: str
    measured: dict[str, float]
    line: str


@dataclass(frozen=True)
class Sanity:
    """All checks, and what may be said after them.

    Attributes:
        checks: the fourteen, in their order.
        right: how many of the clips the twin labels rightly when clean.
    """

    checks: tuple[Check, ...]
    right: int

    def verdict(self) -> str:
        """Return one sentence; "no sign of gradient masking" where all that bears on it passed.

        Every check that is undecided is named.
        """
        failed = self._named(FAILED)
        undecided = self._named(UNDECIDED)
        bears = {each.verdict for each in self.checks if each.number in MASKING}
        if FAILED in bears:
            said = f"FAILED: {failed}: robust figures may be too high"
        elif failed:
            said = f"FAILED: {failed}: look there before the figures are used"
        elif bears == {OK}:
            said = "no sign of gradient masking"
        elif self.right < ENOUGH:
            said = (
                f"no check failed, but some cannot tell: they need {ENOUGH} clips that are "
                f"classified rightly, and had {self.right} (more: --n)"
            )
        else:
            said = "no check failed, but not all that would show gradient masking could tell"
        return f"{said} (undecided: {undecided})." if undecided else f"{said}."

    def _named(self, verdict: str) -> str:
        return ", ".join(f"{c.number} {c.name}" for c in self.checks if c.verdict == verdict)


def check(
    twin: VideoMoE,
    clips: Clips,
    label: Ints,
    index: Ints,
    *,
    eps: float,
    norm: str = "linf",
    seed: int = 0,
    batch: int = 16,
    device: torch.device | str = "cpu",
    found: Evaluation | None = None,
    judges: Mapping[str, Judge] | None = None,
    other: VideoMoE | None = None,
) -> Sanity:
    """Check a twin, the attacks on it, and an evaluation of it; some 30 to 50 clips will do.

    Args:
        twin: on `device`.
        clips: clean, uint8 [N, T, H, W, 3].
        label: [N].
        index: number of each clip in its data set, [N].
        eps: budget, on pixels in [0, 1].
        norm: of the budget.
        seed: of all attacks.
        batch: clips attacked at once.
        device: where the twin is.
        found: the evaluation whose figures are reported: of these clips first, of the twin first.
        judges: models that judge beside the twin, by name, such as engines.
        other: a second model of the same task, for transfer; left out, the experts of the twin
            stand in for it.

    Raises:
        VmoeError: the twin answers NaN; names the clip.
    """
    trials = Trials(twin, clips, label, index, norm, seed, batch, device)
    logits, scores, route = trials.answer(trials.own, clips)
    right = logits.argmax(axis=1) == label
    case = Case(trials, eps, found, judges or {}, other, right, route, logits, scores)
    made: list[Check] = []
    for name, see in progress(CHECKS, "sanity checks", len(CHECKS)):
        seen = see(case)
        verdict = UNDECIDED if seen.ok is None else OK if seen.ok else FAILED
        made.append(Check(len(made) + 1, name, verdict, seen.measured, seen.line))
    return Sanity(tuple(made), case.n)
