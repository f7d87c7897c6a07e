"""The fourteen checks that `sanity` makes, one function each, numbered as they are printed.

Source: they are those of Carlini et al., "On evaluating adversarial robustness", 2019, and of
AutoAttack (Croce and Hein, ICML 2020); those on routes and on what was deployed are ours.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn

from vmoe.attacks import figures, grid
from vmoe.attacks.judge import Bools, Floats, Ints, Judge
from vmoe.attacks.outcomes import Evaluation
from vmoe.attacks.trials import ENOUGH, Trial, Trials, few
from vmoe.models import ROUTE_GRADS, VideoMoE
from vmoe.settings import format_eps

STEPS = 10  # of the attack that is checked; some checks take a multiple of them
RESTARTS = 3
QUERIES = 200
DRAWS = 10


@dataclass(frozen=True)
class Case:
    """What checks are made of.

    Attributes:
        trials: runs attacks on the clips.
        eps: budget, on pixels in [0, 1].
        found: the evaluation whose figures are reported; None where there is none. These clips
            are the first of it, and the twin is the first of its models.
        judges: other models that judge, by name.
        other: a second model of the same task, for transfer; None where there is none.
        right: which clean clips the twin labels rightly, [N].
        route: of the clean clips, [N].
        logits: of them, [N, K].
        scores: of them, [N, M].
    """

    trials: Trials
    eps: float
    found: Evaluation | None
    judges: Mapping[str, Judge]
    other: VideoMoE | None
    right: Bools
    route: Ints
    logits: Floats
    scores: Floats

    @property
    def n(self) -> int:
        """How many clips are right before any attack."""
        return int(self.right.sum())

    def pgd(self, eps: float | None = None, **values: object) -> Trial:
        """Run PGD, the attack that is checked, or a variant of it."""
        how = {"steps": STEPS, "route_grad": "straight-through", **values}
        return self.trials.run("pgd", self.eps if eps is None else eps, **how)

    def white(self) -> Bools:
        """Return what PGD breaks with any route_grad, [N]: the worst per sample."""
        runs = [self.pgd(route_grad=way).broken for way in self.ways]
        return np.asarray(np.any(runs, axis=0))

    def noise(self) -> Trial:
        """Run random noise, the best of DRAWS."""
        return self.trials.run("noise", self.eps, restarts=DRAWS)

    def square(self) -> Trial:
        """Run Square, which needs no gradient."""
        return self.trials.run("square", self.eps, queries=QUERIES)

    @property
    def ways(self) -> tuple[str, ...]:
        """The route_grads that differ: all of them; of a dense model, one."""
        return ROUTE_GRADS if self.trials.twin.router is not None else ("straight-through",)

    def of(self, broken: Bools) -> int:
        """Count clips that were right, and are broken."""
        return int((broken & self.right).sum())


@dataclass(frozen=True)
class Seen:
    """What a check saw: whether it passes (None: it cannot tell), a sentence, figures."""

    ok: bool | None
    line: str
    measured: dict[str, float] = field(default_factory=dict)


def _weaker(case: Case, name: str, weak: Bools, against: str, strong: Bools) -> Seen:
    """See whether an attack that ought to be weaker breaks what the stronger one does not."""
    alone = case.of(weak & ~strong)
    counts = {name: case.of(weak), against: case.of(strong), "alone": alone, "of": case.n}
    line = (
        f"{name} breaks {counts[name]} of {case.n}, {against} {counts[against]}; "
        f"{alone} by {name} alone"
    )
    return Seen(few((alone, case.n)), line, {k: float(v) for k, v in counts.items()})


def iterative(case: Case) -> Seen:
    """(1) One step breaks no more than many."""
    one = case.trials.run("fgsm", case.eps, route_grad="straight-through")
    return _weaker(case, "fgsm", one.broken, f"pgd-{STEPS}", case.pgd().broken)


def doubled(case: Case) -> Seen:
    """(2) Twice the steps break little more: the attack has converged."""
    twice = case.pgd(steps=2 * STEPS).broken
    return _weaker(case, f"pgd-{2 * STEPS}", twice, f"pgd-{STEPS}", case.pgd().broken)


def unbounded(case: Case) -> Seen:
    """(3) A larger budget breaks no less, and one that reaches grey breaks (nearly) all."""
    most = 128 / 255
    if case.trials.norm == "l2":
        most *= float(np.sqrt(case.trials.clips[0].size))
    budgets = sorted({case.eps / 2, case.eps, min(2 * case.eps, most), max(most, case.eps)})
    broken = [case.pgd(eps).broken for eps in budgets]
    lost = [case.of(low & ~high) for low, high in itertools.pairwise(broken)]
    standing = case.n - case.of(broken[-1])
    shown = ", ".join(
        f"{case.of(b)} at {format_eps(e, case.trials.norm)}"
        for b, e in zip(broken, budgets, strict=True)
    )
    return Seen(
        few(*((each, case.n) for each in (standing, *lost))),
        f"broken of {case.n}: {shown}",
        {
            **{f"eps {e:.4f}": float(case.of(b)) for b, e in zip(broken, budgets, strict=True)},
            "of": float(case.n),
        },
    )


def noise(case: Case) -> Seen:
    """(4) Random noise breaks no more than the attack."""
    draws = case.noise()
    if not draws.size.any():
        return Seen(None, "of noise within this budget the uint8 grid leaves nothing")
    return _weaker(case, "noise", draws.broken, "pgd, any route_grad", case.white())


def black_box(case: Case) -> Seen:
    """(5) An attack without gradients breaks no more than one with them."""
    return _weaker(case, "square", case.square().broken, "pgd, any route_grad", case.white())


def transfer(case: Case) -> Seen:
    """(6) Clips made on another model break no more than those made on this one.

    Where no other model is given, an expert stands in that the clip is not routed to: the one
    that most clips are routed to, for its own clips the second.
    """
    twin, broken = case.trials.twin, np.zeros(len(case.right), bool)
    if case.other is not None:
        everyone = np.arange(len(broken))
        how = {"steps": STEPS, "early_stop": False}
        broken = case.trials.transfer(case.other, "pgd", case.eps, everyone, **how).broken
        return _weaker(case, "transfer", broken, "pgd, any route_grad", case.white())
    if twin.router is None:
        return Seen(None, "a dense model has no second expert, and no other model was given")
    order = np.argsort(-np.bincount(case.route, minlength=len(twin.experts)), kind="stable")
    stands_in = np.where(case.route == order[0], order[1], order[0])
    for expert in order[:2].tolist():
        at = np.flatnonzero(stands_in == expert)
        if len(at):
            alone = _dense(twin, expert)
            how = {"steps": STEPS, "early_stop": False}
            broken[at] = case.trials.transfer(alone, "pgd", case.eps, at, **how).broken
    name = "transfer from another expert"
    return _weaker(case, name, broken, "pgd, any route_grad", case.white())


def _dense(twin: VideoMoE, expert: int) -> VideoMoE:
    """Return one expert as a model of its own; it shares the twin's weights."""
    settings = replace(twin.settings, experts=1)
    with torch.device("meta"):
        alone = VideoMoE(settings, twin.spec)
    alone.experts = nn.ModuleList([twin.experts[expert]])
    return alone


