"""Take out what a tracer leaves behind: stack traces, local paths, doc strings.

before: Conv(clip, w) {namespace: "...", stack_trace: "File /home/me/model.py, line 8 ..."}
after:  Conv(clip, w)
"""

from __future__ import annotations

from typing import Any

from onnx import GraphProto

from vmoe.export.graphs import walk


def apply(graph: GraphProto) -> bool:
    """Clear doc strings and metadata of a graph, its subgraphs, nodes, values and weights."""
    changed = False
    for scope in walk(graph):
        held = (*scope.node, *scope.input, *scope.output, *scope.value_info, *scope.initializer)
        for thing in (scope, *held):
            changed = _clear(thing) or changed
        for node in scope.node:
            for attribute in node.attribute:
                changed = _clear(attribute) or changed
    return changed


def _clear(thing: Any) -> bool:
    changed = False
    for field in ("doc_string", "metadata_props"):
        if field in thing.DESCRIPTOR.fields_by_name and len(getattr(thing, field)):
            thing.ClearField(field)
            changed = True
    return changed
