"""`plugin`: the dispatch as nodes of the domain `vmoe`, which an engine can take elsewhere.

The part `moe` is for ONNX Runtime. Its one node carries its own meaning, a model-local function:
the loops of the lowering `if`, an expert's weights inside its own. ONNX Runtime unfolds it, and
runs it as fast.

    clip, route -- Cast to int32 -- vmoe::Experts_1a2b3c4d(clip, expert) -- logits

A second file is for TensorRT, whose plugins are layers (vmoe.runtime.plugins): VmoeTopK picks the
expert, RoutedConv3d and RoutedLinear take every clip's weights by its index. That file has no
function: TensorRT's parser up to 10.14 takes the function where there is one, so that the plugin
would not be seen. `with_functions` puts them back, and ONNX Runtime runs the same nodes.

A node's type is a name that no operator of ONNX has (parsers ignore the domain), and
plugin_namespace, plugin_version are what later parsers look the plugin up by.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence

import onnx
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

import vmoe
from vmoe.errors import SettingError

from . import _meaning, _one_file, _routed, if_

log = logging.getLogger("vmoe.export")

DOMAIN = _routed.DOMAIN
VERSION = int(_routed.VERSION)  # of the domain's operators, and of the plugins
ATTRIBUTES = (*_routed.NAMED, "experts")
_node = helper.make_node


def lower(router: ModelProto | None, experts: Sequence[ModelProto]) -> dict[str, ModelProto]:
    """Return the part `moe`: clip -> logits [N, K], scores [N, M], route int64 [N]."""
    bodies = [expert.graph for expert in experts]
    if router is None:
        return _one_file.model(_one_file.alone(bodies[0]), experts[0])
    name = op_type(experts)
    graph = _one_file.routed(router.graph, bodies, _call(name, len(experts)))
    return {"moe": _model(graph, experts[0], [_function(name, bodies, experts[0])])}


def others(router: ModelProto | None, experts: Sequence[ModelProto]) -> dict[str, ModelProto]:
    """Return what other engines read, by the engine's name: `tensorrt`.

    Experts that no kernel routes (int8; other graphs than the first) have none, and it is said.
    """
    if router is None:
        return {}
    try:
        return {"tensorrt": routed(router, experts)}
    except SettingError as e:
        log.warning("no file for TensorRT: %s", e)
        return {}


def routed(router: ModelProto, experts: Sequence[ModelProto]) -> ModelProto:
    """Return the mixture in routed layers, without functions.

    Raises:
        SettingError: no kernel routes what the experts differ in.
    """
    bodies = [expert.graph for expert in experts]
    nodes, constants = _routed.merged(experts)
    cast = _node("Cast", ["route"], ["expert"], to=TensorProto.INT32)
    axis = _one_file.ints("top_axis", [1])
    graph = _one_file.routed(
        router.graph, bodies, [cast, *nodes], [*constants, axis], _routed.top1()
    )
    return _model(graph, experts[0], [])


def with_functions(model: ModelProto, experts: int) -> ModelProto:
    """Return a routed model with the meaning of its nodes, for an engine that has no plugins."""
    opsets = [opset for opset in model.opset_import if opset.domain != DOMAIN]
    return _model(model.graph, model, _meaning.functions(experts, opsets))


def op_type(experts: Sequence[ModelProto]) -> str:
    """Return a type for the node that no other model has: a hash of what it runs."""
    digest = hashlib.sha256()
    for expert in experts:
        digest.update(expert.SerializeToString(deterministic=True))
    return f"Experts_{digest.hexdigest()[:8]}"


def _call(name: str, experts: int) -> list[NodeProto]:
    """Return the nodes from `clip` and `route` to `logits`: the cast (plugins take no int64)."""
    return [
        _node("Cast", ["route"], ["expert"], to=TensorProto.INT32),
        _node(
            name, ["clip", "expert"], ["logits"], name="experts", domain=DOMAIN,
            **_routed.NAMED, experts=experts,
        ),
    ]  # fmt: skip


def _function(name: str, experts: Sequence[GraphProto], like: ModelProto) -> FunctionProto:
    nodes = [_node("Cast", ["expert"], ["route"], to=TensorProto.INT64), *if_.dispatch(experts)]
    return helper.make_function(
        DOMAIN, name, ["clip", "expert"], ["logits"], nodes, list(like.opset_import),
        attributes=list(ATTRIBUTES),
    )  # fmt: skip


def _model(graph: GraphProto, like: ModelProto, functions: list[FunctionProto]) -> ModelProto:
    opsets = [opset for opset in like.opset_import if opset.domain != DOMAIN]
    made = helper.make_model(
        graph,
        opset_imports=[*opsets, helper.make_opsetid(DOMAIN, VERSION)],
        ir_version=like.ir_version,
        functions=functions,
        producer_name="vmoe",
        producer_version=vmoe.__version__,
    )
    onnx.checker.check_model(made)
    return made
