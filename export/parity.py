"""Parity and routes: does a bundle answer as its twin does?

The twin is the reference. The engine answers every clip as it would in service, and once more
with its route forced, expert after expert: none goes unseen because the router never chose it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vmoe.batches import to_tensor
from vmoe.clips import Clips
from vmoe.models import VideoMoE
from vmoe.runtime import Engine, Prediction

from .gates import PARITY, SMALLEST, Gate, GateSettings

BATCH = 8  # clips that are answered at a time

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Reference:
    """What the twin says of the clips.

    Attributes:
        scores: [N, M].
        logits: of every expert, [N, M, K]; NaN where nobody asked.
        heard: which experts answered which clip, [N, M].
    """

    scores: Floats
    logits: Floats
    heard: NDArray[np.bool_]


@dataclass(frozen=True)
class Findings:
    """What a check measured.

    Attributes:
        gates: in the order of their flags.
        clips: how many.
        logits: max |d logits| of the clips as routed.
        scores: max |d scores|.
        mean: mean |d logits|, of the clips as routed and as forced.
        experts: max |d logits| of each expert, its route forced.
        agreement_pct: clips routed as the twin routes them, ties within the tolerance included.
        ties: how many clips were such ties.
        routed: how many clips each expert received.
        twin_said: index of the label that the twin gives each clip, [N].
        engine_said: the same of the engine.
        reference: what the twin said.
    """

    gates: tuple[Gate, ...]
    clips: int
    logits: float
    scores: float
    mean: float
    experts: tuple[float, ...]
    agreement_pct: float
    ties: int
    routed: tuple[int, ...]
    twin_said: Ints
    engine_said: Ints
    reference: Reference


def check(
    twin: VideoMoE,
    engine: Engine,
    clips: Clips,
    settings: GateSettings,
    precision: str = "fp32",
    router: str = "fp32",
    known: Reference | None = None,
) -> Findings:
    """Measure a loaded bundle against its twin.

    Args:
        twin: in eval mode.
        engine: the bundle, loaded.
        clips: uint8 [N, T, H, W, 3].
        settings: the bounds.
        precision: that was asked of the experts, for bounds that nobody named.
        router: the same of the router.
        known: what an earlier check heard from this twin on these clips, to spare the time.
    """
    experts = len(twin.experts)
    n, rows = len(clips), np.arange(len(clips))
    rounds = [(rows + start) % experts for start in range(0, experts, n)]  # none goes unforced
    free = infer(engine, clips)
    each = [free if experts == 1 else infer(engine, clips, forced) for forced in rounds]
    reference = _reference(twin, clips, free.route, *rounds, known=known)
    best = reference.scores.argmax(axis=1)
    scores = float(np.max([_largest(p.scores - reference.scores) for p in (free, *each)]))
    off_free = np.abs(free.logits - reference.logits[rows, free.route])
    off = np.concatenate([
        np.abs(answer.logits - reference.logits[rows, forced])
        for answer, forced in zip(each, rounds, strict=True)
    ])  # fmt: skip
    # However coarse the router may be: only where the fp32 router itself could turn is it a tie.
    agree, ties = _agreement(free, reference, PARITY["fp32"] * _scale(reference.scores))
    found = Findings(
        gates=(), clips=n, logits=_largest(off_free), scores=scores,
        mean=float(np.mean(np.concatenate([off_free, off]))),
        experts=tuple(_largest(off[np.concatenate(rounds) == i]) for i in range(experts)),
        agreement_pct=100 * agree / n, ties=ties,
        routed=tuple(int(count) for count in np.bincount(free.route, minlength=experts)),
        twin_said=reference.logits[rows, best].argmax(axis=1),
        engine_said=free.logits.argmax(axis=1), reference=reference,
    )  # fmt: skip
    return replace(found, gates=_gates(found, settings, precision, router))


def _gates(
    found: Findings, settings: GateSettings, precision: str, router: str
) -> tuple[Gate, ...]:
    """Judge what was measured; shares are of the twin's largest logit or score."""
    logits, scores = _scale(found.reference.logits), _scale(found.reference.scores)
    most, mean = settings.parity(precision)
    worst = float(np.max([found.logits, *found.experts]))  # NaN stays NaN
    agree = found.agreement_pct
    return (
        Gate("parity", "max |d logits|", worst, most * logits),
        Gate("parity", "max |d scores|", found.scores, settings.parity(router)[0] * scores),
        Gate("parity-mean", "mean |d logits|", found.mean, mean * logits),
        Gate("route", "route agreement", agree, settings.gate_route, " %", least=True),
    )


