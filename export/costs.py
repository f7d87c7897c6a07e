"""What a graph costs, counted on the graph itself."""

from __future__ import annotations

import math

from onnx import ModelProto, NodeProto, helper, shape_inference

Shapes = dict[str, list[int]]


def flops(model: ModelProto) -> int:
    """Return the FLOPs of one clip (two to a multiply-add), of convolutions and products.

    Of a convolution in the plain form, multiplications with zeros of the padding are counted, as
    they are computed; sums by themselves are not.
    """
    one = ModelProto()
    one.CopyFrom(model)
    for value in one.graph.input:
        if value.type.tensor_type.shape.dim:
            value.type.tensor_type.shape.dim[0].dim_value = 1
    one.graph.ClearField("value_info")
    for value in one.graph.output:
        value.type.tensor_type.ClearField("shape")
    inferred = shape_inference.infer_shapes(one, data_prop=True).graph
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*inferred.value_info, *inferred.input, *inferred.output)
    }
    shapes |= {tensor.name: list(tensor.dims) for tensor in one.graph.initializer}
    return sum(_node(node, shapes) for node in one.graph.node)


def _node(node: NodeProto, shapes: Shapes) -> int:
    if node.op_type == "Conv":
        return 2 * math.prod(shapes[node.output[0]]) * math.prod(shapes[node.input[1]][1:])
    if node.op_type == "Gemm":
        across = next((a for a in node.attribute if a.name == "transA"), None)
        rows = shapes[node.input[0]]
        inner = rows[0] if across is not None and helper.get_attribute_value(across) else rows[1]
        return 2 * math.prod(shapes[node.output[0]]) * inner
    return 0
