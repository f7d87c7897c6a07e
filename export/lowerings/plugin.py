"""`plugin`: the dispatch as one node of the domain `vmoe`, which an engine can take elsewhere.

    clip, route -- Cast to int32 -- vmoe::Experts_1a2b3c4d(clip, expert) -- logits

In the part `moe` the node carries its own meaning, a model-local function: the Loop and If tree
of the lowering `if`, the weights inside the branches. ONNX Runtime unfolds it, and runs it as
fast. A second file, for TensorRT, has the same node without the function and with the weights as
the node's inputs, stacked over the experts [M, ...]: a plugin picks an expert's by its index.

TensorRT's parser up to 10.14 takes the function where there is one, so that the plugin would not
be seen: hence two files, written by this one composer. The node's type is a name that no other
model has (parsers ignore the domain), and plugin_namespace, plugin_version are what later parsers
look the plugin up by.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import onnx
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, helper
from onnx.numpy_helper import from_array, to_array

import vmoe
from vmoe.errors import SettingError

from . import _one_file, if_

DOMAIN = "vmoe"
VERSION = 1  # of the domain's operators, and of the plugin
ATTRIBUTES = ("plugin_namespace", "plugin_version", "experts")
_node = helper.make_node


def lower(router: ModelProto | None, experts: Sequence[ModelProto]) -> dict[str, ModelProto]:
    """Return the part `moe`: clip -> logits [N, K], scores [N, M], route int64 [N]."""
    bodies = [expert.graph for expert in experts]
    if router is None:
        return _one_file.model(_one_file.alone(bodies[0]), experts[0])
    name = op_type(experts)
    graph = _one_file.routed(router.graph, bodies, _call(name, len(experts), []))
    return {"moe": _model(graph, experts[0], [_function(name, bodies, experts[0])])}


def others(router: ModelProto | None, experts: Sequence[ModelProto]) -> dict[str, ModelProto]:
    """Return what other engines read, by the engine's name: `tensorrt`, without the function.

    Raises:
        SettingError: experts whose weights cannot be stacked, being of different graphs.
    """
    if router is None:
        return {}
    bodies = [expert.graph for expert in experts]
    weights = stacked(bodies)
    call = _call(op_type(experts), len(experts), [tensor.name for tensor in weights])
    graph = _one_file.routed(router.graph, bodies, call, weights)
    return {"tensorrt": _model(graph, experts[0], [])}


def op_type(experts: Sequence[ModelProto]) -> str:
    """Return a type for the node that no other model has: a hash of what it runs."""
    digest = hashlib.sha256()
    for expert in experts:
        digest.update(expert.SerializeToString(deterministic=True))
    return f"Experts_{digest.hexdigest()[:8]}"


def stacked(experts: Sequence[GraphProto]) -> list[TensorProto]:
    """Return the experts' weights, each tensor over all experts, [M, ...]; shapes are left out.

    Raises:
        SettingError: an expert has other tensors than the first.
    """
    held = [{tensor.name: tensor for tensor in expert.initializer} for expert in experts]
    made = []
    for name, first in held[0].items():
        if first.data_type in (TensorProto.INT64, TensorProto.BOOL):
            continue
        values = [to_array(own[name]) for own in held if name in own]
        if len({value.shape for value in values}) > 1 or len(values) < len(experts):
            raise SettingError(
                f"--lowering plugin stacks the experts' weights, and {name!r} is not of one shape "
                "in all of them. Use --lowering split or if, or one --keep-fp32 for all experts."
            )
        made.append(from_array(np.stack(values), f"experts/{name}"))
    return made


def _call(name: str, experts: int, weights: Sequence[str]) -> list[NodeProto]:
    """Return the nodes from `clip` and `route` to `logits`: the cast (plugins take no int64)."""
    return [
        _node("Cast", ["route"], ["expert"], to=TensorProto.INT32),
        _node(
            name, ["clip", "expert", *weights], ["logits"], name="experts", domain=DOMAIN,
            plugin_namespace=DOMAIN, plugin_version=str(VERSION), experts=experts,
        ),
    ]  # fmt: skip


def _function(name: str, experts: Sequence[GraphProto], like: ModelProto) -> FunctionProto:
    nodes = [_node("Cast", ["expert"], ["route"], to=TensorProto.INT64), *if_.dispatch(experts)]
    return helper.make_function(
        DOMAIN, name, ["clip", "expert"], ["logits"], nodes, list(like.opset_import),
        attributes=list(ATTRIBUTES),
    )  # fmt: skip


def _model(graph: GraphProto, like: ModelProto, functions: list[FunctionProto]) -> ModelProto:
    made = helper.make_model(
        graph,
        opset_imports=[*like.opset_import, helper.make_opsetid(DOMAIN, VERSION)],
        ir_version=like.ir_version,
        functions=functions,
        producer_name="vmoe",
        producer_version=vmoe.__version__,
    )
    onnx.checker.check_model(made)
    return made
