"""The gate `robust`: clips that an engine alone loses, counted the same way here and at export.

A clip counts that is broken on the engine, and on the twin by nothing that was tried: clips made on
the twin and on that engine, which both have judged. Those that the engine alone gets right are no
excuse: they say nothing of an attack that was made on the twin.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from vmoe.attacks import deployment
from vmoe.attacks.figures import budgets
from vmoe.attacks.judge import Bools
from vmoe.attacks.modes import TRANSFER
from vmoe.attacks.outcomes import Evaluation, Row
from vmoe.errors import GateError, SettingError
from vmoe.settings import format_eps


def lost(on_twin: Bools, on_engine: Bools) -> Bools:
    """Return which clips are broken on the engine alone, [N]."""
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