def restarted(case: Case) -> Seen:
    """(7) More starts break little more."""
    more = case.pgd(restarts=RESTARTS).broken
    return _weaker(case, f"pgd of {RESTARTS} starts", more, "of one", case.pgd().broken)


def gradients(case: Case) -> Seen:
    """(8) Gradients are neither zero nor NaN, also where they pass the router."""
    runs = {f"pgd {way}": case.pgd(route_grad=way) for way in case.ways}
    if case.trials.twin.router is not None:
        runs["pgd-r"] = case.trials.run("pgd-r", case.eps, steps=STEPS)
    dead = {name: int(run.dead.sum()) for name, run in runs.items()}
    asked = {name: int((run.backwards > 0).sum()) for name, run in runs.items()}
    shown = ", ".join(f"{name} {dead[name]} of {asked[name]}" for name in runs)
    return Seen(
        few(*((dead[name], asked[name]) for name in runs)),
        f"clips that met a dead gradient: {shown}",
        {name: float(count) for name, count in dead.items()},
    )


def logits(case: Case) -> Seen:
    """(9) What is attacked are logits, not probabilities, of which losses saturate."""

    def probable(values: Floats) -> bool:
        sums = np.abs(values.sum(axis=1) - 1)
        return bool(values.shape[1] > 1 and (values >= 0).all() and sums.max() < 1e-3)

    parts = {"logits": case.logits, "scores": case.scores}
    found = [name for name, values in parts.items() if probable(values)]
    largest = float(np.abs(case.logits).max())
    if found:
        return Seen(False, f"{' and '.join(found)} are probabilities", {"largest": largest})
    return Seen(True, f"logits reach {largest:.3g} in size", {"largest": largest})


