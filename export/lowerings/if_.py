"""`if`: one file that routes by itself; an expert runs if a clip is its own, for those clips alone.

    clip, route -- for each expert i: the rows where route is i
                                      Loop over them, which may be none: expert i -- its logits
                -- all logits, in the order of the clips

An expert's weights are initializers inside its loop. Outside of it, ONNX Runtime cannot lay them
out for the CPU's vectors, and a clip costs 1.75x.

A Loop of no trips is what an If would be. Not If inside If inside one Loop: ONNX Runtime checks
and infers what is in a subgraph once more for each graph around it, and loads three levels half as
fast as one. And not an expert's clips as one batch: what it needs in memory would grow with that.
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
    """Return the nodes that make `logits` of `clip` and `route` (int64), expert after expert."""
    nodes = [_node("Constant", [], ["axis"], value=ints("", [0]))]
    every = range(len(experts))
    for i, expert in enumerate(experts):
        own = f"own{i}"
        nodes += [
            _node("Constant", [], [f"{own}/expert"], value=ints("", i)),
            _node("Equal", ["route", f"{own}/expert"], [f"{own}/is"]),
            _node("NonZero", [f"{own}/is"], [f"{own}/found"]),
            _node("Squeeze", [f"{own}/found", "axis"], [f"{own}/rows"]),
            _node("Size", [f"{own}/rows"], [f"{own}/count"]),
            _node("Loop", [f"{own}/count", ""], [f"{own}/logits"], name=f"clips{i}",
                  body=_body(expert, i)),
        ]  # fmt: skip
    return [
        *nodes,
        _node("Concat", [f"own{i}/logits" for i in every], ["grouped"], axis=0),
        _node("Concat", [f"own{i}/rows" for i in every], ["order"], axis=0),
        _node("Shape", ["order"], ["clips"]),
        _node("TopK", ["order", "clips"], ["sorted", "back"], axis=0, largest=0, sorted=1),
        _node("Gather", ["grouped", "back"], ["logits"], axis=0),
    ]


def _body(expert: GraphProto, i: int) -> GraphProto:
    """Return a loop's body: the expert on clip rows[n] alone, [1, T, H, W, 3], to its logits, [K].

    Its weights are inside.
    """
    name, one = f"expert{i}", f"own{i}"
    graph = graphs.renamed(expert, f"{name}/", {"clip": f"{one}/clip", "logits": f"{one}/answer"})
    del graph.value_info[:]  # its batch is N; here it is 1, which ONNX Runtime infers
    row = _value(f"{one}/row", TensorProto.FLOAT, [_one_file.classes_of(expert)])
    nodes = [
        _node("Identity", [f"{one}/go"], [f"{one}/go_on"]),
        _node("Unsqueeze", [f"{one}/n", "axis"], [f"{one}/at"]),
        _node("Gather", [f"{one}/rows", f"{one}/at"], [f"{one}/row_at"], axis=0),
        _node("Gather", ["clip", f"{one}/row_at"], [f"{one}/clip"], axis=0),
        *graph.node,
        _node("Squeeze", [f"{one}/answer", "axis"], [f"{one}/row"]),
    ]
    return helper.make_graph(
        nodes,
        name,
        [_value(f"{one}/n", TensorProto.INT64, []), _value(f"{one}/go", TensorProto.BOOL, [])],
        [_value(f"{one}/go_on", TensorProto.BOOL, []), row],
        graph.initializer,
    )
