"""Fold scaling and normalisation of pixels into one multiplication and one addition.

before: Div(Sub(Div(x, 255), mean), std)
after:  Add(Mul(x, 1 / (255 std)), -mean / std)
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, NodeProto

from vmoe.export.passes._builder import Builder, Constants, readers

OPS = ("Add", "Sub", "Mul", "Div")
Affine = tuple[NDArray[np.float64], NDArray[np.float64]]


def apply(graph: GraphProto) -> bool:
    """Fold every chain of two or more steps by float32 constants."""
    constants, reading = Constants(graph), readers(graph)
    outputs = {value.name for value in graph.output}
    build = Builder(graph)
    folded: dict[str, list[NodeProto]] = {}  # by the output of a chain's last node
    chains: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        if _step(node, constants) is None:
            continue
        source = _variable(node, constants)
        chain = chains.pop(source, [])
        if chain and (len(reading[source]) > 1 or source in outputs):
            folded[source], chain = chain, []
        chains[node.output[0]] = [*chain, node]
    folded.update(chains)
    chosen = {out: chain for out, chain in folded.items() if _is_worth(chain)}
    if not chosen:
        return False
    gone = {node.output[0] for chain in chosen.values() for node in chain}
    for node in graph.node:
        out = node.output[0]
        if out in chosen:
            _write(build, chosen[out], constants)
        elif out not in gone:
            build.nodes.append(node)
    build.put_into(graph)
    return True


def _is_worth(chain: list[NodeProto]) -> bool:
    return len(chain) > 1 and [node.op_type for node in chain] != ["Mul", "Add"]


def _variable(node: NodeProto, constants: Constants) -> str:
    return str(next(name for name in node.input if name not in constants))


def _step(node: NodeProto, constants: Constants) -> Affine | None:
    """Return a and b of a node that computes a x + b with constants; None of any other."""
    if node.op_type not in OPS or sum(name in constants for name in node.input) != 1:
        return None
    first = node.input[0] in constants
    value = constants[node.input[0 if first else 1]]
    if value.dtype != np.float32 or (first and node.op_type == "Div"):
        return None
    c, one, zero = value.astype(np.float64), np.ones(()), np.zeros(())
    if node.op_type == "Sub":
        return (-one, c) if first else (one, -c)
    if node.op_type == "Add":
        return one, c
    return (c if node.op_type == "Mul" else one / c), zero


def _write(build: Builder, chain: list[NodeProto], constants: Constants) -> None:
    a: NDArray[np.float64] = np.ones(())
    b: NDArray[np.float64] = np.zeros(())
    for node in chain:
        step = _step(node, constants)
        assert step is not None
        a, b = step[0] * a, step[0] * b + step[1]
    out = chain[-1].output[0]
    scale = build.constant(build.fresh(f"{out}/scale"), a.astype(np.float32))
    shift = build.constant(build.fresh(f"{out}/shift"), b.astype(np.float32))
    scaled = build.node("Mul", [_variable(chain[0], constants), scale], f"{out}/scaled")
    build.nodes.append(NodeProto(op_type="Add", name=out, input=[scaled, shift], output=[out]))
