"""Unroll frames, and stack the taps of a convolution on its channels.

before: Conv3d(x, w)                                                          x [N, C, T, H, W]
after:  y_t = Conv2d(Concat(x_t-1, x_t, x_t+1), [w_0, w_1, w_2])    x_t [N, C, H, W], for each t

One convolution sums all taps, in int32 where it is quantised: a sum of three would be rounded to
eight bits after each. Taps that fall into the padding are left out.
"""

from __future__ import annotations

from onnx import GraphProto

from vmoe.export.passes import unroll_frames
from vmoe.export.passes._frames import Convolution, Frames, Layer
from vmoe.export.passes._unroll import unroll


def apply(graph: GraphProto) -> bool:
    """Unroll a graph from `clip`, [N, T, H, W, C] with T known; else leave it as it is."""
    return unroll(graph, convolve)


def convolve(build: Layer, conv: Convolution, frames: Frames, residual: Frames | None) -> Frames:
    """Write a convolution over a clip's frames, added to `residual`; return its output's."""
    if conv.group != 1:
        return unroll_frames.convolve(build, conv, frames, residual)
    out = [
        unroll_frames.joined(build, conv, frames, t) for t in range(conv.frames_out(len(frames)))
    ]
    if residual is None:
        return out
    return [
        build.add(before, frame, f"{conv.name}/t{t}/sum")
        for t, (before, frame) in enumerate(zip(residual, out, strict=True))
    ]
