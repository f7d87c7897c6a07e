"""The gate `robust` of vmoe-attack and of vmoe-export: how its clips are made, and what it counts.

A clip counts that is broken on the engine, and on the twin by nothing that was tried: clips made on
the twin and on that engine, which both have judged. Those that the engine alone gets right are no
excuse: they say nothing of an attack that was made on the twin.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from vmoe.attacks import deployment
from vmoe.attacks.evaluate import job, plan
from vmoe.attacks.figures import budgets
from vmoe.attacks.judge import Bools, Ints, of_twin
from vmoe.attacks.modes import TRANSFER
from vmoe.attacks.outcomes import Evaluation, Row
from vmoe.clips import Clips
from vmoe.errors import GateError, SettingError
from vmoe.models import VideoMoE
from vmoe.settings import format_eps

ATTACK, ROUTE_GRAD = "pgd", "straight-through"  # at export, where no clips are given


def make(
    twin: VideoMoE, clips: Clips, label: Ints, eps: float, steps: int, seed: int = 0
) -> Clips:  # fmt: skip
    """Return what vmoe-attack makes of clips on a twin, uint8 within the ball, for the gate.

    It stops at a first success: a clip that the twin loses does not count, wherever it ends.

    Args:
        twin: what the clips are made on.
        clips: clean, uint8 [N, T, H, W, 3].
        label: [N].
        eps: L-infinity budget, on pixels in [0, 1].
        steps: gradient steps.
        seed: of the starts.
    """
    device = next(twin.parameters()).device
    rows = plan([ATTACK], [eps], [ROUTE_GRAD], steps=steps, seed=seed)
    work = job(twin, clips, label, rows, {"twin": of_twin(twin, device)}, device=device)
    (row,), size = work.rows, work.batch
    each = [work.make(row, slice(i, i + size)).clips for i in range(0, len(clips), size)]
    return np.concatenate(each)


def lost(on_twin: Bools, on_engine: Bools) -> Bools:
    """Return which clips are broken on the engine alone, [N]; each by anything that was tried."""
    return on_engine & ~on_twin


def require(models: Collection[str], rows: Sequence[Row]) -> None:
    """Raise where there is nothing to compare.

    Args:
        models: names of those that judge.
        rows: the attacks.

    Raises:
        SettingError: no twin, no engine, or no clips that were made on the twin.
    """
    transfers = any(row.mode == TRANSFER for row in rows)
    if "twin" not in models or len(models) < 2 or not transfers:
        raise SettingError(
            "--gate-robust compares an engine with its twin: attack a bundle, transfer among the "
            "modes."
        )


def refuse(found: Evaluation, most: float) -> None:
    """Raise where an engine alone loses more clips than allowed.

    Args:
        found: an evaluation of a twin and engines.
        most: clips, in per cent.

    Raises:
        GateError: names the engine that loses most, and at which budget.
        SettingError: there is nothing to compare.
    """
    require(found.clean, [outcome.row for outcome in found.outcomes])
    counts = []
    for eps in budgets(found):
        for engine in (name for name in found.clean if name != "twin"):
            both = deployment.on_both(found, engine, eps)
            if both is not None:
                counts.append((int(lost(*both).sum()), engine, eps))
    count, engine, eps = max(counts, key=lambda each: each[0])
    n, norm = len(found.label), found.outcomes[0].row.norm
    if 100 * count / n > most:
        raise GateError(
            f"refused: adversarial clips broken on {engine} alone are {count} of {n} at eps "
            f"{format_eps(eps, norm)}, {100 * count / n:.4g} %, must be at most {most:g} %."
        )
