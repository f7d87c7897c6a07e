"""What the routed nodes mean in ONNX's own operators: model-local functions.

By them ONNX Runtime runs the very graph that TensorRT gets, without a plugin. A layer groups its
rows by expert, runs each expert's on those, and puts the rows back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import AttributeProto, FunctionProto, NodeProto, TensorProto, helper
from onnx.numpy_helper import from_array

from ._routed import DOMAIN, NAMED

ATTRIBUTES = {"VmoeTopK": ("k",), "RoutedLinear": ("relu",),
              "RoutedConv3d": ("strides", "pads", "relu", "tf32")}  # fmt: skip
_node = helper.make_node


def functions(experts: int, opsets: Sequence[Any]) -> list[FunctionProto]:
    """Return what the nodes mean in ONNX's own operators, for so many experts."""
    made = {
        "VmoeTopK": (["scores"], ["weights", "route"], _topk()),
        "RoutedLinear": (["x", "expert", "w", "b"], ["y"], _routed(experts, _gemm)),
        "RoutedConv3d": (["x", "expert", "w", "b"], ["y"], _routed(experts, _conv)),
    }
    return [
        helper.make_function(
            DOMAIN, name, inputs, outputs, nodes, list(opsets),
            attributes=[*ATTRIBUTES[name], *NAMED],
        )
        for name, (inputs, outputs, nodes) in made.items()
    ]  # fmt: skip


def _of_attribute(node: NodeProto, name: str, kind: int, own: str | None = None) -> NodeProto:
    """Let an attribute of a node be the function's."""
    made = node.attribute.add()
    made.name, made.ref_attr_name, made.type = own or name, name, kind
    return node


def _constant(name: str, **value: Any) -> NodeProto:
    return _node("Constant", [], [name], **value)


def _topk() -> list[NodeProto]:
    """Return weights and route; ONNX's TopK gives the lowest index on ties."""
    return [
        _of_attribute(_node("Constant", [], ["k"]), "k", AttributeProto.INT, "value_int"),
        _constant("flat", value_ints=[-1]),
        _node("Reshape", ["k", "flat"], ["k_list"]),
        _node("Softmax", ["scores"], ["shares"], axis=1),
        _node("TopK", ["scores", "k_list"], ["_best", "chosen"], axis=1, largest=1, sorted=1),
        _node("GatherElements", ["shares", "chosen"], ["weights"], axis=1),
        _node("Cast", ["chosen"], ["route"], to=TensorProto.INT32),
    ]


def _routed(experts: int, layer: Callable[[int], NodeProto]) -> list[NodeProto]:
    """Return the nodes that group the rows by expert, run each expert's layer, and put them back.

    An expert without rows runs its layer on none.
    """
    nodes = [_constant("flat", value_ints=[-1])]
    for i in range(experts):
        nodes += [
            _constant(f"is{i}", value=from_array(np.array(i, np.int32))),
            _constant(f"at{i}", value_int=i),
            _node("Equal", ["expert", f"is{i}"], [f"mask{i}"]),
            _node("NonZero", [f"mask{i}"], [f"found{i}"]),
            _node("Reshape", [f"found{i}", "flat"], [f"rows{i}"]),
            _node("Gather", ["x", f"rows{i}"], [f"x{i}"], axis=0),
            _node("Gather", ["w", f"at{i}"], [f"w{i}"], axis=0),
            _node("Gather", ["b", f"at{i}"], [f"b{i}"], axis=0),
            layer(i),
        ]
    every = range(experts)
    return [
        *nodes,
        _node("Concat", [f"y{i}" for i in every], ["grouped"], axis=0),
        _node("Concat", [f"rows{i}" for i in every], ["order"], axis=0),
        _node("Shape", ["order"], ["rows"]),
        _node("TopK", ["order", "rows"], ["_sorted", "back"], axis=0, largest=0, sorted=1),
        _node("Gather", ["grouped", "back"], ["linear"], axis=0),
        _node("Relu", ["linear"], ["cut"]),
        _of_attribute(_node("Constant", [], ["relu"]), "relu", AttributeProto.INT, "value_int"),
        _node("Cast", ["relu"], ["is_cut"], to=TensorProto.BOOL),
        _node("Where", ["is_cut", "cut", "linear"], ["y"]),
    ]


def _gemm(i: int) -> NodeProto:
    return _node("Gemm", [f"x{i}", f"w{i}", f"b{i}"], [f"y{i}"], transB=1)


def _conv(i: int) -> NodeProto:
    node = _node("Conv", [f"x{i}", f"w{i}", f"b{i}"], [f"y{i}"])
    for name in ("strides", "pads"):
        _of_attribute(node, name, AttributeProto.INTS)
    return node
