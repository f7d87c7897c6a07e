"""Gates: what is measured on a bundle before anyone gets it, and can refuse it.

The twin is the reference. The engine answers every clip as it would in service, and once more
with its route forced, expert after expert: none goes unseen because the router never chose it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vmoe.batches import to_tensor
from vmoe.clips import Clips, ClipSpec
from vmoe.data import DataSettings, open_data
from vmoe.errors import GateError
from vmoe.models import VideoMoE
from vmoe.runtime import Engine, Prediction
from vmoe.settings import Settings, opt

CLIPS = 64  # of a check
NOISE = 16  # of them, where the clips are the built-in ones: nothing that a camera would see
BATCH = 8  # clips that the twin answers at a time
SMALLEST = 1e-3  # where every reference value is smaller than this, it is the unit

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class GateSettings(Settings):
    """The bounds that a bundle must keep."""

    gate_parity: float = opt(
        1e-4, "largest difference to the twin, as a share of its largest logit (or score)", above=0
    )
    gate_route: float = opt(
        100.0, "clips routed as the twin routes them, in per cent; ties count as agreement",
        at_least=0, at_most=100,
    )  # fmt: skip


@dataclass(frozen=True)
class Reference:
    """What the twin says of the clips.

    Attributes:
        scores: [N, M].
        logits: of every expert, [N, M, K]; NaN where nobody asked.
    """

    scores: Floats
    logits: Floats


@dataclass(frozen=True)
class Gate:
    """One gate's finding.

    Attributes:
        name: as its flag: `parity` or `route`.
        what: what was measured.
        measured: the value found.
        bound: the value that it must keep.
        unit: of both; empty for a plain number.
        ok: whether it keeps the bound.
    """

    name: str
    what: str
    measured: float
    bound: float
    unit: str
    ok: bool

    def line(self) -> str:
        """Return the finding as a line says it."""
        sign = ("<=" if self.ok else ">") if self.name == "parity" else (">=" if self.ok else "<")
        shown = f"{self.measured:.4g}{self.unit} {sign} {self.bound:.4g}{self.unit}"
        return f"gate {self.name}: {self.what} {shown}: {'ok' if self.ok else 'REFUSED'}"


@dataclass(frozen=True)
class Findings:
    """What a check measured.

    Attributes:
        gates: in the order of their flags.
        clips: how many.
        logits: max |d logits| of the clips as routed.
        scores: max |d scores|.
        experts: max |d logits| of each expert, its route forced.
        agreement_pct: clips routed as the twin routes them, ties within the tolerance included.
        ties: how many clips were such ties.
        routed: how many clips each expert received.
    """

    gates: tuple[Gate, ...]
    clips: int
    logits: float
    scores: float
    experts: tuple[float, ...]
    agreement_pct: float
    ties: int
    routed: tuple[int, ...]

    def refuse(self) -> None:
        """Raise GateError for the gates that the bundle did not pass."""
        failed = [gate for gate in self.gates if not gate.ok]
        if failed:
            lines = "; ".join(f"{g.what} is {_shown(g)}" for g in failed)
            flags = " or ".join(f"--gate-{g.name}" for g in failed)
            raise GateError(
                f"refused: {lines}, on {self.clips} clips. Nothing was written; "
                f"if you can live with it, say so with {flags}."
            )


def _shown(gate: Gate) -> str:
    bound = "at most" if gate.name == "parity" else "at least"
    return f"{gate.measured:.4g}{gate.unit}, must be {bound} {gate.bound:.4g}{gate.unit}"


def clips_for(spec: ClipSpec, data: str | None, seed: int, group: str = "") -> Clips:
    """Return the clips of a check, uint8 [N, T, H, W, 3].

    Args:
        spec: the clips that the model takes.
        data: a data set, of which the first clips of the split `val` are taken; None is rendered
            camera motion, then noise, black and white.
        seed: of what is drawn.
        group: regular expression that splits a folder, as the twin was trained.

    Raises:
        SettingError: no such data.
    """
    count = CLIPS - NOISE if data is None else CLIPS
    how = DataSettings(clips=count, group=group, seed=seed)
    opened = open_data(data or "camera-motion", "val", spec, how)
    clips = np.stack([opened[i][0] for i in range(min(count, len(opened)))])
    if data is not None:
        return clips
    noise = np.random.default_rng(seed).integers(0, 256, (NOISE, *spec.shape), dtype=np.uint8)
    noise[-2], noise[-1] = 0, 255
    return np.concatenate([clips, noise])


def check(twin: VideoMoE, engine: Engine, clips: Clips, settings: GateSettings) -> Findings:
    """Measure a loaded bundle against its twin.

    Args:
        twin: in eval mode.
        engine: the bundle, loaded.
        clips: uint8 [N, T, H, W, 3].
        settings: the bounds.
    """
    experts = len(twin.experts)
    n, rows = len(clips), np.arange(len(clips))
    forced = rows % experts
    free = _infer(engine, clips, None)
    each = free if experts == 1 else _infer(engine, clips, forced)
    reference = _reference(twin, clips, free.route, forced)
    scores = float(np.max([_largest(p.scores - reference.scores) for p in (free, each)]))
    logits = _largest(free.logits - reference.logits[rows, free.route])
    off = np.abs(each.logits - reference.logits[rows, forced]).max(axis=1)
    of_experts = tuple(_largest(off[forced == i]) for i in range(experts))
    logits_bound = settings.gate_parity * _scale(reference.logits)
    scores_bound = settings.gate_parity * _scale(reference.scores)
    agree, ties = _agreement(free, reference, scores_bound)
    agreement_pct = 100 * agree / n
    worst = float(np.max([logits, *of_experts]))  # NaN stays NaN, as in scores
    gates = (
        Gate("parity", "max |d logits|", worst, logits_bound, "", worst <= logits_bound),
        Gate("parity", "max |d scores|", scores, scores_bound, "", scores <= scores_bound),
        Gate("route", "route agreement", agreement_pct, settings.gate_route, " %",
             agreement_pct >= settings.gate_route),
    )  # fmt: skip
    routed = tuple(int(count) for count in np.bincount(free.route, minlength=experts))
    return Findings(gates, n, logits, scores, of_experts, agreement_pct, ties, routed)


def _infer(engine: Engine, clips: Clips, forced: NDArray[np.int64] | None) -> Prediction:
    """Answer the clips in batches, the last of which is smaller where they do not divide."""
    found = [
        engine.infer(clips[at], None if forced is None else forced[at].tolist())
        for at in _batches(len(clips))
    ]
    return Prediction(*(np.concatenate(values) for values in zip(*found, strict=True)))


def _reference(
    twin: VideoMoE, clips: Clips, free: NDArray[np.int64], forced: NDArray[np.int64]
) -> Reference:
    """Let the twin score the clips, and run the experts that the engine ran, and only those.

    Logits are compared expert for expert: where the routes differ, the route gate says so.
    """
    n, experts, classes = len(clips), len(twin.experts), twin.settings.classes
    logits = np.full((n, experts, classes), np.nan, np.float32)
    scores = np.empty((n, experts), np.float32)
    device = next(twin.parameters()).device
    with torch.no_grad():
        for at in _batches(n):
            clip = to_tensor(clips[at], device)
            scores[at] = twin.scores(clip).cpu().numpy()
            for route in (free,) if experts == 1 else (free, forced):
                answer = twin.run_routed(clip, torch.from_numpy(route[at]).to(device))
                logits[np.arange(n)[at], route[at]] = answer.cpu().numpy()
    return Reference(scores, logits)


def _agreement(free: Prediction, reference: Reference, bound: float) -> tuple[int, int]:
    """Return how many clips are routed as the twin routes them, and how many of them are ties.

    A tie: the twin's own scores of both experts are so near each other that errors within the
    tolerance turn the choice.
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
    return float(np.abs(values).max()) if values.size else 0.0


def _scale(values: Floats) -> float:
    return max(SMALLEST, float(np.nanmax(np.abs(values))))


def to_report(findings: Findings) -> dict[str, Any]:
    """Return findings as report.json has them."""
    return {
        "gates": [
            {"gate": g.name, "what": g.what, "measured": g.measured, "bound": g.bound,
             "unit": g.unit.strip(), "ok": g.ok}
            for g in findings.gates
        ],
        "parity": {
            "clips": findings.clips,
            "max_abs_d_logits": findings.logits,
            "max_abs_d_scores": findings.scores,
            "max_abs_d_logits_forced": list(findings.experts),
        },
        "route": {
            "agreement_pct": findings.agreement_pct,
            "ties": findings.ties,
            "clips_per_expert": list(findings.routed),
        },
    }  # fmt: skip
