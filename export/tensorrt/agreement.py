"""Plans against the ONNX that they were built of, where there is no twin to ask: no torch.

ONNX Runtime on the CPU answers the same clips, every expert of them; what differs is TensorRT's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vmoe.bundle import Bundle
from vmoe.export.gates import PARITY, SMALLEST, Gate, judged_as
from vmoe.runtime import load
from vmoe.runtime.bench.subjects import random_clips
from vmoe.runtime.engines.onnxruntime import why_unavailable

REFERENCE = "onnxruntime"
CLIPS = 32

__all__ = ["CLIPS", "Agreement", "compare", "why_unavailable"]


class Agreement(NamedTuple):
    """How plans answer, against their ONNX.

    Attributes:
        precision: of the experts: its bound is what is judged by.
        router: the same of the router.
        clips: how many were compared.
        logits: largest difference of any expert's, as a share of the largest logit.
        scores: the same of the router's.
        flips: clips that are routed otherwise, though their scores are no tie.
    """

    precision: str
    router: str
    clips: int
    logits: float
    scores: float
    flips: int

    def gates(self) -> list[Gate]:
        """Judge it by the bounds of the export's gates."""
        return [
            Gate("parity", "d logits to ONNX", self.logits, PARITY[self.precision]),
            Gate("parity", "d scores to ONNX", self.scores, PARITY[self.router]),
            Gate("route", "flips to ONNX", self.flips, 0),
        ]

    def to_json(self) -> dict[str, Any]:
        """Return it as a report has it."""
        return self._asdict()


def compare(
    source: Bundle, plans: Path, device: str, clips: int = CLIPS, *, tf32: bool = False
) -> Agreement:
    """Answer clips of moving textures by both.

    Args:
        source: the bundle of ONNX parts.
        plans: the bundle that was built of it.
        device: the GPU.
        clips: how many.
        tf32: whether the plans may round to it, in every part.
    """
    shown = random_clips(source.spec, clips, seed=0)
    with load(source, REFERENCE, "cpu") as engine:
        wanted, each = engine.infer(shown), engine.run_all(shown)
    with load(plans, "tensorrt", device) as engine:
        got, all_got = engine.infer(shown), engine.run_all(shown)
    unit = max(SMALLEST, float(np.abs(wanted.scores).max()))
    rows = np.arange(clips)
    gap = wanted.scores[rows, wanted.route] - wanted.scores[rows, got.route]
    router = judged_as("fp32", tf32=tf32)
    return Agreement(
        precision=max(_precision(source), router, key=lambda word: PARITY[word]),
        router=router,
        clips=clips,
        logits=_largest(all_got - each) / max(SMALLEST, float(np.abs(each).max())),
        scores=_largest(got.scores - wanted.scores) / unit,
        flips=int((gap > 2 * PARITY["fp32"] * unit).sum()),
    )


def _largest(values: Any) -> float:
    return float(np.abs(values).max())


def _precision(source: Bundle) -> str:
    """Return the coarsest that the experts were exported in."""
    found = {word for name, part in source.parts.items() if name != "router"
             for word in part.precision["found"].split("+")}  # fmt: skip
    return max(found & set(PARITY), key=lambda word: PARITY[word], default="fp32")
