"""Lay pixels out while they are one byte each, for an expert that takes frames as a batch.

before: clip -- Transpose -- Cast -- Mul -- Add -- Transpose -- Reshape to [N T, 3, H, W]
after:  clip -- Reshape to [N T, H, W, 3] -- Transpose -- Cast -- Mul -- Add

One transposition of bytes instead of two, one of them of floats.
"""

from __future__ import annotations

import numpy as np
from onnx import GraphProto, helper

from vmoe.export.passes._builder import CHANNELS_FIRST, Builder, Constants, attributes, way

FRAMES_FIRST = [0, 2, 1, 3, 4]
WAY = ["Transpose", "Cast", "Mul", "Add", "Transpose", "Reshape"]


def apply(graph: GraphProto) -> bool:
    """Rewrite the way from the input to the frames, where it is as above; else leave it."""
    constants, nodes = Constants(graph), way(graph, WAY[-1])
    if [node.op_type for node in nodes] != WAY:
        return False
    first, cast, mul, add, second, reshape = nodes
    clip = next((value for value in graph.input if value.name == first.input[0]), None)
    values = [name for node in (mul, add) for name in node.input if name in constants]
    if clip is None or len(values) != 2 or reshape.input[1] not in constants:
        return False
    height, width, channels = (d.dim_value for d in clip.type.tensor_type.shape.dim[2:])
    shapes = [constants[name].shape for name in values]
    moves = [attributes(first)["perm"], attributes(second)["perm"]]
    to = constants[reshape.input[1]].tolist()
    if moves != [CHANNELS_FIRST, FRAMES_FIRST] or to[1:] != [channels, height, width]:
        return False
    if any(shape not in ((), (1, channels, 1, 1, 1)) for shape in shapes):
        return False
    build = Builder(graph)
    frames = build.constant(build.fresh("frames"), np.array([to[0], height, width, channels]))
    flat = build.node("Reshape", [clip.name, frames], f"{clip.name}/frames")
    moved = build.node("Transpose", [flat], f"{clip.name}/planes", perm=[0, 3, 1, 2])
    floats = build.node("Cast", [moved], f"{clip.name}/float", **attributes(cast))
    scale, shift = (
        build.constant(build.fresh(f"{name}/plane"), v.reshape((1, -1, 1, 1)) if v.ndim else v)
        for name, v in ((name, constants[name]) for name in values)
    )
    scaled = build.node("Mul", [floats, scale], f"{clip.name}/scaled")
    out = reshape.output[0]
    build.nodes.append(helper.make_node("Add", [scaled, shift], [out], out))
    gone = {node.output[0] for node in nodes}
    build.nodes.extend(node for node in graph.node if node.output[0] not in gone)
    build.put_into(graph)
    return True
