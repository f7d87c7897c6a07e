"""Graph passes and what graphs are made of."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import GraphProto, TensorProto, helper
from onnx.numpy_helper import from_array

from vmoe import registry
from vmoe.bundle import Port
from vmoe.export import graphs
from vmoe.export import onnx as export_onnx
from vmoe.export.passes import strip_metadata


def nested() -> GraphProto:
    """Return y = x + w or x - w, each w inside its branch."""
    value = helper.make_tensor_value_info

    def branch(op: str) -> GraphProto:
        weight = from_array(np.ones(3, np.float32), f"w{op}")
        node = helper.make_node(op, ["x", f"w{op}"], [f"y{op}"])
        return helper.make_graph(
            [node], op, [], [value(f"y{op}", TensorProto.FLOAT, ["N", 3])], [weight]
        )

    branches = {"else_branch": branch("Sub"), "then_branch": branch("Add")}  # sorted by onnx
    node = helper.make_node("If", ["go"], ["y"], **branches)
    inputs = [value("x", TensorProto.FLOAT, ["N", 3]), value("go", TensorProto.BOOL, [])]
    return helper.make_graph([node], "outer", inputs, [value("y", TensorProto.FLOAT, ["N", 3])])


def spoiled() -> GraphProto:
    graph = nested()
    inner = graph.node[0].attribute[0].g
    for thing in (graph, inner, graph.node[0], inner.node[0], graph.input[0], inner.initializer[0]):
        thing.doc_string = "File /home/somebody/model.py"
        entry = thing.metadata_props.add()
        entry.key, entry.value = "pkg.torch.onnx.stack_trace", "File /home/somebody/model.py"
    graph.node[0].attribute[0].doc_string = "/home/somebody"
    return graph


def test_strip_metadata_clears_branches_too_and_nothing_else() -> None:
    graph = spoiled()
    assert strip_metadata.apply(graph)
    assert graph.SerializeToString() == nested().SerializeToString()
    assert not strip_metadata.apply(graph), "it says that it changed a graph that was clean"


@pytest.mark.parametrize("name", registry.names("vmoe.export.passes"))
def test_every_pass_is_in_the_list_keeps_a_graph_valid_and_settles(name: str) -> None:
    apply = registry.load("vmoe.export.passes", name, "pass").apply
    assert apply in export_onnx.PASSES
    graph = spoiled()
    apply(graph)
    assert not apply(graph), "a second time it still finds something to do"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)


def test_renamed_reaches_branches_and_leaves_the_original_alone() -> None:
    graph = nested()
    made = graphs.renamed(graph, "a/", {"x": "clip"})
    assert [value.name for value in made.input] == ["clip", "a/go"]
    inner = made.node[0].attribute[0].g
    assert list(inner.node[0].input) == ["clip", "a/wSub"]
    assert inner.initializer[0].name == "a/wSub"
    assert graph.SerializeToString() == nested().SerializeToString()


def test_walk_and_weight_bytes_tell_branches_from_the_graph_around_them() -> None:
    graph = nested()
    assert [scope.name for scope in graphs.walk(graph)] == ["outer", "Sub", "Add"]
    assert [graphs.weight_bytes(scope) for scope in graphs.walk(graph)] == [0, 12, 12]


def test_ports_have_free_sizes_as_none() -> None:
    assert graphs.ports(nested().input) == (
        Port("x", "float32", (None, 3)),
        Port("go", "bool", ()),
    )


def test_precision_is_what_the_weights_are() -> None:
    def model(*kinds: str) -> onnx.ModelProto:
        weights = [from_array(np.ones(2, kind), f"w{kind}") for kind in kinds]
        return helper.make_model(helper.make_graph([], "g", [], [], weights))

    assert export_onnx.precision(model("float32", "int64")) == "fp32"
    assert export_onnx.precision(model("float32", "float16")) == "fp16+fp32"
