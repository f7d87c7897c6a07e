"""`if`: one file that routes by itself; per clip, only the branch of its expert runs.

    clip, route -- Loop over the clips of the batch: an If tree over its route -- logits
                     If(route < 2)  then If(route < 1) then expert0 else expert1
                                    else If(route < 3) then expert2 else expert3

An expert's weights are initializers inside its branch. Outside of it, ONNX Runtime cannot lay
them out for the CPU's vectors, and a clip costs 1.75x.

A tree of depth log2(M), not a chain: every expert is equally far, and no branch is deep. The Loop
makes any batch right, and each clip pays for its own expert alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from vmoe.export import graphs

from . import _one_file
from ._one_file import ints

_node = helper.make_node
_value = helper.make_tensor_value_info


def lower(router: ModelProto | None, experts: Sequence[ModelProto]) -> dict[str, ModelProto]:
    """Return the part `moe`: clip -> logits [N, K], scores [N, M], route int64 [N]."""
    bodies = [expert.graph for expert in experts]
    if router is None:
        return _one_file.model(_one_file.alone(bodies[0]), experts[0])
    graph = _one_file.routed(router.graph, bodies, dispatch(bodies))
    return _one_file.model(graph, experts[0])


def dispatch(experts: Sequence[GraphProto]) -> list[NodeProto]:
    """Return the nodes that make `logits` of `clip` and `route` (int64), clip after clip."""
    return [
        _node("Shape", ["clip"], ["batch"], start=0, end=1),
        _node("Squeeze", ["batch"], ["trips"]),
        _node("Loop", ["trips", ""], ["logits"], name="clips", body=_body(experts)),
    ]


def _body(experts: Sequence[GraphProto]) -> GraphProto:
    """Return the loop's body: clip number i alone, [1, T, H, W, 3], to its logits, [K]."""
    nodes = [
        _node("Identity", ["go"], ["go_on"]),
        _node("Unsqueeze", ["i", "body/axis"], ["at"]),
        _node("Gather", ["clip", "at"], ["one_clip"], axis=0),
        _node("Gather", ["route", "i"], ["its_route"], axis=0),
        *_tree(experts, 0, len(experts), "its_logits"),
        _node("Squeeze", ["its_logits", "body/axis"], ["row"]),
    ]
    row = _value("row", TensorProto.FLOAT, [_one_file.classes_of(experts[0])])
    return helper.make_graph(
        nodes,
        "body",
        [_value("i", TensorProto.INT64, []), _value("go", TensorProto.BOOL, [])],
        [_value("go_on", TensorProto.BOOL, []), row],
        [ints("body/axis", [0])],
    )


def _tree(experts: Sequence[GraphProto], low: int, high: int, out: str) -> list[NodeProto]:
    """Return the nodes that run expert low <= route < high; out: its logits, [1, K]."""
    middle = (low + high) // 2
    name = f"experts{low}-{high - 1}"
    bound = _node("Constant", [], [f"{name}/bound"], value=ints("", middle))
    less = _node("Less", ["its_route", f"{name}/bound"], [f"{name}/is_low"])
    branch = _node(
        "If", [f"{name}/is_low"], [out], name=name,
        then_branch=_branch(experts, low, middle, f"{name}/low"),
        else_branch=_branch(experts, middle, high, f"{name}/high"),
    )  # fmt: skip
    return [bound, less, branch]


def _branch(experts: Sequence[GraphProto], low: int, high: int, out: str) -> GraphProto:
    """Return a branch: one expert with its weights inside, or the tree of several."""
    if high - low > 1:
        value = _value(out, TensorProto.FLOAT, [1, _one_file.classes_of(experts[low])])
        return helper.make_graph(_tree(experts, low, high, out), out, [], [value])
    branch = graphs.renamed(experts[low], f"expert{low}/", {"clip": "one_clip", "logits": out})
    del branch.input[:]  # a branch sees one_clip in the scope around it
    del branch.value_info[:]  # its batch is N; here it is 1, which ONNX Runtime infers
    branch.output[0].type.tensor_type.shape.dim[0].dim_value = 1
    return branch
