"""Fold a first layer's stride into channels: blocks of s x s pixels become one pixel of s s 3.

before: clip [N, T, H, W, 3] -- Transpose -- Cast -- Mul a -- Add b -- Conv3d(w, stride [1, s, s])
after:  clip, moved to [N, T, H/s, W/s, 3 s s] -- Transpose -- Cast -- Add b / a -- Conv3d(a w', 1)

What the layer is given is another value then, and is called so (`in_blocks`).

The same sums, with weights of zero where a block reaches beyond the kernel: 4x4 of 12 channels for
7x7 of 3. With 3 channels a pixel, ONNX Runtime's int8 convolution copies every window (its kernel
without copies wants multiples of 4), and stacking taps copies 3 bytes at a time.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, helper

from vmoe.export.passes._builder import CHANNELS_FIRST, Builder, Constants, attributes, way

FEW = 4  # channels of a layer that this is for, at most
WAY = ["Transpose", "Cast", "Mul", "Add", "Conv"]


class Axis(NamedTuple):
    """How a kernel lies on blocks, along the height or the width.

    Attributes:
        stride: pixels of a block.
        size: of the kernel, in pixels.
        pad: zeros in front of the first pixel.
        first: of the blocks that output 0 reads; the image begins at block 0.
        blocks: that an output reads.
        after: blocks of zeros behind the image.
    """

    stride: int
    size: int
    pad: int
    first: int
    blocks: int
    after: int

    def place(self, pixel: int) -> tuple[int, int]:
        """Return which block a pixel of the kernel falls into, and where in it."""
        block, inside = divmod(pixel - self.pad, self.stride)
        return block - self.first, inside


def apply(graph: GraphProto) -> bool:
    """Rewrite the way from the input to the first layer, where it is as above; else leave it."""
    nodes = way(graph, WAY[-1])
    if [node.op_type for node in nodes] != WAY:
        return False
    move, cast, mul, add, conv = nodes
    clip, constants = graph.input[0], Constants(graph)
    frames, height, width, channels = (d.dim_value for d in clip.type.tensor_type.shape.dim[1:])
    weight = constants.get(conv.input[1])
    scale, shift = (_each(constants.get(node.input[1]), channels) for node in (mul, add))
    if weight is None or scale is None or shift is None or not scale.all() or channels > FEW:
        return False
    if weight.ndim != 5 or attributes(move).get("perm") != CHANNELS_FIRST:
        return False
    if not (frames and height and width):  # a free size
        return False
    axes = _axes(attributes(conv), height, width, weight)
    if axes is None:
        return False
    build, s = Builder(graph), axes[0].stride
    given = build.fresh(in_blocks(add.output[0]))
    build.nodes.append(
        _moved(build, clip.name, move, [frames, height // s, width // s, channels, s])
    )
    for node in graph.node:
        out = node.output[0]
        if out == conv.output[0]:
            scaled = (weight * scale.reshape(1, -1, 1, 1, 1)).astype(weight.dtype)
            build.nodes.append(_conv(build, node, given, scaled, axes))
        elif out == add.output[0]:
            wide = np.tile(shift / scale, s * s).reshape(1, -1, 1, 1, 1).astype(weight.dtype)
            by = build.constant(build.fresh(f"{node.input[1]}/blocks"), wide)
            build.nodes.append(helper.make_node("Add", [cast.output[0], by], [given], given))
        elif out not in (move.output[0], mul.output[0]):
            build.nodes.append(node)
    graph.ClearField("value_info")  # some of it has the old sizes
    build.put_into(graph)
    return True


def in_blocks(value: str) -> str:
    """Return the name of what stands in a value's place, in blocks."""
    return f"{value}/blocks"


