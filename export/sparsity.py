"""Sparsity: does a routed clip cost the router and one expert, and no more? Measured.

The certificate is runtime's own (bench/certificate.py), over few rounds: a bundle that runs every
expert costs M times as much, whenever it is measured. Other processes only add to a time, so that
the least of each form counts; while a route seems to cost more than the bound, more rounds are
measured, and all count together: they bring a form nearer to what it takes, and excuse nothing.
What the host's own calls may take is allowed, but never as much as a second expert would cost.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from vmoe.errors import SettingError
from vmoe.runtime.bench import certificate, forms, measuring, subjects
from vmoe.runtime.bench.certificate import BOUND, Route
from vmoe.runtime.bench.measuring import Plan, Samples
from vmoe.runtime.bench.verdicts import HOST_MS

from .gates import Gate, GateSettings

ROUNDS = 12
ATTEMPTS = 4
LASTS_S = 0.5  # at least, all forms together
HOST_SHARE = 0.5  # of router + expert, at most, that the host may take; with BOUND, below 2


def judge(
    folder: Path,
    lowering: str,
    backend: str,
    device: str,
    write_split: Callable[[Path], object],
    settings: GateSettings,
    seed: int,
) -> tuple[Gate | None, dict[str, Any]]:
    """Certify a bundle of several experts.

    Args:
        folder: the bundle.
        lowering: its own; where it is not `split`, its parts alone come from a split bundle.
        backend: what runs it.
        device: where.
        write_split: writes that split bundle into a folder.
        settings: the bound.
        seed: of the clips and of the order within a round.

    Returns:
        The gate, None where it is only judged on the user's word; and what report.json has of it.
    """
    why = _unjudged(lowering, backend)
    if why and settings.gate_sparsity is None:
        return None, {"sparsity": f"not judged: {why}"}
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        paths = [folder]
        if lowering != "split":
            paths.append(Path(temporary) / "split")
            paths[1].mkdir()
            write_split(paths[1])
        opened = subjects.open_all(
            stack, paths, [], backend=backend, device=device, threads=1, batch=1, seed=seed
        )
        bound = BOUND if settings.gate_sparsity is None else settings.gate_sparsity
        measured: dict[tuple[str, str], Samples] = {}
        for attempt in range(ATTEMPTS):
            _measure(opened, measured, seed + attempt)
            routes = _certify(opened, measured).routes
            worst = max(map(_ratio, routes))
            if worst <= bound:
                break
    gate = Gate("sparsity", "a routed clip over router + expert alone", worst, bound)
    said = [dataclasses.asdict(route) for route in routes]
    return gate, {"sparsity": {"threads": 1, "host_ms": HOST_MS, "host_share": HOST_SHARE,
                                "routes": said}}  # fmt: skip


def _unjudged(lowering: str, backend: str) -> str | None:
    """Return why a lowering is not judged unless --gate-sparsity asks for it."""
    if lowering == "dense":
        return "every expert of the lowering dense runs"
    if lowering == "plugin" and backend == "tensorrt":
        return "routed layers run our kernels: beside TensorRT's own they cost more on any route"
    return None


def _measure(
    opened: list[subjects.Subject], measured: dict[tuple[str, str], Samples], seed: int
) -> None:
    """Add samples of every route of the first bundle and, alone, of the parts of the last."""
    calls = []
    for i, subject in enumerate(opened):
        parts = (forms.ROUTER, forms.EXPERT)
        every = [form for form in forms.of(subject, "all") if form.name != forms.ALL]
        calls += [form for form in every if i == 0 or form.name.startswith(parts)]
    samples = measuring.interleave(
        [form.call for form in calls], Plan(ROUNDS, duration_s=LASTS_S, seed=seed)
    )
    for form, taken in zip(calls, samples, strict=True):
        name = form.subject, form.name
        before = measured.get(name, Samples(np.empty(0), np.empty(0)))
        measured[name] = Samples(*map(np.concatenate, zip(before, taken, strict=True)))


def _certify(
    opened: list[subjects.Subject], measured: certificate.Measured
) -> certificate.Certificate:
    """Certify the first bundle by the parts of the last."""
    entries = [
        dataclasses.replace(certificate.entry(s.name, s.bundle), precision="as asked")
        for s in opened
    ]
    found = certificate.certify(entries[0], entries, measured)
    if found.why is not None:
        raise SettingError(f"the sparsity gate cannot be judged: {found.why}.")
    return found


def _ratio(route: Route) -> float:
    """Return what a route costs at least, over its parts alone at least.

    On the clock or in CPU time, whichever is less: of the two, one may count what is not ours
    (others' turns on the core, or threads that spin). Less what the host's own calls may take,
    which matters to toy models only.
    """
    host = min(HOST_SHARE, HOST_MS / (route.alone_ms or HOST_MS))
    return min(r.minima for r in (route.ratio, route.cpu) if r is not None) - host
