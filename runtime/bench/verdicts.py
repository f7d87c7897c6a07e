"""What the numbers say in words, and what they cannot say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vmoe.settings import format_eps

from .accuracy import Accuracy, Robust
from .certificate import BOUND, Against, Certificate
from .statistics import Ratio, Summary

if TYPE_CHECKING:
    from .record import Row

# trtexec calls a GPU that does nothing else unstable above 2.5 %; a CPU has an operating system.
UNSTABLE_CV = 0.10
HOST_MS = 0.1  # what the host's routing may cost beside the graphs; matters to toy models only


@dataclass(frozen=True)
class Verdict:
    """One thing that the numbers say.

    Attributes:
        name: `sparse`, `not sparse`, `unclear`, `uncertified`, `unstable`, `loaded` and so on.
        bundle: which one it is about; None for the whole run.
        good: whether it is good news; None for a remark.
        says: one line.
    """

    name: str
    bundle: str | None
    good: bool | None
    says: str


def of_certificate(made: Certificate) -> list[Verdict]:
    """Judge one bundle's certificate."""
    certifies = any(against.dense and against.same_lowering for against in made.against)
    said = [_sparsity(made)]
    for against in made.against:
        if not against.dense or against.same_lowering or not certifies:
            said.append(_against(made.bundle, against))
    return said


def _sparsity(made: Certificate) -> Verdict:
    known = [(r.ratio, r) for r in made.routes if r.ratio is not None]
    if not known:
        why = made.why or "a part alone could not be run"
        return Verdict("uncertified", made.bundle, None, f"no certificate: {why}.")
    ratio, worst = max(known, key=lambda pair: pair[0].medians)
    above = (ratio.medians > BOUND, ratio.minima > BOUND)
    extra_ms = worst.latency_ms - (worst.alone_ms or 0.0)
    cost = f"route {worst.route} costs {_figures(ratio, worst.cpu)} of router alone + expert alone"
    if not any(above):
        return Verdict("sparse", made.bundle, True, f"{cost}; at most {BOUND}.")
    if not all(above):
        says = f"{cost}: medians and minima disagree about {BOUND}. Measure longer, or alone."
        return Verdict("unclear", made.bundle, None, says)
    if extra_ms < HOST_MS:
        says = f"{cost}, but {extra_ms:.3f} ms may be the host's own: use a larger --batch."
        return Verdict("unclear", made.bundle, None, says)
    says = f"{cost}, above {BOUND}: more runs than the routed expert."
    return Verdict("not sparse", made.bundle, False, says)


def _against(bundle: str, against: Against) -> Verdict:
    kind = "dense counterpart" if against.dense else "baseline"
    says = f"the worst route costs {_figures(against.worst)} of {kind} {against.baseline}"
    if against.random:
        says += " (random weights: it serves latency only)"
    if against.dense and not against.same_lowering:
        says += ", which is lowered otherwise: that certifies nothing. Export it in this lowering."
        return Verdict("other lowering", bundle, None, says)
    return Verdict("against", bundle, against.worst.medians < 1, says + ".")


def of_rows(rows: Mapping[str, Summary]) -> list[Verdict]:
    """Say which calls vary too much, by what they are, and what too few of them say."""
    said = []
    restless = {name: s.cv for name, s in rows.items() if s.cv > UNSTABLE_CV}
    if restless:
        top = max(restless, key=lambda name: restless[name])
        says = (
            f"{len(restless)} of {len(rows)} rows vary by more than {UNSTABLE_CV:.0%} (most: "
            f"{top}, {restless[top]:.0%}): trust minima and ratios more than medians."
        )
        said.append(Verdict("unstable", None, False, says))
    n = min((summary.n for summary in rows.values()), default=0)
    high = max((float(p) for s in rows.values() for p in s.percentiles), default=0.0)
    if n and n * (1 - high / 100) < 1 and high < 100:
        wanted = math.ceil(round(100 / (100 - high), 6))
        says = f"percentile {high:g} of {n} calls is about their slowest: --iterations {wanted}"
        said.append(Verdict("few calls", None, None, says + " or more."))
    return said


def of_context(context: Mapping[str, Any]) -> list[Verdict]:
    """Say what of the machine makes its numbers doubtful."""
    said = []
    load, cores = context["load_1min"], context["cores"]
    if load is not None and load > 0.7 * cores:
        says = (
            f"load {load} on {cores} cores before the first call: others were running. "
            "Trust minima, CPU time and ratios."
        )
        said.append(Verdict("loaded", None, False, says))
    if context["governor"] not in (None, "performance"):
        says = f"the CPU's governor is {context['governor']}: its clock may change meanwhile."
        said.append(Verdict("governor", None, None, says))
    return said


def of_pieces(fixed: Mapping[str, int], batch: int) -> list[Verdict]:
    """Say which bundles run a batch in pieces: their parts were made for another, by name."""
    return [
        Verdict(
            "pieces",
            name,
            None,
            f"its parts were made for batch {size}; a call of {batch} clips runs them in pieces.",
        )
        for name, size in fixed.items()
        if size != batch
    ]


def of_accuracy(rows: Sequence[Row], random: Sequence[str]) -> list[Verdict]:
    """Say which accuracy stands beside the speed, what it is of, and what is missing of it."""
    known = {row.bundle: row.accuracy for row in rows if row.accuracy is not None}
    said = []
    if not any(found.clean or found.robust for found in known.values()):
        says = (
            "speed only: no accuracy stands beside it. Measure it: --accuracy DATA, and --robust "
            "DIR (vmoe-attack BUNDLE --save-adv DIR)"
        )
        said.append(Verdict("no accuracy", None, None, says))
    elif not any(found.robust for found in known.values()):
        says = "clean clips only. Measure it: vmoe-attack BUNDLE --save-adv DIR, then --robust DIR"
        said.append(Verdict("no robust accuracy", None, None, says))
    for name, found in known.items():
        if found.why is not None:
            said.append(Verdict("no accuracy", name, False, found.why))
        said += _replayed(name, found)
    return said + [
        Verdict("random weights", name, None, "its weights are random: it serves latency only.")
        for name in random
    ]


def _replayed(name: str, found: Accuracy) -> list[Verdict]:
    """Say what the adversarial clips are, once for all budgets that were made alike."""
    said: dict[tuple[str, tuple[str, ...]], list[Robust]] = {}
    for robust in found.robust:
        said.setdefault((robust.made, robust.attacks), []).append(robust)
    made = []
    for (how, attacks), budgets in said.items():
        eps = ", ".join(format_eps(each.eps, each.norm) for each in budgets)
        clips = f"{', '.join(attacks)} at eps {eps}, {how}: {budgets[0].right.n} clips, replayed"
        if budgets[0].own:
            made.append(Verdict("robust", name, None, f"{clips}."))
            continue
        says = f"{clips}; clips that were not made on its own twin prove less."
        made.append(Verdict("foreign clips", name, False, says))
    return made


def _figures(ratio: Ratio, cpu: Ratio | None = None) -> str:
    """Return a ratio as `1.03 (minima 1.01, CPU time 1.02, rounds 1.00-1.06)`."""
    on_cpu = "" if cpu is None else f", CPU time {cpu.medians:.2f}"
    rounds = "" if ratio.low is None else f", rounds {ratio.low:.2f}-{ratio.high:.2f}"
    return f"{ratio.medians:.2f} (minima {ratio.minima:.2f}{on_cpu}{rounds})"
