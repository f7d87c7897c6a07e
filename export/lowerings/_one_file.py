"""What the lowerings in one file share: the part `moe`, its choice of a route, its outputs.

    clip ------ router ---- scores -- ArgMax -- Where(force_route >= 0) -- route
      |                                                                      |
      +-------------------- what the lowering says --------------------------+-- logits

`force_route` (int64, no axes) is an input with a default, so that it can be left out: -1 routes
freely, 0 .. M-1 sends every clip to that expert. A dense model has none.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper
from onnx.numpy_helper import from_array

from vmoe.export import graphs

FREE = -1  # force_route: let the router decide
_node = helper.make_node
_value = helper.make_tensor_value_info


def classes_of(expert: GraphProto) -> int:
    """Return K, how many logits an expert gives."""
    return int(expert.output[0].type.tensor_type.shape.dim[1].dim_value)


def alone(expert: GraphProto) -> GraphProto:
    """Return the one expert, with scores of zero and route 0 as every model gives them."""
    graph = graphs.renamed(expert, "expert0/", {"clip": "clip", "logits": "logits"})
    graph.name = "moe"
    del graph.output[:]
    graph.initializer.extend([ints("one", [1])])
    graph.node.extend([
        _node("Shape", ["clip"], ["batch"], start=0, end=1),
        _node("Concat", ["batch", "one"], ["batch_by_one"], axis=0),
        _node("ConstantOfShape", ["batch_by_one"], ["scores"]),
        _node("ConstantOfShape", ["batch"], ["route"], value=ints("", [0])),
    ])  # fmt: skip
    graph.output.extend(_outputs(1, classes_of(expert)))
    return graph


def routed(
    router: GraphProto,
    experts: Sequence[GraphProto],
    answer: Sequence[NodeProto],
    constants: Sequence[TensorProto] = (),
    pick: Sequence[NodeProto] | None = None,
) -> GraphProto:
    """Return the graph `moe` of several experts.

    Args:
        router: clip -> scores.
        experts: clip -> logits, each; asked for their sizes only.
        answer: the nodes that make `logits` of `clip` and `route`.
        constants: what those nodes need.
        pick: the nodes that make `free_route` of `scores`; None is ArgMax.
    """
    routing = graphs.renamed(router, "router/", {"clip": "clip", "scores": "scores"})
    own = [ints("force_route", FREE), ints("zero", 0), ints("last", len(experts) - 1)]
    return helper.make_graph(
        [*routing.node, *_choice(pick), *answer],
        "moe",
        [*routing.input, _value("force_route", TensorProto.INT64, [])],
        _outputs(len(experts), classes_of(experts[0])),
        [*routing.initializer, *own, *constants],
        value_info=routing.value_info,
    )


def _choice(pick: Sequence[NodeProto] | None) -> list[NodeProto]:
    """Return the nodes that make `route` of `scores`: the lowest index on ties, or as forced."""
    most = _node("ArgMax", ["scores"], ["free_route"], axis=1, keepdims=0, select_last_index=0)
    return [
        *([most] if pick is None else pick),
        _node("GreaterOrEqual", ["force_route", "zero"], ["is_forced"]),
        _node("Min", ["force_route", "last"], ["forced"]),  # no clip is without an expert
        _node("Where", ["is_forced", "forced", "free_route"], ["route"]),
    ]


def _outputs(experts: int, classes: int) -> list[ValueInfoProto]:
    return [
        _value("logits", TensorProto.FLOAT, ["N", classes]),
        _value("scores", TensorProto.FLOAT, ["N", experts]),
        _value("route", TensorProto.INT64, ["N"]),
    ]


def model(graph: GraphProto, like: ModelProto) -> dict[str, ModelProto]:
    """Return the bundle's one part."""
    return {"moe": graphs.model(graph, like)}


def ints(name: str, value: int | list[int]) -> TensorProto:
    """Return an int64 constant."""
    return from_array(np.asarray(value, np.int64), name)
