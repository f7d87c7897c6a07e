"""Make floats of the pixels before anything else is done with them: TensorRT moves no bytes.

before: clip -- Transpose -- Cast -- Div ...
after:  clip -- Cast -- Transpose -- Div ...

TensorRT takes uint8 at a network's door only, and wants a cast there.
"""

from __future__ import annotations

from onnx import GraphProto, NodeProto, TensorProto, helper

from vmoe.export.passes._builder import attributes

MOVES = ("Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")


def apply(graph: GraphProto) -> bool:
    """Put a cast to float32 behind every uint8 input that is moved first; drop those behind it."""
    changed = False
    for value in graph.input:
        if value.type.tensor_type.elem_type == TensorProto.UINT8:
            reads = [node for node in graph.node if value.name in node.input]
            if any(node.op_type in MOVES for node in reads):
                _cast(graph, value.name)
                changed = True
    return changed


def _cast(graph: GraphProto, clip: str) -> None:
    floats = f"{clip}/first"
    cast = helper.make_node("Cast", [clip], [floats], floats, to=TensorProto.FLOAT)
    now = {clip: floats}  # names of bytes, and of the floats in their place
    nodes = [cast]
    for node in graph.node:
        if _is_float_cast(node) and node.input[0] in now:
            now[node.output[0]] = now[node.input[0]]
            continue
        of_bytes = node.op_type in MOVES and node.input[0] in now
        for i, name in enumerate(node.input):
            node.input[i] = now.get(name, name)
        if of_bytes:
            now[node.output[0]] = node.output[0]
        nodes.append(node)
    kept = [value for value in graph.value_info if value.name not in now]
    made = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(made)
    del graph.value_info[:]
    graph.value_info.extend(kept)


def _is_float_cast(node: NodeProto) -> bool:
    return node.op_type == "Cast" and attributes(node)["to"] == TensorProto.FLOAT
