"""`if`: one file that routes by itself; per clip, only the branch of its expert runs.

    clip ------ router ---- scores -- ArgMax -- Where(force_route >= 0) -- route
      |                                                                      |
      +-- Loop over the clips of the batch: an If tree over its route -------+
              If(route < 2)  then If(route < 1) then expert0 else expert1
                             else If(route < 3) then expert2 else expert3      -- logits

An expert's weights are initializers inside its branch. Outside of it, ONNX Runtime cannot lay
them out for the CPU's vectors, and a clip costs 1.75x.

A tree of depth log2(M), not a chain: every expert is equally far, and no branch is deep. The Loop
makes any batch right, and each clip pays for its own expert alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper
from onnx.numpy_helper import from_array

from vmoe.export import graphs

FREE = -1  # force_route: let the router decide
_node = helper.make_node
_value = helper.make_tensor_value_info


def lower(router: ModelProto | None, experts: Sequence[ModelProto]) -> dict[str, ModelProto]:
    """Return the part `moe`: clip -> logits [N, K], scores [N, M], route int64 [N].

    `force_route` (int64, no axes) is an input with a default, so that it can be left out: -1
    routes freely, 0 .. M-1 sends every clip to that expert. A dense model has none.
    """
    classes = experts[0].graph.output[0].type.tensor_type.shape.dim[1].dim_value
    outputs = [
        _value("logits", TensorProto.FLOAT, ["N", classes]),
        _value("scores", TensorProto.FLOAT, ["N", len(experts)]),
        _value("route", TensorProto.INT64, ["N"]),
    ]
    if router is None:
        graph = _dense(experts[0].graph)
    else:
        graph = _routed(router.graph, [expert.graph for expert in experts], classes)
    graph.output.extend(outputs)
    return {"moe": graphs.model(graph, experts[0])}


def _dense(expert: GraphProto) -> GraphProto:
    """Return the one expert, with scores of zero and route 0 as every model gives them."""
    graph = graphs.renamed(expert, "expert0/", {"clip": "clip", "logits": "logits"})
    graph.name = "moe"
    del graph.output[:]
    graph.initializer.extend([_ints("one", [1])])
    graph.node.extend([
        _node("Shape", ["clip"], ["batch"], start=0, end=1),
        _node("Concat", ["batch", "one"], ["batch_by_one"], axis=0),
        _node("ConstantOfShape", ["batch_by_one"], ["scores"]),
        _node("ConstantOfShape", ["batch"], ["route"], value=_ints("", [0])),
    ])  # fmt: skip
    return graph


def _routed(router: GraphProto, experts: list[GraphProto], classes: int) -> GraphProto:
    routing = graphs.renamed(router, "router/", {"clip": "clip", "scores": "scores"})
    nodes = [
        *routing.node,
        *_choice(),
        _node("Shape", ["clip"], ["batch"], start=0, end=1),
        _node("Squeeze", ["batch"], ["trips"]),
        _node("Loop", ["trips", ""], ["logits"], name="clips", body=_body(experts, classes)),
    ]
    constants = [_ints("force_route", FREE), _ints("zero", 0), _ints("last", len(experts) - 1)]
    force_route = _value("force_route", TensorProto.INT64, [])
    return helper.make_graph(
        nodes, "moe", [*routing.input, force_route], [], [*routing.initializer, *constants],
        value_info=routing.value_info,
    )  # fmt: skip


def _choice() -> list[NodeProto]:
    """Return the nodes that make `route` of `scores`: the lowest index on ties, or as forced."""
    return [
        _node("ArgMax", ["scores"], ["free_route"], axis=1, keepdims=0, select_last_index=0),
        _node("GreaterOrEqual", ["force_route", "zero"], ["is_forced"]),
        _node("Min", ["force_route", "last"], ["forced"]),  # the expert that the tree ends at
        _node("Where", ["is_forced", "forced", "free_route"], ["route"]),
    ]


def _body(experts: list[GraphProto], classes: int) -> GraphProto:
    """Return the loop's body: clip number i alone, [1, T, H, W, 3], to its logits, [K]."""
    nodes = [
        _node("Identity", ["go"], ["go_on"]),
        _node("Unsqueeze", ["i", "body/axis"], ["at"]),
        _node("Gather", ["clip", "at"], ["one_clip"], axis=0),
        _node("Gather", ["route", "i"], ["its_route"], axis=0),
        *_tree(experts, 0, len(experts), "its_logits"),
        _node("Squeeze", ["its_logits", "body/axis"], ["row"]),
    ]
    return helper.make_graph(
        nodes,
        "body",
        [_value("i", TensorProto.INT64, []), _value("go", TensorProto.BOOL, [])],
        [_value("go_on", TensorProto.BOOL, []), _value("row", TensorProto.FLOAT, [classes])],
        [_ints("body/axis", [0])],
    )


def _tree(experts: list[GraphProto], low: int, high: int, out: str) -> list[NodeProto]:
    """Return the nodes that run expert low <= route < high; out: its logits, [1, K]."""
    middle = (low + high) // 2
    name = f"experts{low}-{high - 1}"
    bound = _node("Constant", [], [f"{name}/bound"], value=_ints("", middle))
    less = _node("Less", ["its_route", f"{name}/bound"], [f"{name}/is_low"])
    branch = _node(
        "If", [f"{name}/is_low"], [out], name=name,
        then_branch=_branch(experts, low, middle, f"{name}/low"),
        else_branch=_branch(experts, middle, high, f"{name}/high"),
    )  # fmt: skip
    return [bound, less, branch]


def _branch(experts: list[GraphProto], low: int, high: int, out: str) -> GraphProto:
    """Return a branch: one expert with its weights inside, or the tree of several."""
    if high - low > 1:
        classes = experts[low].output[0].type.tensor_type.shape.dim[1].dim_value
        value = _value(out, TensorProto.FLOAT, [1, classes])
        return helper.make_graph(_tree(experts, low, high, out), out, [], [value])
    branch = graphs.renamed(experts[low], f"expert{low}/", {"clip": "one_clip", "logits": out})
    del branch.input[:]  # a branch sees one_clip in the scope around it
    del branch.value_info[:]  # its batch is N; here it is 1, which ONNX Runtime infers
    branch.output[0].type.tensor_type.shape.dim[0].dim_value = 1
    return branch


def _ints(name: str, value: int | list[int]) -> TensorProto:
    return from_array(np.asarray(value, np.int64), name)
