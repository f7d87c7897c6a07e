"""What an evaluation says in figures: one mapping for each row and model, ready for JSON.

A share is {"hits", "n", "share", "low", "high"}: n is small, so that its 95 % interval (Wilson)
stands beside it everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vmoe.attacks.evaluate import Evaluation, Outcome
from vmoe.attacks.grid import radius
from vmoe.attacks.judge import Bools, Floats, Ints
from vmoe.report import plain, wilson

DRAWS = 10_000  # of a bootstrap


def share(hits: Bools, among: Bools | None = None) -> dict[str, Any]:
    """Return a share with its 95 % interval.

    Args:
        hits: [N].
        among: which of the N count; None is all.
    """
    counted = hits if among is None else hits[among]
    low, high = wilson(int(counted.sum()), len(counted))
    value = float(counted.mean()) if len(counted) else None
    return {"hits": int(counted.sum()), "n": len(counted), "share": value, "low": low, "high": high}


def broken(found: Evaluation, outcome: Outcome, model: str) -> Bools:
    """Return which clips a model gets wrong under an attack, [N]: adversarial, or clean already."""
    wrong = outcome.seen[model].seen.said != found.label
    either: Bools = wrong | (found.clean[model].said != found.label)
    return either


def of_model(found: Evaluation, model: str) -> list[Outcome]:
    """Return what counts for a model: clips of the twin, and those made against the model itself.

    So its figures do not hang on which other engines are attacked beside it.
    """
    return [o for o in found.outcomes if model in o.seen and o.row.against in ("", model)]


def figures(found: Evaluation, outcome: Outcome, model: str) -> dict[str, Any]:
    """Return the figures of one attack on one model.

    `success` is by the attack's own criterion: of an attack on the whole model, the clips broken
    among those that were right; of one that sends clips to an expert, among those that go
    elsewhere; of any other on the router or an expert, among all.
    """
    clean, attacked = found.clean[model], outcome.seen[model]
    seen, right = attacked.seen, found.clean[model].said == found.label
    among = right if outcome.row.part == "model" else None
    if outcome.row.part == "router" and outcome.row.expert is not None:
        among = clean.route != outcome.row.expert
    return {
        "attack": outcome.row.attack,
        "part": outcome.row.part,
        "mode": outcome.row.mode,
        "made_on": outcome.row.made_on,
        "norm": outcome.row.norm,
        "eps": outcome.row.eps,
        "model": model,
        "clean": share(right),
        "robust": share(~broken(found, outcome, model)),
        "success": share(attacked.success, among),
        "flips": share(seen.route != clean.route),
        "weakest": share((seen.route == clean.weakest) & (seen.route != clean.route)),
        "route_kept": share(right & (attacked.kept == found.label)),
        "gap_clean": _mean(clean.gap),
        "gap_adversarial": _mean(seen.gap),
        "l_lip_router": _mean(attacked.l_lip_router),
        "l_lip_model": _mean(attacked.l_lip_model),
        "linf": outcome.linf,
        "l2": outcome.l2,
        "radius": radius(outcome.row.eps) if outcome.row.norm == "linf" else None,
        **_cost([outcome]),
    }


def worst_of(found: Evaluation, eps: float, model: str) -> dict[str, Any]:
    """Return the figures of all that counts for a model at one budget: broken by at least one."""
    at = [outcome for outcome in of_model(found, model) if outcome.row.eps == eps]
    any_broken = np.any([broken(found, outcome, model) for outcome in at], axis=0)
    clean = found.clean[model]
    any_flip = np.any([o.seen[model].seen.route != clean.route for o in at], axis=0)
    return {
        "attack": "worst-of",
        "norm": at[0].row.norm,
        "eps": eps,
        "model": model,
        "clean": share(clean.said == found.label),
        "robust": share(~any_broken),
        "success": share(any_broken, clean.said == found.label),
        "flips": share(any_flip),
        "linf": max(outcome.linf for outcome in at),
        "l2": max(outcome.l2 for outcome in at),
        "radius": radius(eps) if at[0].row.norm == "linf" else None,
        **_cost(at),
    }


def _cost(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return what attacks cost: passes of a clip on the average and of all clips, and seconds."""
    passes = {
        name: np.sum([getattr(o, name) for o in outcomes], axis=0)
        for name in ("forwards", "backwards", "dead")
    }
    return {
        **{name: _mean(each) for name, each in passes.items()},
        **{f"{name}_total": int(each.sum()) for name, each in passes.items()},
        "queries": sum(o.asked for o in outcomes) / len(outcomes[0].forwards),
        "seconds": sum(outcome.seconds for outcome in outcomes),
    }


