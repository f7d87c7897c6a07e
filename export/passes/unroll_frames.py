"""Take a clip apart into frames, and every 3-D convolution into 2-D convolutions of its taps.

before: Conv3d(x, w)                                     x [N, C, T, H, W], w [O, C, 3, kh, kw]
after:  y_t = Conv2d(x_t-1, w_0) + Conv2d(x_t, w_1) + Conv2d(x_t+1, w_2)         x_t [N, C, H, W]

ONNX Runtime runs a 5-D convolution as im2col and one matrix product, without the blocked layout
(NCHWc) that its 2-D convolutions have; there, the Adds and the Relu run inside the convolution.
Taps that fall into the padding are left out, and so are weights that no frame needs. What a
convolution is added to (a residual) stands first in the sum, so that it is fused too.

An input of few channels is joined over its taps instead: one convolution of 9 channels.
"""

from __future__ import annotations

import numpy as np
from onnx import GraphProto

from vmoe.export.passes._frames import Convolution, Frames, Layer
from vmoe.export.passes._unroll import unroll

BLOCK = 16  # channels of a block of the fast layout, at most


def apply(graph: GraphProto) -> bool:
    """Unroll a graph from `clip`, [N, T, H, W, C] with T known; else leave it as it is."""
    return unroll(graph, convolve)


def convolve(build: Layer, conv: Convolution, frames: Frames, residual: Frames | None) -> Frames:
    """Write a convolution over a clip's frames, added to `residual`; return its output's."""
    return [
        frame(build, conv, frames, t, residual[t] if residual else None)
        for t in range(conv.frames_out(len(frames)))
    ]


def frame(build: Layer, conv: Convolution, frames: Frames, t: int, residual: str | None) -> str:
    """Write frame t of a convolution's output."""
    taps = conv.taps(t, len(frames))
    if len(taps) > 1 and conv.group == 1 and conv.weight.shape[1] * len(taps) < BLOCK:
        return build.add(residual, joined(build, conv, frames, t), f"{conv.name}/t{t}/sum")
    total, last = residual, len(taps) - 1
    for i, (k, at) in enumerate(taps):
        name = f"{conv.name}/t{t}" if i == last else f"{conv.name}/t{t}/to{k}"
        made = build.conv(
            conv, frames[at], tap(build, conv, k), f"{conv.name}/t{t}/tap{k}",
            conv.bias if i == last else None,
        )  # fmt: skip
        total = build.add(total, made, name)
    assert total is not None
    return total


def tap(build: Layer, conv: Convolution, k: int) -> str:
    """Return the weights of one tap, [O, I / group, kh, kw]."""
    return build.constant(f"{conv.weight_name}/tap{k}", conv.weight[:, :, k])


def joined(build: Layer, conv: Convolution, frames: Frames, t: int) -> str:
    """Write frame t of a convolution's output: all taps at once, stacked on their channels."""
    taps = conv.taps(t, len(frames))
    inner, name = [frames[at] for _, at in taps], f"{conv.name}/t{t}"
    if len(taps) == 1:
        return build.conv(conv, inner[0], tap(build, conv, taps[0][0]), name, conv.bias)
    which = "".join(str(k) for k, _ in taps)
    weight = np.concatenate([conv.weight[:, :, k] for k, _ in taps], axis=1)
    weight_name = build.constant(f"{conv.weight_name}/taps{which}", weight)
    stacked = build.node("Concat", inner, f"{name}/taps", axis=1)
    return build.conv(conv, stacked, weight_name, name, conv.bias)
