"""Pad the channels between convolutions to a multiple of 16, with weights of zero.

before: Conv(Relu(Conv(x, w)), v)          w [115, 32, 1, 3, 3], v [32, 115, 3, 1, 1]
after:  Conv(Relu(Conv(x, w')), v')        w' [128, 32, 1, 3, 3], v' [32, 128, 3, 1, 1]

The blocked layout (NCHWc) takes other counts with a copy into it and out of it around each layer.
A padded channel is 0 before the Relu and after it, and weights of 0 read it.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from onnx import GraphProto, NodeProto, numpy_helper

from vmoe.export.passes._builder import Constants, attributes, outer_names, prune

BLOCK = 16
KEEPS_ZERO = {"Add", "AveragePool", "Identity", "LeakyRelu", "MaxPool", "Relu", "Tanh"}


def apply(graph: GraphProto) -> bool:
    """Pad every set of values of one channel count that convolutions alone make and read."""
    constants, sets = Constants(graph), _Sets()
    for node in graph.node:
        if node.op_type in KEEPS_ZERO:
            for name in node.input:
                sets.join(name, node.output[0])
    counts: dict[str, set[int]] = defaultdict(set)
    fixed = {sets.of(value.name) for value in (*graph.input, *graph.output)}
    for node in graph.node:
        fixed |= {sets.of(name) for name in {*node.input} & set(constants)}
        if _is_dense(node, constants):
            counts[sets.of(node.output[0])].add(constants[node.input[1]].shape[0])
        elif node.op_type not in KEEPS_ZERO:
            fixed |= {sets.of(name) for name in (*node.input, *node.output, *outer_names(node))}
    more = {
        which: -count.copy().pop() % BLOCK
        for which, count in counts.items()
        if which not in fixed and len(count) == 1
    }
    changed = False
    for node in graph.node:
        if _is_dense(node, constants):
            inner, outer = (more.get(sets.of(name), 0) for name in (node.input[0], node.output[0]))
            if inner or outer:
                _pad(graph, node, constants, inner, outer)
                changed = True
    if changed:
        graph.ClearField("value_info")  # some of it has the old counts
        prune(graph)
    return changed


class _Sets:
    """Values of one channel count."""

    def __init__(self) -> None:
        self._above: dict[str, str] = {}

    def of(self, name: str) -> str:
        """Return the name that stands for a value's set."""
        while name in self._above:
            name = self._above[name]
        return name

    def join(self, a: str, b: str) -> None:
        a, b = self.of(a), self.of(b)
        if a != b:
            self._above[a] = b


def _is_dense(node: NodeProto, constants: Constants) -> bool:
    """Return whether a node is a convolution of constant weights, whose channels all meet."""
    weights = all(name in constants for name in node.input[1:] if name)
    return node.op_type == "Conv" and weights and attributes(node).get("group", 1) == 1


def _pad(graph: GraphProto, node: NodeProto, constants: Constants, inner: int, outer: int) -> None:
    """Give a convolution weights for more channels that come in and go out."""
    for i, name in enumerate(node.input):
        if i == 0 or not name:
            continue
        value = constants[name]
        rows = [(0, outer), (0, inner) if value.ndim > 1 else (0, 0)]
        made = np.pad(value, [*rows, *[(0, 0)] * value.ndim][: value.ndim])
        padded = f"{name}/padded{outer}-{inner}"
        if all(tensor.name != padded for tensor in graph.initializer):
            graph.initializer.append(numpy_helper.from_array(made, padded))
        node.input[i] = padded