def determined(case: Case) -> Seen:
    """(10) The same clips get the same answer twice."""
    again, scores, route = case.trials.answer(case.trials.own, case.trials.clips)
    apart = max(_apart(again, case.logits), _apart(scores, case.scores))
    flips = int((again.argmax(axis=1) != case.logits.argmax(axis=1)).sum())
    flips += int((route != case.route).sum())
    line = f"asked twice, answers differ by {apart:.2g} at most, {flips} labels or routes"
    return Seen(apart < 1e-3 and not flips, line, {"apart": apart, "flips": float(flips)})


def _apart(a: Floats, b: Floats) -> float:
    return float((np.abs(a - b) / (1 + np.abs(b))).max(initial=0))


def constrained(case: Case) -> Seen:
    """(11) What was saved, as uint8, lies within the budget."""
    norm, trial = case.trials.norm, case.pgd()
    sizes = [(float(trial.size.max()), case.eps, norm)]
    for outcome in case.found.outcomes if case.found else ():
        row = outcome.row
        sizes.append((outcome.l2 if row.norm == "l2" else outcome.linf, row.eps, row.norm))
    far = [(s, eps) for s, eps, by in sizes if s > _reach(eps, by)]
    unit = {"linf": "grey levels", "l2": "on pixels in [0, 1]"}[norm]
    line = f"the largest change of {len(sizes)} rows is {max(s for s, *_ in sizes):g} ({unit})"
    if far:
        line = f"{len(far)} of {len(sizes)} rows are out of their budget: {far[0][0]:g} ({unit})"
        line += f" at {format_eps(far[0][1], norm)}"
    return Seen(not far, line, {"largest": max(s for s, *_ in sizes), "out": float(len(far))})


def _reach(eps: float, norm: str) -> float:
    return grid.radius(eps) if norm == "linf" else eps * (1 + 1e-6)


def clean(case: Case) -> Seen:
    """(12) The clean accuracy stands beside, is above chance, and no robust figure is above it."""
    k, n = case.logits.shape[1], len(case.right)
    line = f"{case.n} of {n} clean clips are right, chance is 1 of {k}"
    chance = n / k + 1.645 * np.sqrt(n / k * (1 - 1 / k))
    odd = 0
    if case.found is not None:
        for outcome in case.found.outcomes:
            if outcome.row.part != "model":
                continue
            model = outcome.row.against or next(iter(case.found.clean))
            wrong = case.found.clean[model].said != case.found.label
            odd += int((wrong & ~outcome.seen[model].success).sum())
        line += f"; {odd} clips count as robust that are wrong when clean"
    counts = {"clean": float(case.n), "of": float(n), "wrong yet robust": float(odd)}
    ok = True if case.n > chance else False if n >= ENOUGH else None
    return Seen(False if odd else ok, line, counts)


