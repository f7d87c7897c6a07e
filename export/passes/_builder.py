"""What a pass reads of a graph, and what it writes instead."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from vmoe.export import graphs

CHANNELS_FIRST = [0, 4, 1, 2, 3]  # [N, T, H, W, C] -> [N, C, T, H, W]


def attributes(node: NodeProto) -> dict[str, Any]:
    """Return a node's attributes as Python values."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


class Constants(Mapping[str, NDArray[Any]]):
    """The constant values of a graph by name: its initializers and Constant nodes."""

    def __init__(self, graph: GraphProto) -> None:
        """Look at a graph; a value is decoded when it is asked for."""
        self._tensors: dict[str, TensorProto] = {t.name: t for t in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant" and "value" in attributes(node):
                self._tensors[node.output[0]] = attributes(node)["value"]
        for value in graph.input:  # an initializer that a caller may override is no constant
            self._tensors.pop(value.name, None)

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Return a value."""
        return numpy_helper.to_array(self._tensors[name])

    def __iter__(self) -> Any:
        """Go over the names."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """Count them."""
        return len(self._tensors)


def readers(graph: GraphProto) -> dict[str, list[NodeProto]]:
    """Return, for each value, the nodes that read it, through their subgraphs too."""
    found: dict[str, list[NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in {*node.input, *outer_names(node)} - {""}:
            found[name].append(node)
    return found


def way(graph: GraphProto, last: str) -> list[NodeProto]:
    """Return the nodes from a graph's input to the first of a type.

    Each is the only one to read what the one before it gives; where they part, the way ends.
    """
    reading, outputs = readers(graph), {value.name for value in graph.output}
    found: list[NodeProto] = []
    name = graph.input[0].name
    while len(reading[name]) == 1 and name not in outputs:
        found.append(reading[name][0])
        name = found[-1].output[0]
        if found[-1].op_type == last:
            break
    return found


def outer_names(node: NodeProto) -> set[str]:
    """Return the values that a node's subgraphs take from around them."""
    found: set[str] = set()
    for attribute in node.attribute:
        for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            found |= taken(inner)
    return found


def taken(graph: GraphProto) -> set[str]:
    """Return the values that a graph takes from around it."""
    made = {name for node in graph.node for name in node.output}
    made |= {value.name for value in (*graph.input, *graph.initializer)}
    wanted = {value.name for value in graph.output}
    for node in graph.node:
        wanted |= {*node.input} | outer_names(node)
    return wanted - made - {""}


def prune(graph: GraphProto) -> None:
    """Take out nodes, weights and shapes that no output of the graph needs."""
    wanted = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            kept.append(node)
            wanted |= {*node.input} | outer_names(node)
    kept.reverse()
    weights = [tensor for tensor in graph.initializer if tensor.name in wanted]
    made = {name for node in kept for name in node.output}
    infos = [info for info in graph.value_info if info.name in made]
    for field, values in (("node", kept), ("initializer", weights), ("value_info", infos)):
        graph.ClearField(field)
        getattr(graph, field).extend(values)


class Builder:
    """New nodes and constants, under names that the graph does not have yet."""

    def __init__(self, graph: GraphProto) -> None:
        """Begin with nothing, beside a graph."""
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, TensorProto] = {}
        self._taken = {
            name for scope in graphs.walk(graph) for name in _names(scope)
        }  # fmt: skip
        self._again: Counter[str] = Counter()

    def fresh(self, name: str) -> str:
        """Return the name, or one like it where it is taken."""
        made = name
        while made in self._taken:
            self._again[name] += 1
            made = f"{name}~{self._again[name]}"
        self._taken.add(made)
        return made

    def node(self, op: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        """Add a node with one output; return the output's name."""
        out = self.fresh(name)
        self.nodes.append(helper.make_node(op, list(inputs), [out], out, **attributes))
        return out

    def constant(self, name: str, value: NDArray[Any]) -> str:
        """Add a constant; the same name means the same value, and is kept once."""
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(np.array(value, order="C"), name)
        return name

    def put_into(self, graph: GraphProto) -> None:
        """Let the nodes be those of the graph, and add the constants that they need."""
        del graph.node[:]
        graph.node.extend(self.nodes)
        graph.initializer.extend(self.constants.values())
        prune(graph)


def _names(graph: GraphProto) -> Iterable[str]:
    for thing in (*graph.input, *graph.output, *graph.initializer):
        yield thing.name
    for node in graph.node:
        yield from node.output
