"""`if`: one file that routes by itself; an expert runs if a clip is its own, for its clips alone.

    clip, route -- the rows where route is 0 -- Loop over them: expert 0, its logits to that row
                -- the rows where route is 1 -- Loop over them: expert 1, into the same logits
                ...

An expert's weights are initializers inside its loop. Outside of it, ONNX Runtime cannot lay them
out for the CPU's vectors, and a clip costs 1.75x.

A Loop of no trips is what an If would be, and hands on the logits so far. (As outputs of their own,
to be put in order behind the loops, OpenVINO keeps those of the call before.) Not If inside If
inside one Loop: ONNX Runtime checks and infers what is in a subgraph once more for each graph
around it, and loads three levels half as fast as one. And not an expert's clips as one batch: what
it needs in memory would grow with that.
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
    nodes = [
        _node("Constant", [], ["axis"], value=ints("", [0])),
        _node("Constant", [], ["classes"], value=ints("", [_one_file.classes_of(experts[0])])),
        _node("Shape", ["route"], ["clips"]),
        _node("Concat", ["clips", "classes"], ["clips_by_classes"], axis=0),
        _node("ConstantOfShape", ["clips_by_classes"], ["none"]),
    ]
    so_far = "none"
    for i, expert in enumerate(experts):
        own = f"own{i}"
        out = "logits" if i == len(experts) - 1 else f"{own}/done"
        nodes += [
            _node("Constant", [], [f"{own}/expert"], value=ints("", i)),
            _node("Equal", ["route", f"{own}/expert"], [f"{own}/is"]),
            _node("NonZero", [f"{own}/is"], [f"{own}/found"]),
            _node("Squeeze", [f"{own}/found", "axis"], [f"{own}/rows"]),
            _node("Size", [f"{own}/rows"], [f"{own}/count"]),
            _node("Loop", [f"{own}/count", "", so_far], [out], name=f"clips{i}",
                  body=_body(expert, i)),
        ]  # fmt: skip
        so_far = out
    return nodes


def _body(expert: GraphProto, i: int) -> GraphProto:
    """Return a loop's body: the expert on clip rows[n] alone, whose logits go into that row.

    Its weights are inside.
    """
    name, one = f"expert{i}", f"own{i}"
    graph = graphs.renamed(expert, f"{name}/", {"clip": f"{one}/clip", "logits": f"{one}/answer"})
    del graph.value_info[:]  # its batch is N; here it is 1, which ONNX Runtime infers
    logits: list[str | int | None] = ["N", _one_file.classes_of(expert)]
    nodes = [
        _node("Identity", [f"{one}/go"], [f"{one}/go_on"]),
        _node("Unsqueeze", [f"{one}/n", "axis"], [f"{one}/at"]),
        _node("Gather", [f"{one}/rows", f"{one}/at"], [f"{one}/row"], axis=0),
        _node("Gather", ["clip", f"{one}/row"], [f"{one}/clip"], axis=0),
        *graph.node,
        _node("Unsqueeze", [f"{one}/row", "axis"], [f"{one}/to"]),
        _node("ScatterND", [f"{one}/before", f"{one}/to", f"{one}/answer"], [f"{one}/after"]),
    ]
    return helper.make_graph(
        nodes,
        name,
        [
            _value(f"{one}/n", TensorProto.INT64, []),
            _value(f"{one}/go", TensorProto.BOOL, []),
            _value(f"{one}/before", TensorProto.FLOAT, logits),
        ],
        [
            _value(f"{one}/go_on", TensorProto.BOOL, []),
            _value(f"{one}/after", TensorProto.FLOAT, logits),
        ],
        graph.initializer,
    )
