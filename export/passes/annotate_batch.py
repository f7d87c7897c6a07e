"""Name the size of a batch that is gathered, so that ONNX Runtime can prove shapes equal.

before: Gather(clip, NonZero(...)) -> [?, T, H, W, 3]    and every Add behind it stays unfused
after:  Gather(clip, NonZero(...)) -> [n/NAME, T, H, W, 3]
"""

from __future__ import annotations

from onnx import GraphProto, ValueInfoProto, helper, shape_inference

from vmoe.export import graphs
from vmoe.export.passes._builder import attributes

OPSET = 20  # of the inference alone
SMALL_BYTES = 1024  # larger constants are weights, of which no shape depends
UNKNOWN = "unk__"  # how it names what it does not know


def apply(graph: GraphProto) -> bool:
    """Give every Gather along the first axis, whose count is not known, a named count."""
    light = GraphProto()
    light.CopyFrom(graph)
    for scope in graphs.walk(light):
        small = [t for t in scope.initializer if graphs.tensor_bytes(t) <= SMALL_BYTES]
        scope.ClearField("initializer")
        scope.initializer.extend(small)
    domains = {node.domain for scope in graphs.walk(graph) for node in scope.node} - {""}
    opsets = [helper.make_opsetid("", OPSET), *(helper.make_opsetid(d, 1) for d in sorted(domains))]
    model = helper.make_model(light, opset_imports=opsets)
    return _annotate(graph, shape_inference.infer_shapes(model, data_prop=True).graph)


def _annotate(graph: GraphProto, inferred: GraphProto) -> bool:
    changed = False
    known = {value.name for value in (*graph.value_info, *graph.output)}
    shapes = {value.name: value for value in inferred.value_info}
    for node, twin in zip(graph.node, inferred.node, strict=True):
        name = node.output[0]
        if node.op_type == "Gather" and attributes(node).get("axis", 0) == 0:
            value = shapes.get(name)
            if value is not None and name not in known and _is_free(value):
                value.type.tensor_type.shape.dim[0].dim_param = f"n/{name}"
                graph.value_info.append(value)
                changed = True
        for mine, its in zip(node.attribute, twin.attribute, strict=True):
            if mine.HasField("g"):
                changed = _annotate(mine.g, its.g) or changed
    return changed


def _is_free(value: ValueInfoProto) -> bool:
    """Return whether a value has a first size, of which nothing is known."""
    dims = value.type.tensor_type.shape.dim
    if len(dims) < 2 or dims[0].HasField("dim_value"):
        return False
    return not dims[0].dim_param or dims[0].dim_param.startswith(UNKNOWN)
