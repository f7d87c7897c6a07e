"""ONNX graphs as data: what is in them, subgraphs included, and copies under other names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import onnx
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    helper,
)

import vmoe
from vmoe.bundle import Port


def subgraphs(graph: GraphProto) -> Iterator[GraphProto]:
    """Yield the graphs directly inside a graph's nodes: branches and loop bodies."""
    for node in graph.node:
        yield from subgraphs_of(node)


def subgraphs_of(node: NodeProto) -> Iterator[GraphProto]:
    """Yield the graphs directly inside a node."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


def walk(graph: GraphProto) -> Iterator[GraphProto]:
    """Yield a graph and every graph inside of it, outer ones first."""
    yield graph
    for inner in subgraphs(graph):
        yield from walk(inner)


def scopes(model: ModelProto) -> Iterator[GraphProto]:
    """Yield every graph of a model: its own, those inside of it, and those inside its functions."""
    yield from walk(model.graph)
    for function in model.functions:
        for node in function.node:
            for inner in subgraphs_of(node):
                yield from walk(inner)


def tensor_bytes(tensor: TensorProto) -> int:
    """Return the bytes that a tensor's values take."""
    count = 1
    for size in tensor.dims:
        count *= size
    return count * int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def renamed(graph: GraphProto, prefix: str, names: Mapping[str, str]) -> GraphProto:
    """Return a copy whose values and nodes are all called anew, so that graphs can be joined.

    Args:
        graph: a graph.
        prefix: put before every name.
        names: values that get a name of their own instead, such as the graph's inputs.
    """
    made = GraphProto()
    made.CopyFrom(graph)
    for scope in walk(made):
        scope.name = prefix + scope.name
        for node in scope.node:
            node.name = node.name and prefix + node.name
            node.input[:] = [_new(name, prefix, names) for name in node.input]
            node.output[:] = [_new(name, prefix, names) for name in node.output]
        for named in (*scope.initializer, *scope.input, *scope.output, *scope.value_info):
            named.name = _new(named.name, prefix, names)
    return made


def _new(name: str, prefix: str, names: Mapping[str, str]) -> str:
    if not name:  # an optional input or output that is left out
        return name
    return names.get(name, prefix + name)


def model(graph: GraphProto, like: ModelProto) -> ModelProto:
    """Make a model of a graph, with the operator sets and functions of another; checked by onnx."""
    made = helper.make_model(
        graph,
        opset_imports=like.opset_import,
        ir_version=like.ir_version,
        functions=like.functions,
        producer_name="vmoe",
        producer_version=vmoe.__version__,
    )
    onnx.checker.check_model(made)
    return made


def ports(values: Iterable[ValueInfoProto]) -> tuple[Port, ...]:
    """Return inputs or outputs as the manifest has them; a named size is free (None)."""
    made = []
    for value in values:
        kind = value.type.tensor_type
        shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim)
        dtype = str(helper.tensor_dtype_to_np_dtype(kind.elem_type))
        made.append(Port(value.name, dtype, shape))
    return tuple(made)
