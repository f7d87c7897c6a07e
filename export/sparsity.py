"""Sparsity: does a routed clip cost the router and one expert, and no more? Measured.

The certificate is runtime's own (bench/certificate.py), over few rounds: a bundle that runs every
expert costs M times as much, whenever it is measured. One that seems to cost more than the bound
is measured again, since other processes can stretch a route, and of a route the smallest ratio
counts.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vmoe.errors import SettingError
from vmoe.runtime.bench import certificate, forms, measuring, subjects
from vmoe.runtime.bench.certificate import BOUND, Route
from vmoe.runtime.bench.measuring import Plan
from vmoe.runtime.bench.verdicts import HOST_MS

from .gates import Gate, GateSettings

ROUNDS = 12
ATTEMPTS = 4
LASTS_S = 0.5  # at least, all forms together


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
        The gate, None where `dense` is not to be judged; and what report.json has of it.
    """
    if lowering == "dense" and settings.gate_sparsity is None:
        return None, {"sparsity": "not judged: every expert of the lowering dense runs"}
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
        routes: list[Route] = []
        for attempt in range(ATTEMPTS):
            found = _certify(opened, seed + attempt).routes
            routes = [min(pair, key=_kindest) for pair in zip(routes or found, found, strict=True)]
            worst = max(map(_kindest, routes))
            if worst <= bound:
                break
    gate = Gate("sparsity", "a routed clip over router + expert alone", worst, bound)
    said = [dataclasses.asdict(route) for route in routes]
    return gate, {"sparsity": {"threads": 1, "host_ms": HOST_MS, "routes": said}}


def _certify(opened: list[subjects.Subject], seed: int) -> certificate.Certificate:
    """Measure every route of the first bundle and, alone, the parts of the last."""
    calls = []
    for i, subject in enumerate(opened):
        parts = (forms.ROUTER, forms.EXPERT)
        every = [form for form in forms.of(subject, "all") if form.name != forms.ALL]
        calls += [form for form in every if i == 0 or form.name.startswith(parts)]
    samples = measuring.interleave(
        [form.call for form in calls], Plan(ROUNDS, duration_s=LASTS_S, seed=seed)
    )
    measured = {
        (form.subject, form.name): taken for form, taken in zip(calls, samples, strict=True)
    }
    entries = [
        dataclasses.replace(certificate.entry(s.name, s.bundle), precision="as asked")
        for s in opened
    ]
    found = certificate.certify(entries[0], entries, measured)
    if found.why is not None:
        raise SettingError(f"the sparsity gate cannot be judged: {found.why}.")
    return found


def _kindest(route: Route) -> float:
    """Return the smallest of a route's ratios: noise of the machine must not refuse a bundle.

    Less what the host's own calls may take, which matters to toy models only.
    """
    ratios = [r for r in (route.ratio, route.cpu) if r is not None]
    return min(min(r.medians, r.minima) for r in ratios) - HOST_MS / (route.alone_ms or HOST_MS)