class Gap(NamedTuple):
    """By how much fewer clips withstand on one model than on another, in points, and its interval.

    Above 0, the second is weaker.
    """

    points: float
    low: float
    high: float


def gap(first: Bools, second: Bools, seed: int = 0) -> Gap:
    """Return robust accuracy on a first model less that on a second, by the same clips.

    Args:
        first: which clips are broken on the first, [N].
        second: on the second, [N].
        seed: of the bootstrap.
    """
    n = len(first)
    worse, better = int((second & ~first).sum()), int((first & ~second).sum())
    shares = np.array([worse, better, n - worse - better]) / n
    drawn = np.random.default_rng(seed).multinomial(n, shares, DRAWS)
    low, high = np.percentile((drawn[:, 0] - drawn[:, 1]) / n, [2.5, 97.5])
    return Gap(100 * (worse - better) / n, 100 * float(low), 100 * float(high))


def agreement(found: Evaluation, outcome: Outcome | None, a: str, b: str) -> dict[str, Any]:
    """Return how far twin and engine agree, clip by clip.

    Args:
        found: the evaluation.
        outcome: one of its attacks; None is the clean clips.
        a: the twin's name.
        b: an engine's.

    Returns:
        Shares of the same `route` and the same label (`said`); of an attack also which clips are
        broken on both, only on one, or on neither.
    """
    if outcome is None:
        seen_a, seen_b = found.clean[a], found.clean[b]
    else:
        seen_a, seen_b = outcome.seen[a].seen, outcome.seen[b].seen
    same = {
        "route": share(seen_a.route == seen_b.route),
        "said": share(seen_a.said == seen_b.said),
    }
    if outcome is None:
        return {"attack": "clean", "engine": b, "norm": "linf", "eps": 0.0, **same}
    broken_a, broken_b = broken(found, outcome, a), broken(found, outcome, b)
    return {
        "attack": outcome.row.attack,
        "engine": b,
        "mode": outcome.row.mode,
        "norm": outcome.row.norm,
        "eps": outcome.row.eps,
        **same,
        "gap": gap(broken_a, broken_b)._asdict(),
        "both_broken": int((broken_a & broken_b).sum()),
        "only_twin": int((broken_a & ~broken_b).sum()),
        "only_engine": int((~broken_a & broken_b).sum()),
        "neither": int((~broken_a & ~broken_b).sum()),
    }


def budgets(found: Evaluation) -> list[float]:
    """Return the budgets of an evaluation, in their order."""
    return list(dict.fromkeys(outcome.row.eps for outcome in found.outcomes))


def telling(found: Evaluation) -> float:
    """Return the budget whose worst-of, on the first model, is nearest to half of clean.

    Where nearly all or nearly no clips are broken, checks of the attacks have little to see.
    """
    model = next(name for name in found.clean if of_model(found, name))

    def off(eps: float) -> float:
        row = worst_of(found, eps, model)
        return float(abs(row["robust"]["hits"] - row["clean"]["hits"] / 2))

    return min(budgets(found), key=off)


def everything(found: Evaluation, index: Sequence[int]) -> dict[str, Any]:
    """Return all figures and the values of each clip, as JSON holds them."""
    models = list(found.clean)
    engines = [model for model in models if model != "twin"] if "twin" in models else []
    report = {
        "rows": [figures(found, o, model) for o in found.outcomes for model in o.seen],
        "worst_of": [
            worst_of(found, eps, model)
            for eps in budgets(found)
            for model in models
            if any(o.row.eps == eps for o in of_model(found, model))
        ],
        "agreement": [
            agreement(found, outcome, "twin", engine)
            for engine in engines
            for outcome in (None, *found.outcomes)
            if outcome is None or engine in outcome.seen
        ],
        "clips": {
            "index": index,
            "label": found.label,
            "clean": {name: seen._asdict() for name, seen in found.clean.items()},
            "attacked": [_each(outcome) for outcome in found.outcomes],
        },
    }
    kept: dict[str, Any] = plain(report)
    return kept


def _each(outcome: Outcome) -> dict[str, Any]:
    """Return the values of each clip under one attack."""
    return {
        "attack": outcome.row.attack,
        "mode": outcome.row.mode,
        "made_on": outcome.row.made_on,
        "eps": outcome.row.eps,
        **{
            model: {**attacked.seen._asdict(), "success": attacked.success, "kept": attacked.kept}
            for model, attacked in outcome.seen.items()
        },
    }


def _mean(values: Floats | Ints) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None
