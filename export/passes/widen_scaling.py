"""Write what pixels are scaled and shifted by as whole rows, for graphs that will be int8.

before: Add(Mul(x, a), b)     x [N, 3, T, H, W], a and b [1, 3, 1, 1, 1]
after:  Add(Mul(x, a), b)                        a and b [1, 3, 1, 1, W]

ONNX Runtime moves the channels of what an int8 convolution reads last, through the scaling to the
pixels. A constant of one pixel is then applied three numbers at a time: ten times as slow.
"""

from __future__ import annotations

import numpy as np
from onnx import GraphProto, numpy_helper

from vmoe.export.passes._builder import CHANNELS_FIRST, Constants, attributes, readers

APART = ("Concat", "Gather", "Slice")  # what the clip goes through before its channels come first
PLANES = (CHANNELS_FIRST, [0, 3, 1, 2])  # of a clip, of frames


def apply(graph: GraphProto) -> bool:
    """Widen the constants between the pixels of a clip, [N, T, H, W, C], and the first layer."""
    clip = graph.input[0]
    sizes = [dim.dim_value for dim in clip.type.tensor_type.shape.dim]
    if len(sizes) != 5 or not sizes[3]:
        return False
    found = _constants(graph, clip.name, sizes[3])
    for tensor in graph.initializer:
        if tensor.name in found:
            value = numpy_helper.to_array(tensor)
            wide = np.broadcast_to(value, (*value.shape[:-1], found[tensor.name]))
            tensor.CopyFrom(numpy_helper.from_array(np.array(wide, order="C"), tensor.name))
    return bool(found)


def _constants(graph: GraphProto, clip: str, width: int) -> dict[str, int]:
    """Return the constants [1, C, 1, 1, 1] that change pixels, and nothing else, with the width."""
    constants, reading = Constants(graph), readers(graph)
    pixels: dict[str, int] = {clip: width}  # widths, by what has its channels last
    planes: dict[str, int] = {}  # the same of what has them first
    found: dict[str, int] = {}
    changed: set[str] = set()  # by the output of the node that changes them
    for node in graph.node:
        first, out = node.input[0] if node.input else "", node.output[0]
        if node.op_type == "Reshape" and first in pixels and node.input[1] in constants:
            pixels[out] = constants[node.input[1]].tolist()[-2]
        elif node.op_type == "Transpose" and first in pixels:
            if attributes(node).get("perm") in PLANES:
                planes[out] = pixels[first]
        elif node.op_type in APART and first in pixels:
            pixels[out] = pixels[first]
        elif node.op_type == "Cast" and first in planes:
            planes[out] = planes[first]
        elif node.op_type in ("Mul", "Add") and first in planes:
            planes[out] = planes[first]
            changed.add(out)
            found |= {
                n: planes[out]
                for n in node.input[1:]
                if n in constants and _is_pixel(constants[n].shape)
            }
    return {
        name: wide
        for name, wide in found.items()
        if changed.issuperset(n.output[0] for n in reading[name])
    }


def _is_pixel(shape: tuple[int, ...]) -> bool:
    return len(shape) in (4, 5) and shape[1] > 1 and shape == (1, shape[1], 1, 1, 1)[: len(shape)]
