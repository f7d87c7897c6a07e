"""`dense`: one file in which every expert runs on every clip, and the route selects. A baseline.

    clip -- expert0, expert1 ... -- [N, M, K] -- GatherND(route) -- logits

Numbers are those of the other lowerings; the cost is M experts a clip. It is what a mixture costs
where sparsity is not deployed, for comparison, and for engines without any control flow.
"""

from __future__ import annotations

from collections.abc import Sequence

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from vmoe.export import graphs

from . import _one_file
from ._one_file import ints

_node = helper.make_node


def lower(router: ModelProto | None, experts: Sequence[ModelProto]) -> dict[str, ModelProto]:
    """Return the part `moe`: clip -> logits [N, K], scores [N, M], route int64 [N]."""
    bodies = [expert.graph for expert in experts]
    if router is None:
        return _one_file.model(_one_file.alone(bodies[0]), experts[0])
    nodes, weights = _every(bodies)
    graph = _one_file.routed(router.graph, bodies, nodes, weights)
    return _one_file.model(graph, experts[0])


def _every(experts: Sequence[GraphProto]) -> tuple[list[NodeProto], list[TensorProto]]:
    """Return the nodes that run all experts and select by `route`, and their weights."""
    nodes: list[NodeProto] = []
    weights = [ints("experts/axis", [1])]
    for i, expert in enumerate(experts):
        own = graphs.renamed(expert, f"expert{i}/", {"clip": "clip"})
        nodes += own.node
        nodes.append(_node("Unsqueeze", [f"expert{i}/logits", "experts/axis"], [f"row{i}"]))
        weights += own.initializer
    rows = [f"row{i}" for i in range(len(experts))]
    nodes += [
        _node("Concat", rows, ["every"], axis=1),
        _node("Unsqueeze", ["route", "experts/axis"], ["which"]),
        _node("GatherND", ["every", "which"], ["logits"], batch_dims=1),
    ]
    return nodes, weights