def routed(case: Case) -> Seen:
    """(13) With every route_grad, and as noise and Square, these checks break what is reported."""
    ways = {way: case.of(case.pgd(route_grad=way).broken) for way in case.ways}
    worst = case.white() | case.noise().broken | case.square().broken
    counts = {**ways, "worst": case.of(worst), "of": case.n}
    line = ", ".join(f"{way} {count}" for way, count in ways.items())
    line = f"pgd breaks of {case.n}: {line}; with noise and square {counts['worst']}"
    ok: bool | None = True
    if case.found is not None:
        budget = format_eps(case.eps, case.trials.norm)
        reported = _reported(case, case.found)
        if reported is None:
            return Seen(None, f"{line}; no attack on the whole model is reported at {budget}")
        missed = case.of(worst & ~reported)
        counts |= {"reported": case.of(reported), "missed": missed}
        line += f", the report {counts['reported']}; {missed} not by the report"
        ok = few((missed, case.n))
        if ok and (lacking := _lacking(case, case.found)):
            ok, line = None, f"{line}; without some route_grad: {', '.join(lacking)}"
    return Seen(ok, line, {name: float(count) for name, count in counts.items()})


def _reported(case: Case, found: Evaluation) -> Bools | None:
    """Return what the report has the twin broken on at the budget, [N]; None: not attacked."""
    twin, budget = next(iter(found.clean)), (case.eps, case.trials.norm)
    at = [o for o in figures.of_model(found, twin) if (o.row.eps, o.row.norm) == budget]
    if not any(outcome.row.part == "model" for outcome in at):
        return None
    broken = np.any([figures.broken(found, outcome, twin) for outcome in at], axis=0)
    return np.asarray(broken[: len(case.right)])


def _lacking(case: Case, found: Evaluation) -> list[str]:
    """Return the attacks that were reported without some route_grad; of a dense twin, none."""
    if len(case.ways) == 1:
        return []
    tried = {
        o.row.attack: {getattr(each, "route_grad", None) for each in o.row.settings} - {None}
        for o in found.outcomes
    }
    return sorted(name for name, ways in tried.items() if ways and ways != set(case.ways))


def replayed(case: Case) -> Seen:
    """(14) The same adversarial clips get the same labels in the twin and in what is deployed."""
    others = {name: judge for name, judge in case.judges.items() if name != "twin"}
    if not others:
        return Seen(None, "nothing deployed was given: no engine to replay the clips in")
    made = case.pgd().clips
    said = case.trials.answer(case.trials.own, made)[0].argmax(axis=1)
    apart = {}
    for name, judge in others.items():
        differ = case.trials.answer(judge, made)[0].argmax(axis=1) != said
        apart[name] = case.trials.index[differ].tolist()
    shown = "; ".join(
        f"{name} differs on {len(at)} of {len(made)}" + (f", clip {at[0]} first" if at else "")
        for name, at in apart.items()
    )
    ok = few(*((len(at), len(made)) for at in apart.values()))
    return Seen(ok, shown, {name: float(len(at)) for name, at in apart.items()})


CHECKS: tuple[tuple[str, Callable[[Case], Seen]], ...] = (
    ("iterative against single step", iterative),
    ("twice the steps", doubled),
    ("success grows with eps", unbounded),
    ("noise", noise),
    ("gradient-free", black_box),
    ("transfer", transfer),
    ("restarts", restarted),
    ("dead gradients", gradients),
    ("logits, not probabilities", logits),
    ("determinism", determined),
    ("budget of the uint8 clips", constrained),
    ("clean accuracy", clean),
    ("every route_grad, worst reported", routed),
    ("replay in what is deployed", replayed),
)
