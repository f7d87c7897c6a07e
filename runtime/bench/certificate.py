"""The sparsity certificate: does a routed clip cost the router and one expert, and no more?

For each forced route: its latency over (router alone + expert alone), and over the dense
counterpart in the same lowering. FLOPs promise the saving; this is whether it arrives.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vmoe.bundle import Bundle

from . import forms
from .measuring import Samples
from .scenarios import SINGLE
from .statistics import Ratio, Times, ratio

BOUND = 1.3  # above this, more runs than one expert
ON_CPU = 0.25  # of the time: with less CPU time, a device did the work
Measured = Mapping[tuple[str, str], Samples]  # by names of bundle and form


@dataclass(frozen=True)
class Entry:
    """What the certificate needs to know of one bundle.

    Attributes:
        name: as in `Measured`.
        path: its folder.
        lowering: how routing is expressed.
        experts: how many; 1 is a dense model.
        twin: sha256 of the twin; two bundles of one twin have the same experts.
        clip: frames, height and width.
        precision: found in its parts.
        baseline: given to be compared with.
        random: its weights are random, so that it serves latency only.
    """

    name: str
    path: Path
    lowering: str
    experts: int
    twin: str | None
    clip: tuple[int, ...]
    precision: str = "fp32"
    baseline: bool = False
    random: bool = False


@dataclass(frozen=True)
class Route:
    """One forced route, over router alone + expert alone.

    Attributes:
        route: the expert.
        latency_ms: median of a call.
        alone_ms: sum of the medians of router alone and expert alone.
        ratio: of the two, on the clock.
        cpu: the same of CPU time, which other processes do not stretch; None where the clock of
            CPU time is too coarse for the parts, or another device did the work.
    """

    route: int
    latency_ms: float
    alone_ms: float | None = None
    ratio: Ratio | None = None
    cpu: Ratio | None = None


@dataclass(frozen=True)
class Against:
    """Every route over one baseline, in the order of the routes.

    Attributes:
        baseline: its name.
        same_lowering: only then is the ratio a certificate.
        dense: the baseline is a dense model.
        random: the baseline's weights are random.
        ratios: one for each route.
        worst: the largest of them, by medians.
    """

    baseline: str
    same_lowering: bool
    dense: bool
    random: bool
    ratios: tuple[Ratio, ...]
    worst: Ratio


@dataclass(frozen=True)
class Certificate:
    """What one bundle's routes cost.

    Attributes:
        bundle: its name.
        parts_of: the split bundle that gave router alone and expert alone.
        why: what is missing: all ratios, and what to do, or those of some routes.
        routes: every route that was forced.
        worst: the route with the largest median latency.
        against: the baselines.
        scenario, batch, threads: of the rows that it is made of.
    """

    bundle: str
    parts_of: str | None
    why: str | None
    routes: tuple[Route, ...]
    worst: int | None
    against: tuple[Against, ...]
    scenario: str = SINGLE
    batch: int = 1
    threads: int | None = None


def entry(name: str, bundle: Bundle, *, baseline: bool = False) -> Entry:
    """Return what the certificate needs to know of a bundle."""
    return Entry(
        name=name,
        path=bundle.path,
        lowering=bundle.lowering,
        experts=bundle.experts,
        twin=bundle.twin.get("sha256"),
        clip=bundle.spec.shape[:3],
        precision=precision(bundle),
        baseline=baseline,
        random=bundle.extra.get("weights") == "random",
    )


def precision(bundle: Bundle) -> str:
    """Return the precisions that the parts were found in, as one text."""
    return "+".join(sorted({p.precision.get("found", "unknown") for p in bundle.parts.values()}))


def certify(of: Entry, entries: Sequence[Entry], measured: Measured) -> Certificate:
    """Certify one bundle of several experts.

    Args:
        of: the bundle.
        entries: all bundles of the run, baselines too.
        measured: samples of every form of the run, of the same rounds.
    """
    routes = [i for i in range(of.experts) if (of.name, forms.route(i)) in measured]
    parts = _parts(of, entries, measured)
    certified = tuple(_route(of, i, parts, measured) for i in routes)
    return Certificate(
        bundle=of.name,
        parts_of=parts,
        why=_why(of, certified, parts),
        routes=certified,
        worst=max(certified, key=lambda r: r.latency_ms).route if certified else None,
        against=tuple(
            _against(of, base, routes, measured)
            for base in entries
            if base.baseline
            and base.clip == of.clip
            and routes
            and (base.name, forms.FREE) in measured
        ),
    )


def _parts(of: Entry, entries: Sequence[Entry], measured: Measured) -> str | None:
    """Return the bundle whose parts alone are those of `of`: itself, or a split of its twin."""
    wanted = (of.twin, of.clip, of.precision)
    for other in [of, *entries]:
        same = of.twin is not None and (other.twin, other.clip, other.precision) == wanted
        if (same or other is of) and (other.name, forms.ROUTER) in measured:
            return other.name
    return None


def _why(of: Entry, routes: Sequence[Route], parts: str | None) -> str | None:
    if not routes:
        return "no route was forced: use --force-route all"
    if parts is None:
        return (
            f"a bundle in one file has no router alone and no expert alone: give a split bundle "
            f"of the same twin and precision too (vmoe-export CKPT --lowering split --out DIR; "
            f"vmoe-bench {shlex.quote(str(of.path))} DIR)"
        )
    known = {route.route for route in routes if route.ratio is not None}
    unknown = [str(i) for i in range(of.experts) if i not in known]
    if unknown:
        which = f"route{'s' * (len(unknown) > 1)} {', '.join(unknown)}"
        return f"{which} of {of.experts} could not be judged: not asked for, or failed"
    return None


def _route(of: Entry, index: int, parts: str | None, measured: Measured) -> Route:
    over = measured[of.name, forms.route(index)]
    latency_ms = _median(over.wall_ms)
    if parts is None or (parts, forms.expert(index)) not in measured:
        return Route(index, latency_ms)
    alone = [measured[parts, name] for name in (forms.ROUTER, forms.expert(index))]
    fine = all((samples.cpu_ms > 0).all() for samples in alone)
    fine = fine and _median(over.cpu_ms) > ON_CPU * over.wall_ms.min()
    return Route(
        route=index,
        latency_ms=latency_ms,
        alone_ms=sum(_median(samples.wall_ms) for samples in alone),
        ratio=ratio(over.wall_ms, *(samples.wall_ms for samples in alone)),
        cpu=ratio(over.cpu_ms, *(samples.cpu_ms for samples in alone)) if fine else None,
    )


def _against(of: Entry, base: Entry, routes: list[int], measured: Measured) -> Against:
    under = measured[base.name, forms.FREE].wall_ms
    ratios = tuple(ratio(measured[of.name, forms.route(i)].wall_ms, under) for i in routes)
    return Against(
        baseline=base.name,
        same_lowering=base.lowering == of.lowering,
        dense=base.experts == 1,
        random=base.random,
        ratios=ratios,
        worst=max(ratios, key=lambda r: r.medians),
    )


def _median(times: Times) -> float:
    return float(np.median(times))