def infer(engine: Engine, clips: Clips, forced: Ints | None = None) -> Prediction:
    """Answer the clips in batches, the last of which is smaller where they do not divide."""
    found = [
        engine.infer(clips[at], None if forced is None else forced[at].tolist())
        for at in _batches(len(clips))
    ]
    return Prediction(*(np.concatenate(values) for values in zip(*found, strict=True)))


def twin_says(twin: VideoMoE, clips: Clips) -> Ints:
    """Return the index of the label that the twin gives each clip, [N]."""
    nobody: Ints = np.zeros((0, len(clips)), np.int64)
    reference = _reference(twin, clips, *nobody)
    best = reference.scores.argmax(axis=1)
    said: Ints = reference.logits[np.arange(len(clips)), best].argmax(axis=1)
    return said


def _reference(
    twin: VideoMoE, clips: Clips, *routes: Ints, known: Reference | None = None
) -> Reference:
    """Let the twin score the clips, and run the experts of its own routes and of these.

    Logits are compared expert for expert: where the routes differ, the route gate says so.
    What is known already is not asked again.
    """
    n, experts, classes = len(clips), len(twin.experts), twin.settings.classes
    heard = np.zeros((n, experts), bool)
    logits = np.full((n, experts, classes), np.nan, np.float32)
    scores = np.empty((n, experts), np.float32)
    if known is not None:
        heard, logits, scores = known.heard.copy(), known.logits.copy(), known.scores
    device = next(twin.parameters()).device
    with torch.no_grad():
        for at in _batches(n):
            clip = to_tensor(clips[at], device)
            if known is None:
                scores[at] = twin.scores(clip).cpu().numpy()
            asked = np.zeros(scores[at].shape, bool)
            rows = np.arange(len(asked))
            for route in (scores[at].argmax(axis=1), *(r[at] for r in routes)):
                asked[rows, route] = True
            asked &= ~heard[at]
            heard[at] |= asked
            for expert in np.flatnonzero(asked.any(axis=0)):
                which = np.flatnonzero(asked[:, expert])
                answer = twin.run_expert(int(expert), clip[torch.from_numpy(which).to(device)])
                logits[rows[which] + at.start, expert] = answer.cpu().numpy()
    return Reference(scores, logits, heard)


def _agreement(free: Prediction, reference: Reference, bound: float) -> tuple[int, int]:
    """Return how many clips are routed as the twin routes them, and how many of them are ties.

    A tie: the twin's own scores of both experts are so near each other that errors within the
    bound of fp32 turn the choice, whatever parity is asked of the router.
    """
    best = reference.scores.argmax(axis=1)
    rows = np.arange(len(best))
    gap = reference.scores[rows, best] - reference.scores[rows, free.route]
    tie = (free.route != best) & (gap <= 2 * bound)
    return int(((free.route == best) | tie).sum()), int(tie.sum())


def _batches(n: int) -> Iterator[slice]:
    for start in range(0, n, BATCH):
        yield slice(start, min(start + BATCH, n))


def _largest(values: Floats) -> float:
    return float(np.abs(values).max())


def _scale(values: Floats) -> float:
    return max(SMALLEST, float(np.nanmax(np.abs(values))))


def to_report(findings: Findings) -> dict[str, Any]:
    """Return findings as report.json has them."""
    return {
        "parity": {
            "clips": findings.clips,
            "max_abs_d_logits": findings.logits,
            "mean_abs_d_logits": findings.mean,
            "max_abs_d_scores": findings.scores,
            "max_abs_d_logits_forced": list(findings.experts),
        },
        "route": {
            "agreement_pct": findings.agreement_pct,
            "ties": findings.ties,
            "clips_per_expert": list(findings.routed),
        },
    }
