"""Let a branch hold the weights that it alone reads.

before: w;  If(c, then: Conv(x, w), else: Conv(x, v))      w, v beside the If
after:  If(c, then: w; Conv(x, w), else: v; Conv(x, v))

ONNX Runtime lays weights out for the CPU's vectors only in the graph that holds them: an expert
whose weights lie outside of its branch costs 1.75x.
"""

from __future__ import annotations

from onnx import GraphProto

from vmoe.export import graphs
from vmoe.export.passes._builder import taken


def apply(graph: GraphProto) -> bool:
    """Move every initializer down to the innermost graph that holds all its readers."""
    changed = False
    inner = [(sub, taken(sub)) for sub in graphs.subgraphs(graph)]
    here = {name for node in graph.node for name in node.input}
    here |= {value.name for value in (*graph.input, *graph.output)}
    for tensor in list(graph.initializer):
        reading = [sub for sub, names in inner if tensor.name in names]
        if tensor.name not in here and len(reading) == 1:
            reading[0].initializer.append(tensor)
            graph.initializer.remove(tensor)
            changed = True
    for sub, _ in inner:
        changed = apply(sub) or changed
    return changed
