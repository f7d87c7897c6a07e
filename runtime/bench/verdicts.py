"""What the numbers say in words, and what they cannot say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vmoe.runtime.engines import Times
from vmoe.settings import format_eps

from .accuracy import Accuracy, Robust
from .certificate import BOUND, Against, Certificate
from .statistics import LEAST, Drift, Ratio, Summary

if TYPE_CHECKING:
    from .record import Row, Streamed

# trtexec calls a GPU that does nothing else unstable above 2.5 %; a CPU has an operating system.
UNSTABLE_CV = 0.10
ENQUEUE_BOUND = 0.8  # of the GPU's time that the host spends giving it its work, as trtexec has it
SLOWER = 1.05  # the second half of a run over the first
CLOCK_FELL = 0.95
STOPPED = 0.01  # of the time of a run for which a container's quota stopped its threads
STOLEN = 0.02  # of the CPU time, given by a hypervisor to others
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
    if made.threads is None:
        return said
    return [replace(each, says=f"threads {made.threads}: {each.says}") for each in said]


def _sparsity(made: Certificate) -> Verdict:
    known = [(r.ratio, r) for r in made.routes if r.ratio is not None]
    if not known:
        return Verdict("uncertified", made.bundle, None, f"no certificate: {made.why}.")
    ratio, worst = max(known, key=lambda pair: pair[0].medians)
    above = (ratio.medians > BOUND, ratio.minima > BOUND)
    extra_ms = worst.latency_ms - (worst.alone_ms or 0.0)
    cost = f"route {worst.route} costs {_figures(ratio, worst.cpu)} of router alone + expert alone"
    if ratio.low is None:
        says = f"{cost}: fewer than {LEAST} calls of each prove nothing. Measure longer."
        return Verdict("unclear", made.bundle, None, says)
    if not any(above):
        if made.why is not None:
            return Verdict(
                "unclear", made.bundle, None, f"{cost}; at most {BOUND}, but {made.why}."
            )
        return Verdict("sparse", made.bundle, True, f"{cost}; at most {BOUND}.")
    if not all(above):
        says = f"{cost}: medians and minima disagree about {BOUND}. Measure longer, or alone."
        return Verdict("unclear", made.bundle, None, says)
    if ratio.low <= BOUND:
        says = f"{cost}: that may be noise, of {BOUND} or less. Measure longer, or alone."
        return Verdict("unclear", made.bundle, None, says)
    if worst.cpu is not None and worst.cpu.medians <= BOUND:
        says = f"{cost}: not by CPU time, so that others were running. Measure longer, or alone."
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
    short = min(rows.values(), key=lambda summary: summary.n, default=None)
    if short is not None and (wanted := _wanted(short)) is not None:
        says = f"{_highest(short)} of {short.n} calls is about their slowest: --iterations {wanted}"
        said.append(Verdict("few calls", None, None, says + " or more."))
    return said


def _highest(summary: Summary) -> str:
    return f"percentile {max(map(float, summary.percentiles)):g}"


def _wanted(summary: Summary) -> int | None:
    """Return how many samples the highest percentile takes; None where they are there."""
    high = max(map(float, summary.percentiles))
    if high == 100 or summary.n * (1 - high / 100) >= 1:
        return None
    return math.ceil(round(100 / (100 - high), 6))


def of_streams(rows: Mapping[str, tuple[Streamed, Summary]]) -> list[Verdict]:
    """Say which streams lost windows or frames, by what they are, and what too few windows say."""
    if not rows:
        return []
    said = []
    lost = {
        name: s.windows_dropped + s.windows_incomplete + s.frames_dropped
        for name, (s, _) in rows.items()
    }
    top = max(lost, key=lambda name: lost[name])
    counts, ages = rows[top]
    if lost[top]:
        says = (
            f"{sum(map(bool, lost.values()))} of {len(rows)} rows lost something (most: {top}, "
            f"{counts.windows_dropped} windows, {counts.windows_incomplete} that were incomplete, "
            f"{counts.frames_dropped} frames; {counts.windows} windows labelled): too slow for "
            "its cameras, or the machine was."
        )
        said.append(Verdict("dropped", None, False, says))
    else:
        n = sum(counts.windows for counts, _ in rows.values())
        said.append(Verdict("keeps up", None, True, f"none of {n} windows and no frame was lost."))
    counts, ages = min(rows.values(), key=lambda pair: pair[1].n)
    if (wanted := _wanted(ages)) is not None:
        seconds = math.ceil(counts.seconds * wanted / ages.n)
        says = f"{_highest(ages)} of {ages.n} windows is about the slowest: --duration {seconds}"
        said.append(Verdict("few windows", None, None, says + " or more."))
    return said


def of_device(rows: Mapping[str, Times]) -> list[Verdict]:
    """Say whose time on a GPU is not the GPU's own work, by what they are."""
    enqueue = {name: t.enqueue_ms / t.device_ms for name, t in rows.items() if t.device_ms > 0}
    copies = {
        name: (t.h2d_ms + t.d2h_ms) / t.device_ms for name, t in rows.items() if t.device_ms > 0
    }
    said = []
    for name, shares, bound, says in (
        ("enqueue-bound", enqueue, ENQUEUE_BOUND,
         "the host needs {} of the GPU's time to give it its work: use --cuda-graph or a larger "
         "--batch."),
        ("transfer-bound", copies, 1.0,
         "copies take {} of the GPU's own work: smaller clips, or a larger --batch, would help."),
    ):  # fmt: skip
        above = {row: share for row, share in shares.items() if share > bound}
        if above:
            top = max(above, key=lambda row: above[row])
            which = f"{len(above)} of {len(rows)} rows (most: {top}): "
            said.append(Verdict(name, None, False, which + says.format(f"{above[top]:.0%}")))
    return said


