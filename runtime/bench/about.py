"""What a bundle of a run is, and where its clips were routed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from . import certificate
from .record import About
from .subjects import Subject, Wanted

ROUTED = 32  # clips that are routed freely, to be counted


def of(want: Wanted, opened: Sequence[Subject]) -> About:
    """Return what a bundle is, by its manifest and by the first of the engines that run it."""
    bundle = want.read()
    subject = next((subject for subject in opened if subject.name == want.name), None)
    return About(
        name=want.name,
        path=str(bundle.path),
        lowering=bundle.lowering,
        precision=certificate.precision(bundle),
        backend="" if subject is None else subject.engine.backend_name,
        experts=bundle.experts,
        clip=bundle.spec.shape,
        baseline=want.baseline,
        weights=str(bundle.extra.get("weights", "trained")),
        twin=bundle.twin.get("sha256"),
        routes=() if subject is None else _routes(subject),
    )


def fixed_batches(subjects: Sequence[Subject]) -> dict[str, int]:
    """Return the batches that bundles' parts were made for, by name; not those that are free."""
    fixed = {}
    for subject in subjects:
        shapes = [port.shape for part in subject.bundle.parts.values() for port in part.inputs]
        size = next((shape[0] for shape in shapes if len(shape) == 5), None)
        if size is not None:
            fixed[subject.name] = size
    return fixed


def _routes(subject: Subject) -> tuple[int, ...]:
    """Return how many of a bundle's clips each expert answers; nothing where it fails."""
    try:
        answered = [
            int(route)
            for clip in subject.clips[:ROUTED]
            for route in subject.engine.infer(clip[np.newaxis]).route
        ]
    except Exception:  # its rows say why
        return ()
    return tuple(int(n) for n in np.bincount(answered, minlength=subject.bundle.experts))