def pixels(blocks: NDArray[Any], channels: int) -> NDArray[Any]:
    """Return what is in blocks, [N, s s C, T, H/s, W/s], as pixels, [N, C, T, H, W].

    They are not scaled: `a` stands in the weights.
    """
    n, inner, frames, high, wide = blocks.shape
    s = math.isqrt(inner // channels)
    apart = blocks.reshape(n, s, s, channels, frames, high, wide)
    return apart.transpose(0, 3, 4, 5, 1, 6, 2).reshape(n, channels, frames, s * high, s * wide)


def _each(value: NDArray[np.float32] | None, channels: int) -> NDArray[np.float64] | None:
    """Return a value for each channel; None where it is something else."""
    if value is None or value.shape not in ((), (1, channels, 1, 1, 1)):
        return None
    return np.broadcast_to(value.ravel(), channels).astype(np.float64)


def _axes(
    given: dict[str, Any], height: int, width: int, weight: NDArray[np.float32]
) -> tuple[Axis, Axis] | None:
    """Return how the kernel lies on blocks; None where it cannot."""
    pads, strides = given.get("pads", [0] * 6), given.get("strides", [1] * 3)
    plain = given.get("group", 1) == 1 and given.get("dilations", [1] * 3)[1:] == [1, 1]
    s = strides[1]
    if not plain or given.get("auto_pad", b"NOTSET") != b"NOTSET" or s < 2 or strides[2] != s:
        return None
    made = []
    for i, size in ((1, height), (2, width)):
        kernel, before, behind = weight.shape[2 + i], pads[i], pads[3 + i]
        first = -before // s
        blocks = (kernel - 1 - before) // s - first + 1
        count = (size + before + behind - kernel) // s + 1  # of outputs
        after = count - 1 + first + blocks - size // s
        if size % s or after < 0:
            return None
        made.append(Axis(s, kernel, before, first, blocks, after))
    return made[0], made[1]


def _moved(build: Builder, clip: str, move: NodeProto, sizes: list[int]) -> NodeProto:
    """Return the clip in blocks, channels first; sizes are T, H/s, W/s, channels and s.

    Row by row: Slice copies rows, where a Transpose would go pixel by pixel.
    """
    frames, high, wide, channels, s = sizes
    apart = np.array([0, frames, high, s, wide, s * channels], np.int64)
    joined = np.array([0, frames, high, wide, s * s * channels], np.int64)
    blocks = build.node(
        "Reshape", [clip, build.constant(build.fresh(f"{clip}/apart"), apart)], f"{clip}/blocks"
    )
    at = [build.constant(f"at{y}", np.array([y], np.int64)) for y in range(s + 1)]
    axis = build.constant("at_rows", np.array([3], np.int64))
    rows = [
        build.node("Slice", [blocks, at[y], at[y + 1], axis], f"{clip}/rows{y}") for y in range(s)
    ]
    beside = build.node("Concat", rows, f"{clip}/beside", axis=5)
    flat = build.node(
        "Reshape", [beside, build.constant(build.fresh(f"{clip}/joined"), joined)], f"{clip}/folded"
    )
    return helper.make_node("Transpose", [flat], list(move.output), move.name, perm=CHANNELS_FIRST)


def _conv(
    build: Builder, node: NodeProto, given: str, weight: NDArray[np.float32],
    axes: tuple[Axis, Axis],
) -> NodeProto:  # fmt: skip
    """Return the convolution over blocks, of `given`."""
    outer, channels, taps = weight.shape[:3]
    high, wide = axes
    s = high.stride
    made = np.zeros((outer, s, s, channels, taps, high.blocks, wide.blocks), weight.dtype)
    for u in range(high.size):
        for v in range(wide.size):
            (i, y), (j, x) = high.place(u), wide.place(v)
            made[:, y, x, :, :, i, j] = weight[..., u, v]
    made = made.reshape(outer, s * s * channels, taps, high.blocks, wide.blocks)
    name = build.constant(build.fresh(f"{node.input[1]}/blocks"), made)
    said = attributes(node)
    pads = said.get("pads", [0] * 6)
    said |= {
        "kernel_shape": list(made.shape[2:]), "strides": [said["strides"][0], 1, 1],
        "pads": [pads[0], -high.first, -wide.first, pads[3], high.after, wide.after],
    }  # fmt: skip
    inputs = [given, name, *node.input[2:]]
    return helper.make_node("Conv", inputs, list(node.output), node.name, **said)