def of_watch(during: Mapping[str, Any], drift: Drift | None) -> list[Verdict]:
    """Say what happened to the machine while it was measured.

    Args:
        during: as watch.Watch has it.
        drift: how the halves of the run compare.
    """
    said = []
    evidence = _throttling(during)
    slower = drift is not None and drift.sure and drift.ratio > SLOWER
    trend = f"the second half of the run was {drift.ratio - 1:.0%} slower" if drift else ""
    if evidence:
        says = "; ".join([*evidence, *[trend] * slower])
        said.append(Verdict("throttled", None, False, f"{says}. Let it cool, or fix its clock."))
    elif slower and during["clock_mhz"] is None and during["gpu_clock_mhz"] is None:
        says = f"{trend} than the first, beyond noise, and no clock can be read here: throttled, "
        said.append(Verdict("throttled", None, False, says + "or others came. Measure again."))
    elif slower:
        says = f"{trend} than the first, beyond noise, though the clock held: others came."
        said.append(Verdict("drifting", None, False, f"{says} Measure again."))
    stolen = during["steal_share"]
    if stolen is not None and stolen > STOLEN:
        says = f"the hypervisor gave {stolen:.0%} of this machine's CPU time to others."
        said.append(Verdict("stolen", None, False, f"{says} Trust minima and ratios."))
    return said


def _throttling(during: Mapping[str, Any]) -> list[str]:
    """Return what shows that the machine was held back, each as a part of a sentence."""
    found = []
    for key, what in (("clock_mhz", "the CPU's clock"), ("gpu_clock_mhz", "the GPU's clock")):
        clock = during[key]
        if clock is not None and clock["second_half"] < CLOCK_FELL * clock["first_half"]:
            found.append(
                f"{what} fell from {clock['first_half']:.0f} to {clock['second_half']:.0f} MHz"
            )
    if during["throttles"]:
        found.append(f"heat lowered a clock {during['throttles']} times")
    if (during["quota_stopped_s"] or 0.0) > STOPPED * during["seconds"]:
        stopped_s = during["quota_stopped_s"]
        found.append(f"the container's CPU quota stopped its threads for {stopped_s:.1f} s")
    return found


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
    quota = context["quota_cores"]
    if quota is not None and quota < cores:
        says = f"a container may use {quota:g} of {cores} cores: threads beyond them are stopped."
        said.append(Verdict("quota", None, None, says))
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
