"""The online form of a causal twin: each expert as a graph from frames and states to both anew.

    expert_i:  clip uint8 [N, S, H, W, 3], state0 .. state7, recent
               -> logits [N, K], next_state0 .. next_state7, next_recent

N streams, and S new frames of each: 1 as a stream goes on, a whole clip to warm an expert up. The
router is as ever, and sees the window.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from onnx import ModelProto
from torch import Tensor, nn

from vmoe.clips import Clips
from vmoe.errors import SettingError
from vmoe.models import VideoMoE
from vmoe.models.experts.tsm_online import REACH, TSMOnline18
from vmoe.runtime import Engine
from vmoe.runtime.online import after

from . import graphs, optimize
from .onnx import Parts, trace, trace_doors

TRACED = (2, 3)  # streams and frames that a graph is traced with: 1 would be taken as fixed


class Door(nn.Module):
    """A causal expert behind an engine's door, with its states as inputs and outputs."""

    def __init__(self, module: nn.Module) -> None:
        """Wrap an expert: normalisation, then the network."""
        super().__init__()
        self.module = module

    def forward(self, clip: Tensor, states: list[Tensor]) -> tuple[Tensor, ...]:
        """Return the logits of the clips that end here, and the next states.

        Pixels are laid out while they are bytes, and one axis at a time: ONNX Runtime is fast then.
        """
        normalise, net = self.module.children()
        frames = clip.transpose(0, 1).flatten(0, 1).permute(0, 3, 1, 2).unsqueeze(2).float() / 255
        follow: Any = net.follow_frames
        logits, nexts = follow(normalise(frames).squeeze(2), states)
        return (logits, *nexts)


def why_not(twin: VideoMoE) -> str | None:
    """Return why a twin has no online form; None where it has one."""
    if not all(isinstance(_net(expert), TSMOnline18) for expert in twin.experts):
        return f"{twin.settings.arch} is not causal: train --arch tsm-online"
    if twin.spec.frames <= REACH:
        return (
            f"its clips have {twin.spec.frames} frames, and a frame sees {REACH} before it: "
            f"train with --frames {REACH + 1} or more"
        )
    return None


def check(twin: VideoMoE) -> None:
    """Refuse a twin that has no online form.

    Raises:
        SettingError: and why.
    """
    why = why_not(twin)
    if why:
        raise SettingError(f"no online form: {why}. Or leave --form out.")


def from_twin(twin: VideoMoE, opset: int) -> Parts:
    """Export a causal twin in its online form.

    Args:
        twin: in eval mode, on the CPU.
        opset: version of the ONNX operators.

    Raises:
        SettingError: it has no online form.
    """
    check(twin)
    shape = twin.spec.shape
    router = None if twin.router is None else trace([twin.router], "scores", shape, opset)[0]
    return Parts(router, _experts(twin, opset))


def _experts(twin: VideoMoE, opset: int) -> list[ModelProto]:
    spec, (n, s) = twin.spec, TRACED
    states = _net(twin.experts[0]).first(n, spec.frames, spec.height, spec.width)
    names = [*(f"state{i}" for i in range(len(states) - 1)), "recent"]
    clip = torch.zeros((n, s, spec.height, spec.width, 3), dtype=torch.uint8)
    batch, frames = torch.export.Dim("N"), torch.export.Dim("S")
    made = trace_doors(
        [Door(expert).eval() for expert in twin.experts], (clip, states), ["clip", *names],
        ["logits", *map(after, names)], ({0: batch, 1: frames}, [{0: batch}] * len(states)), opset,
    )  # fmt: skip
    for model in made:
        for apply in optimize.ONLINE:
            apply(model.graph)
    return [graphs.model(model.graph, model) for model in made]


def _net(expert: nn.Module) -> Any:
    """Return an expert's network, behind its normalisation."""
    return list(expert.children())[-1]


def error(engine: Engine, clips: Clips) -> float:
    """Return the largest |d logits| of clips that come frame by frame to the same clips whole.

    Each comes after another one, which must leave no trace; every expert is asked.

    Args:
        engine: an online bundle, loaded.
        clips: uint8 [N, T, H, W, 3].
    """
    worst = 0.0
    for expert in range(engine.bundle.experts):
        _, states = engine.follow(expert, clips[::-1])
        for t in range(clips.shape[1]):
            logits, states = engine.follow(expert, clips[:, t : t + 1], states)
        whole = engine.infer(clips, force_route=expert).logits
        worst = float(np.maximum(worst, np.abs(logits - whole).max()))  # NaN stays NaN
    return worst
