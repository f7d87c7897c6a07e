"""The file that a lowering writes for TensorRT, judged without TensorRT.

ONNX Runtime runs its very nodes, by what they mean in ONNX's own operators, and the answers are
compared with the twin's as those of any backend are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto

from vmoe.clips import Clips
from vmoe.runtime import Prediction

from .gates import Gate, GateSettings
from .lowerings import plugin
from .parity import Reference, check

SHOWN = "in the file for TensorRT"


class Routed:
    """A routed model as `parity.check` asks an engine."""

    def __init__(self, model: ModelProto, experts: int) -> None:
        """Take a model without functions."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # fatal only
        plain = plugin.with_functions(model, experts).SerializeToString()
        self._session: Any = onnxruntime.InferenceSession(
            plain, options, providers=["CPUExecutionProvider"]
        )

    def infer(self, clips: Clips, force_route: int | Sequence[int] | None = None) -> Prediction:
        """Answer clips, uint8 [N, T, H, W, 3]; a forced route is one run for each expert."""
        if force_route is None:
            return Prediction(*self._session.run(None, {"clip": clips}))
        route = np.broadcast_to(np.asarray(force_route, np.int64), len(clips))
        made = Prediction(*self._session.run(None, {"clip": clips}))
        for expert in np.unique(route):
            rows = route == expert
            given = {"clip": clips[rows], "force_route": np.asarray(expert, np.int64)}
            made.logits[rows] = self._session.run(["logits"], given)[0]
        return made._replace(route=route)


def gates(
    file: Path, twin: Any, clips: Clips, settings: GateSettings, precisions: tuple[str, str],
    known: Reference,
) -> list[Gate]:  # fmt: skip
    """Compare a routed file with the twin.

    Args:
        file: of the bundle.
        twin: in eval mode.
        clips: uint8 [N, T, H, W, 3].
        settings: the bounds.
        precisions: what was asked of the experts, and of the router.
        known: what the twin said of these clips.
    """
    routed: Any = Routed(onnx.load(file), len(twin.experts))
    found = check(twin, routed, clips, settings, *precisions, known)
    return [replace(gate, what=f"{gate.what} {SHOWN}") for gate in found.gates]
