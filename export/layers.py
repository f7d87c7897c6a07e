"""The layers of a graph: where each stands in the twin, and the precision that it computes in.

A layer is a node with weights: a convolution or a matrix product. Its place is read off the name
of its weights, which are called as in the twin through every pass.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from . import graphs

PRECISIONS: dict[int, str] = {
    TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16",
    TensorProto.DOUBLE: "fp64", TensorProto.INT8: "int8", TensorProto.UINT8: "int8",
    TensorProto.INT32: "int32",
}  # fmt: skip
# A node with weights, by domain and type: which of its inputs they are.
WITH_WEIGHTS = {
    ("", "Conv"): 1, ("", "ConvTranspose"): 1, ("", "Gemm"): 1, ("", "MatMul"): 1,
    ("vmoe", "RoutedConv3d"): 2, ("vmoe", "RoutedLinear"): 2,
}  # fmt: skip
MOVES = ("Cast", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")  # no arithmetic
QUANTISED = ("QuantizeLinear", "DequantizeLinear")
# As ONNX Runtime calls what it has fused: with an activation, in the CPU's blocked layout ...
RUN_AS = {
    "Conv": "float", "FusedConv": "float", "NhwcFusedConv": "float", "Gemm": "float",
    "FusedGemm": "float", "MatMul": "float", "FusedMatMul": "float", "ConvTranspose": "float",
    "QLinearConv": "int8", "QGemm": "int8", "QLinearMatMul": "int8", "ConvInteger": "int8",
    "MatMulInteger": "int8", "MatMulIntegerToFloat": "int8", "DynamicQuantizeMatMul": "int8",
}  # fmt: skip
NAMED = re.compile(r"(?:(?P<owner>[^/]+)/)?module\.(?P<path>.+)")  # as trace names weights

Source = TensorProto | NodeProto | None


class Layer(NamedTuple):
    """One layer.

    Attributes:
        place: in the twin, such as `experts.0.1.layer1.0.conv1.0`.
        node: its name in the graph.
        precision: of its weights and inputs, such as fp16; int8 only where both are.
        given: the value that goes in.
        output: the value that comes out.
    """

    place: str
    node: str
    precision: str
    given: str
    output: str


def of_model(model: ModelProto, part: str) -> list[Layer]:
    """Return the layers of a part, in the order of its nodes, branches and functions included.

    Args:
        model: the graph.
        part: its name: `router`, `expert0`, or `moe`, whose weights say themselves whose they are.
    """
    made = list(_layers(model.graph, {}, part))
    for function in model.functions:
        for node in function.node:
            for inner in graphs.subgraphs_of(node):
                made += _layers(inner, {}, part)
    return made


def _layers(graph: GraphProto, outer: Mapping[str, Source], part: str) -> Iterator[Layer]:
    known: dict[str, Source] = dict(outer)
    known |= {tensor.name: tensor for tensor in graph.initializer}
    known |= {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        at = WITH_WEIGHTS.get((node.domain, node.op_type))
        if at is not None:
            found = _weight(node.input[at], known)
            if found is not None:
                weight, kind = found
                if kind == "int8" and not _is_dequantised(node.input[0], known):
                    kind = "int8 weights"  # and an input that is not
                yield Layer(place(weight, part), node.name, kind, node.input[0], node.output[0])
        for inner in graphs.subgraphs_of(node):
            yield from _layers(inner, known, part)


def _weight(name: str, known: Mapping[str, Source]) -> tuple[str, str] | None:
    """Follow a weight to where it is stored; return its name there, and what it is computed in.

    That is int8 where it comes dequantised, what it is cast to last, and else as it is stored; a
    weight that arithmetic comes behind (a scale folded into none) is named after its largest
    tensor. None where it is computed from the clip.
    """
    found = _stored(name, known)
    return None if found is None else (found[0].name, found[1])


def _stored(name: str, known: Mapping[str, Source]) -> tuple[TensorProto, str] | None:
    source = known.get(name)
    if source is None:
        return None
    if isinstance(source, TensorProto):
        return source, _precision(source.data_type)
    if source.op_type == "Constant":
        return source.attribute[0].t, _precision(source.attribute[0].t.data_type)
    moved = source.op_type in (*MOVES, *QUANTISED)
    inputs = [_stored(each, known) for each in source.input[: 1 if moved else None] if each]
    found = [each for each in inputs if each is not None]
    if not found or len(found) < len(inputs):
        return None
    tensor, kind = max(found, key=lambda each: math.prod(each[0].dims))
    if source.op_type in QUANTISED:
        return tensor, "int8"
    if source.op_type == "Cast":
        to = next(attribute.i for attribute in source.attribute if attribute.name == "to")
        return tensor, _precision(to)
    return tensor, "int8 weights" if kind == "int8" and not moved else kind


def _is_dequantised(name: str, known: Mapping[str, Source]) -> bool:
    source = known.get(name)
    while isinstance(source, NodeProto) and source.op_type in MOVES:
        source = known.get(source.input[0])
    return isinstance(source, NodeProto) and source.op_type == "DequantizeLinear"


def _precision(kind: int) -> str:
    return PRECISIONS.get(kind, f"type {kind}")


def place(weight: str, part: str) -> str:
    """Return where a weight's layer stands in the twin.

    `module.1.fc.weight` of part `expert0` is `experts.0.1.fc`; in the part `moe`, the names say
    whose they are: `expert0/module.1.fc.weight_quantized`.
    """
    found = NAMED.fullmatch(weight)
    if found is None:
        return f"{twin_place(part)}.{weight}"
    path = re.sub(r"\bmodule\.", "", found["path"])
    path = re.split(r"\.?\b(?:weight|bias)", path)[0]
    whole = twin_place(found["owner"] or part)
    return f"{whole}.{path}" if path else whole


def twin_place(part: str) -> str:
    """Return where a part's module stands in the twin: `experts.0` of `expert0`."""
    return re.sub(r"^expert(\d+)$", r"experts.\1", part)


def tensors(model: ModelProto) -> dict[str, int]:
    """Count the weights by the precision that they are stored in; scales and shapes are left out.

    32-bit integers are the biases of int8 layers.
    """
    found: Counter[str] = Counter()
    for scope in graphs.scopes(model):
        scales = {
            name for node in scope.node if node.op_type in QUANTISED for name in node.input[1:]
        }
        found.update(
            PRECISIONS[tensor.data_type]
            for tensor in scope.initializer
            if tensor.data_type in PRECISIONS and tensor.name not in scales and _is_weight(tensor)
        )
    return dict(sorted(found.items()))


def _is_weight(tensor: TensorProto) -> bool:
    """Return whether a tensor holds more than one number: a scalar is a constant of a formula."""
    return any(size > 1 for size in tensor.dims)


def counts(precisions: Iterable[str]) -> dict[str, int]:
    """Count precisions, in the order of their names."""
    return dict(sorted(Counter(precisions).items()))


def runs_as(model: ModelProto) -> dict[str, int]:
    """Count the layers that ONNX Runtime's own optimised graph computes as int8 and as float."""
    found = (
        RUN_AS[node.op_type]
        for scope in graphs.scopes(model)
        for node in scope.node
        if node.op_type in RUN_AS
    )
    return counts(found)
