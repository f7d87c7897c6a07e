"""What of the twin's robustness is left in what was deployed: one row for each engine and budget.

    robust      each mode's worst-of on the engine; `twin` is the twin's own, by transfer
    gap         robust on the twin less robust on the engine, in points; above 0: engine weaker;
                by the same clips: the twin's own, and those made against that engine
    sanity      whether the figures can be believed: engine against twin, mode against mode

Intervals of a gap are 95 %, by the paired bootstrap: clips are drawn again, each with what became
of it on both models. Source: Efron and Tibshirani, "An introduction to the bootstrap", 1993.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vmoe.attacks.evaluate import Evaluation, Outcome
from vmoe.attacks.figures import agreement, broken, budgets, gap, of_model, share
from vmoe.attacks.judge import Bools
from vmoe.attacks.modes import ADAPTIVE, MODES, TRANSFER
from vmoe.attacks.trials import few
from vmoe.report import plain

OK, FAILED, UNDECIDED = "ok", "FAILED", "undecided"


def worst(found: Evaluation, model: str, eps: float) -> Bools | None:
    """Return which clips anything that counts for a model breaks on it, [N]; None of no attack."""
    return _any(found, [o for o in of_model(found, model) if o.row.eps == eps], model)


def by_mode(found: Evaluation, model: str, eps: float, mode: str) -> Bools | None:
    """Return which clips an attack of one mode breaks on a model, [N]; None of no attack.

    Saved clips that were made against another engine are of no mode of this one.
    """
    at = [o for o in of_model(found, model) if (o.row.eps, o.row.mode) == (eps, mode)]
    return _any(found, [o for o in at if o.row.origin in ("", model)], model)


def on_both(found: Evaluation, engine: str, eps: float) -> tuple[Bools, Bools] | None:
    """Return which clips are broken on the twin, and on an engine, by the same clips, each [N].

    They are all that count for the engine: of those made against it the twin's answers count, too,
    so that an engine that is the twin bit for bit comes to the same. None where no clip was made
    on the twin: the others alone are sought on the engine, and say nothing of the twin.
    """
    if "twin" not in found.clean or by_mode(found, engine, eps, TRANSFER) is None:
        return None
    at = [o for o in of_model(found, engine) if o.row.eps == eps]
    twin, own = (np.any([broken(found, o, m) for o in at], axis=0) for m in ("twin", engine))
    return twin, own


def _any(found: Evaluation, outcomes: Sequence[Outcome], model: str) -> Bools | None:
    if not outcomes:
        return None
    either: Bools = np.any([broken(found, outcome, model) for outcome in outcomes], axis=0)
    return either


def everything(found: Evaluation) -> dict[str, Any]:
    """Return the rows and the sanity lines of all engines, as JSON holds them."""
    engines = [name for name in found.clean if name != "twin"]
    rows = [_row(found, name, engines[0], eps) for eps in budgets(found) for name in engines]
    lines = [
        line._asdict()
        for eps in budgets(found)
        for name in engines
        for line in sane(found, name, eps)
    ]
    for row in rows:
        at = [
            line for line in lines if (line["engine"], line["eps"]) == (row["engine"], row["eps"])
        ]
        failed = [line["name"] for line in at if line["verdict"] == FAILED]
        if failed:
            row["says"] += f". FAILED: {', '.join(failed)}: look there before the figures are used"
    made: dict[str, Any] = plain({"rows": rows, "sanity": lines})
    return made


def _row(found: Evaluation, engine: str, first: str, eps: float) -> dict[str, Any]:
    """Return the figures of one engine at one budget."""
    norm = found.outcomes[0].row.norm
    by = {mode: by_mode(found, engine, eps, mode) for mode in MODES}
    all_of_it = worst(found, engine, eps)
    twin = by_mode(found, "twin", eps, TRANSFER) if "twin" in found.clean else None
    both = on_both(found, engine, eps)
    clean = found.clean[engine].said == found.label
    row: dict[str, Any] = {
        "engine": engine, "norm": norm, "eps": eps, "clean": share(clean),
        "twin": None if twin is None else share(~twin),
        **{mode: None if b is None else share(~b) for mode, b in by.items()},
        "worst_of": None if all_of_it is None else share(~all_of_it),
        "gap": None if both is None else _gap(*both), "gap_transfer": _gap(twin, by[TRANSFER]),
        "against": first if engine != first else None,
        "apart": None,
    }  # fmt: skip
    if engine != first:
        row["apart"] = _gap(worst(found, first, eps), all_of_it)
    return {**row, "says": says(row)}


def _gap(first: Bools | None, second: Bools | None) -> dict[str, float] | None:
    return None if first is None or second is None else gap(first, second)._asdict()


def says(row: Mapping[str, Any]) -> str:
    """Return what a row comes to: weaker, no weaker, or only looking stronger.

    Where no clip of n differs, fewer than 3 / n do, with 95 % confidence (the rule of three).
    """
    against = row["against"] or "the twin"
    held = row["apart"] if row["against"] else row["gap"]
    if held is None:
        return "nothing to compare with"
    interval = f"{held['points']:+.1f} points ({held['low']:+.1f} to {held['high']:+.1f})"
    if not any(held.values()):  # of no clip that differs, a bootstrap's interval has no width
        n = row["clean"]["n"]
        said = (
            f"none of {n} clips differs from {against}, which excludes a gap of "
            f"{300 / n:.1f} points or more"
        )
    elif held["low"] > 0:
        said = f"weaker than {against}: {interval}"
    elif held["high"] < 0:
        said = f"stronger than {against}: {interval}"
    else:
        said = f"no different from {against}: {interval}"
    shown = row["gap_transfer"]
    if shown is not None and shown["high"] < 0 <= held["high"]:
        said += f"; by transfer alone it looks {-shown['points']:.1f} points stronger than the twin"
    return said


class Line(NamedTuple):
    """One sanity line of an engine at a budget."""

    engine: str
    eps: float
    name: str
    verdict: str
    line: str


def sane(found: Evaluation, engine: str, eps: float) -> list[Line]:
    """Return whether the figures of an engine can be believed.

    Clean clips get the twin's routes and labels; few clips are broken by transfer
    and not by adaptive, or by query and not by adaptive; gradients in the loop are alive. Of
    saved clips only the first.
    """
    right = found.clean[engine].said == found.label
    lines = []

    def add(name: str, ok: bool | None, said: str) -> None:
        verdict = UNDECIDED if ok is None else OK if ok else FAILED
        lines.append(Line(engine, eps, name, verdict, said))

    if "twin" in found.clean:
        same = agreement(found, None, "twin", engine)
        for key, what in (("route", "routes"), ("said", "labels")):
            n = same[key]["n"]
            differ = n - same[key]["hits"]
            add(f"the twin's {what}", few((differ, n)), f"{differ} of {n} clean clips differ")
    if any(o.row.origin for o in found.outcomes):
        return lines  # saved clips, made against another engine perhaps: modes say nothing
    by = {mode: by_mode(found, engine, eps, mode) for mode in MODES}
    n = int(right.sum())
    transfer, adaptive, query = (by[mode] for mode in MODES)
    if transfer is not None and adaptive is not None:
        missed = _of(transfer & ~adaptive, right)
        add("adaptive against transfer", few((missed, n)),
            f"adaptive breaks {_of(adaptive, right)} of {n}, transfer {_of(transfer, right)}; "
            f"{missed} by transfer alone")  # fmt: skip
    if query is not None and adaptive is not None:
        over = _of(query & ~adaptive, right)
        add("query against adaptive", few((over, n)),
            f"query breaks {_of(query, right)} of {n}, adaptive {_of(adaptive, right)}; "
            f"{over} by query alone")  # fmt: skip
    asked = [o for o in of_model(found, engine) if o.row.mode == ADAPTIVE and o.row.eps == eps]
    if asked:
        met = np.any([o.dead > 0 for o in asked], axis=0)
        count = int(np.any([o.backwards > 0 for o in asked], axis=0).sum())
        add("gradients in the loop", few((int(met.sum()), count)),
            f"{int(met.sum())} of {count} clips met a dead gradient")  # fmt: skip
    return lines


def _of(clips: Bools, right: Bools) -> int:
    return int((clips & right).sum())
