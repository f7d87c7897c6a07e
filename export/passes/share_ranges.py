"""Give the values that are joined one range, so that joining them is a copy: for int8.

before: Q(Concat(DQ(x, s0), DQ(y, s1)), s2)
after:  Q(Concat(DQ(x, s), DQ(y, s)), s)                            s: of the union of the ranges

Else ONNX Runtime looks every byte up in a table: 2.6 times as slow for pixels of 32 channels. What
would become more than three times as wide (zeros, say, whose range says nothing) stays as it is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto, numpy_helper

from vmoe.export.passes._builder import Constants, prune, readers

Range = tuple[str, str]  # names of a scale and a zero point
MOST = 3  # times a range may become as wide: more would cost a value two bits
PAIR = ("QuantizeLinear", "DequantizeLinear")
BIASED = ("Conv", "Gemm")


def apply(graph: GraphProto) -> bool:
    """Widen the ranges of what is joined to their union, and scale the biases by it."""
    constants = Constants(graph)
    shared: dict[Range, Range] = {}
    for group in _groups(graph, constants):
        ranges = [(constants[scale], constants[zero]) for scale, zero in group]
        if len({zero.dtype for _, zero in ranges}) > 1:
            continue
        scale, zero = _union(ranges)
        alike = all(MOST * held >= scale for held, _ in ranges)
        if alike and len({(float(held), int(at)) for held, at in ranges}) > 1:
            first = group[0][0]
            names = f"{first}/shared", f"{first}/shared/zero"
            graph.initializer.extend(
                numpy_helper.from_array(value, name)
                for name, value in zip(names, (scale, zero), strict=True)
            )
            shared |= dict.fromkeys(group, names)
    for node in graph.node:
        stored = node.op_type in PAIR and node.input[0] in constants  # holds what it means
        if node.op_type in PAIR and not stored and tuple(node.input[1:]) in shared:
            node.input[1], node.input[2] = shared[node.input[1], node.input[2]]
    if shared:
        _scale_biases(graph)
    return bool(shared)


def _groups(graph: GraphProto, constants: Constants) -> Iterator[list[Range]]:
    """Return the ranges that must be one: those that meet in a Concat, directly or over others."""
    made = {name: node for node in graph.node for name in node.output}
    reading = readers(graph)
    groups: dict[Range, set[Range]] = {}
    for node in graph.node:
        if node.op_type != "Concat":
            continue
        around = [made.get(name) for name in node.input] + reading[node.output[0]]
        ranges = [_range(one, constants) for one in around]
        kinds = {one.op_type for one in reading[node.output[0]]}
        if None in ranges or kinds != {"QuantizeLinear"}:
            continue
        joined = set().union(*(groups.get(one, {one}) for one in ranges if one))
        groups |= dict.fromkeys(sorted(joined), joined)
    return (sorted(group) for group in {id(group): group for group in groups.values()}.values())


def _range(node: NodeProto | None, constants: Constants) -> Range | None:
    """Return the range of a Q or DQ node that has one for all of its values, not stored ones."""
    if node is None or node.op_type not in PAIR:
        return None
    if node.input[0] in constants:
        return None
    scale, zero = node.input[1], node.input[2] if len(node.input) > 2 else ""
    if scale not in constants or zero not in constants or constants[scale].size > 1:
        return None
    return scale, zero


def _union(
    ranges: Iterable[tuple[NDArray[Any], NDArray[Any]]],
) -> tuple[NDArray[np.float32], NDArray[Any]]:
    """Return scale and zero point of the range that holds all of them."""
    ends: dict[str, list[float]] = defaultdict(list)
    for scale, zero in ranges:
        kind, shape = np.iinfo(zero.dtype), scale.shape
        ends["low"].append((kind.min - int(zero)) * float(scale))
        ends["high"].append((kind.max - int(zero)) * float(scale))
    low, high = min(ends["low"]), max(ends["high"])
    made = np.float32((high - low) / (int(kind.max) - int(kind.min)))
    middle = np.clip(round(kind.min - low / float(made)), kind.min, kind.max)
    return np.full(shape, made, np.float32), np.full(shape, middle, kind.dtype)


def _scale_biases(graph: GraphProto) -> None:
    """Write the int32 biases anew whose scale is no more that of input times weights."""
    constants = Constants(graph)
    made = {name: node for node in graph.node for name in node.output}
    nodes: list[NodeProto] = []
    written: dict[tuple[str, str, bytes], str] = {}  # the value, by the old one and its scale
    for node in graph.node:
        parts = [made.get(name) for name in node.input]
        inner = [one for one in parts if one is not None and one.op_type == "DequantizeLinear"]
        if node.op_type in BIASED and len(parts) == len(inner) == 3:
            x, weight, bias = inner
            scale = (constants[x.input[1]] * constants[weight.input[1]]).astype(np.float32)
            key = bias.input[0], bias.input[1], scale.tobytes()
            if not np.array_equal(constants[bias.input[1]], scale) and key not in written:
                written[key] = f"{node.output[0]}/bias"  # of the first that needs this scale
                nodes.append(_scaled(graph, bias, constants, scale, written[key]))
            node.input[2] = written.get(key, node.input[2])
        nodes.append(node)
    kept = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)
    prune(graph)


def _scaled(
    graph: GraphProto, bias: NodeProto, constants: Constants, scale: NDArray[np.float32], out: str
) -> NodeProto:
    """Return the DQ node of a bias at another scale, and add its constants to the graph."""
    value = constants[bias.input[0]] * constants[bias.input[1]].astype(np.float64)
    kind = np.iinfo(np.int32)
    held = np.clip(np.rint(value / scale), kind.min, kind.max).astype(np.int32)
    graph.initializer.extend([
        numpy_helper.from_array(held, f"{out}/held"),
        numpy_helper.from_array(scale.reshape(constants[bias.input[1]].shape), f"{out}/scale"),
    ])  # fmt: skip
    made = NodeProto()
    made.CopyFrom(bias)
    made.name, made.output[0] = out, out
    made.input[0], made.input[1] = f"{out}/held", f"{out}/scale"
    return made
