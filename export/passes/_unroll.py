"""The walk of unroll_frames, join_taps and temporal_winograd over a graph.

What is done to a convolution is the pass's own matter; all other layers are treated alike. A layer
that is not known raises UnknownLayerError, and the pass leaves the graph as it is.
"""

from __future__ import annotations

import logging

from onnx import GraphProto, NodeProto

from vmoe.export.passes import _on_frames
from vmoe.export.passes._builder import CHANNELS_FIRST, attributes, outer_names
from vmoe.export.passes._frames import Apart, Convolve, Layer, UnknownLayerError

log = logging.getLogger("vmoe.export")

SCALING = ("Cast", "Add", "Sub", "Mul", "Div")


def unroll(graph: GraphProto, convolve: Convolve) -> bool:
    """Take a graph's clips apart, in place; return whether it was done."""
    if not any(_is_3d(node, graph) for node in graph.node):
        return False
    try:
        made = _walk(graph, Apart(graph, convolve))
    except UnknownLayerError as e:
        log.debug("%s is not unrolled: %s", graph.name or "a graph", e)
        return False
    made.put_into(graph)
    return True


def _is_3d(node: NodeProto, graph: GraphProto) -> bool:
    return node.op_type == "Conv" and any(
        tensor.name == node.input[1] and len(tensor.dims) == 5 for tensor in graph.initializer
    )


def _walk(graph: GraphProto, apart: Apart) -> Layer:
    """Write every node of a graph anew, from its input on."""
    build = apart.build
    for node in graph.node:
        if outer_names(node):
            raise UnknownLayerError(f"{node.op_type} {node.name} has a subgraph")
        if _is_scaling(node, apart):
            build.nodes.append(node)
            apart.whole[node.output[0]] = apart.whole[node.input[0]]
        elif any(name in apart for name in node.input):
            _on_frames.write(node, apart)
        else:
            build.nodes.append(node)
            _enter(node, graph, apart)
    left = {v.name for v in graph.output} & (set(apart.frames) | set(apart.waiting))
    if left:
        raise UnknownLayerError(f"output {left.pop()} has a time axis")
    return build


def _enter(node: NodeProto, graph: GraphProto, apart: Apart) -> None:
    """Take the clip for one where its channels are moved to the front."""
    if node.op_type != "Transpose" or attributes(node).get("perm") != CHANNELS_FIRST:
        return
    clip = node.input[0]
    sizes = _clips(graph, apart).get(clip)
    if sizes is None:
        return
    if len(sizes) < 5 or not sizes[1]:
        raise UnknownLayerError(f"{clip} has a free number of frames")
    apart.whole[node.output[0]] = sizes[1]


def _clips(graph: GraphProto, apart: Apart) -> dict[str, list[int]]:
    """Return the sizes of what may be a clip: inputs, and what is reshaped before any layer."""
    sizes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.input}
    for node in apart.build.nodes:
        if node.op_type == "Reshape" and node.input[1] in apart.constants:
            sizes[node.output[0]] = apart.constants[node.input[1]].tolist()
    return sizes


def _is_scaling(node: NodeProto, apart: Apart) -> bool:
    """Return whether a node scales or shifts a clip that is whole: one node for all frames."""
    first, *others = [*node.input] or [""]
    known = all(name in apart.constants for name in others)
    return node.op_type in SCALING and first in apart.whole and known
