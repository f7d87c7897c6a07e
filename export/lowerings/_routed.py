"""Experts of one graph as one expert whose layers take their weights by each clip's route.

    clip -- normalise -- RoutedConv3d(x, expert, w [M, ...], b [M, ...]) -- Relu, Add, ... -- logits
                                |
    route -- Cast to int32 -- expert [N]

What does not differ between the experts stays as it is, and stands there once. A convolution or a
matrix product whose weights differ becomes a routed node, with the weights of all experts stacked;
a Relu that alone follows it goes into it. A convolution over frames, [N * T, C, H, W] (tsm), is
one over time 1 whose rows take the route of their clip.

A node's type is that of a plugin (vmoe.runtime.plugins.nodes), and no operator's of ONNX, since
parsers look at nothing else. _meaning.py says what each means in ONNX's own operators.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, shape_inference
from onnx.numpy_helper import from_array, to_array

from vmoe.errors import SettingError
from vmoe.export import graphs
from vmoe.export.passes._builder import attributes, outer_names

DOMAIN, VERSION = "vmoe", "1"
NAMED = {"plugin_namespace": DOMAIN, "plugin_version": VERSION}  # by which parsers find a plugin
KINDS = (TensorProto.FLOAT, TensorProto.FLOAT16)  # of the kernels
PREFIX = "experts/"
BATCH = 2  # with which shapes are inferred: rows beyond it are several to a clip
_node = helper.make_node
Stacks = dict[str, NDArray[Any]]


def merged(experts: Sequence[ModelProto]) -> tuple[list[NodeProto], list[TensorProto]]:
    """Return the nodes from `clip` and `expert` (int32) to `logits`, and what they hold.

    Raises:
        SettingError: the experts are of different graphs, or differ in what no kernel routes.
    """
    bodies = [expert.graph for expert in experts]
    _check_alike(bodies)
    first = graphs.renamed(bodies[0], PREFIX, {"clip": "clip", "logits": "logits"})
    stacks = {PREFIX + name: value for name, value in _differing(bodies).items()}
    held = {t.name: to_array(t) for t in first.initializer if t.name not in stacks}
    shapes = {PREFIX + name: shape for name, shape in _shapes(experts[0]).items()}
    routes = _Routes(stacks, held, shapes, len(bodies))
    nodes = [made for node in first.node for made in routes.routed(node)]
    nodes = _fused(routes.before + nodes)
    used = {name for node in nodes for name in _taken(node)}
    constants = [t for t in first.initializer if t.name in used and t.name not in routes.made]
    constants += [from_array(value, name) for name, value in routes.made.items()]
    return nodes, constants


def top1() -> list[NodeProto]:
    """Return the nodes that make `free_route` (int64 [N]) of `scores`."""
    said: dict[str, Any] = {"name": "route", "domain": DOMAIN, "k": 1, **NAMED}
    return [
        _node("VmoeTopK", ["scores"], ["weights", "top"], **said),
        _node("Squeeze", ["top", "top_axis"], ["top_route"]),
        _node("Cast", ["top_route"], ["free_route"], to=TensorProto.INT64),
    ]


def _check_alike(bodies: Sequence[GraphProto]) -> None:
    """Refuse experts whose nodes are not the same."""
    forms = [[(n.op_type, n.input, n.output, n.attribute) for n in body.node] for body in bodies]
    for i, form in enumerate(forms):
        if form != forms[0]:
            raise SettingError(
                f"--lowering plugin routes the layers of one graph, and expert {i} has another "
                "than expert 0. Use --lowering split or if."
            )


def _differing(bodies: Sequence[GraphProto]) -> Stacks:
    """Return the initializers that are not equal in all experts, each over all experts.

    Raises:
        SettingError: one has not the same shape in all of them.
    """
    held = [{tensor.name: to_array(tensor) for tensor in body.initializer} for body in bodies]
    stacks: Stacks = {}
    for name, first in held[0].items():
        values = [own[name] for own in held if name in own]
        if len(values) < len(held) or any(v.shape != first.shape for v in values):
            raise SettingError(
                f"--lowering plugin stacks the experts' weights, and {name!r} is not of one shape "
                "in all of them. Use --lowering split or if, or one --keep-fp32 for all experts."
            )
        if not all(np.array_equal(value, first) for value in values):
            stacks[name] = np.stack(values)
    return stacks


def _shapes(expert: ModelProto) -> dict[str, list[int | None]]:
    """Return the shapes of an expert's values for BATCH clips, as far as they are known."""
    model = ModelProto()
    model.CopyFrom(expert)
    del model.graph.value_info[:]
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].Clear()
        if value.name == "clip":
            value.type.tensor_type.shape.dim[0].dim_value = BATCH
    found = shape_inference.infer_shapes(model, data_prop=True).graph
    return {
        value.name: [d.dim_value if d.HasField("dim_value") else None
                     for d in value.type.tensor_type.shape.dim]
        for value in found.value_info
    }  # fmt: skip


class _Routes:
    """Turns nodes into routed ones.

    Attributes:
        before: nodes that come before all others.
        made: the constants that routed nodes need, by name.
    """

    def __init__(
        self, stacks: Stacks, held: Stacks, shapes: Mapping[str, list[int | None]], experts: int
    ) -> None:
        self._stacks, self._held = stacks, held
        self._shapes, self._experts = shapes, experts
        self.before: list[NodeProto] = []
        self.made: Stacks = {}

    def routed(self, node: NodeProto) -> list[NodeProto]:
        """Return what a node becomes: itself, where all it takes is that of all experts.

        Raises:
            SettingError: no kernel does what it does.
        """
        if not _taken(node) & self._stacks.keys():
            return [node]
        weights = {name for name in node.input[1:] if name}
        if node.op_type in ("Conv", "Gemm", "MatMul") and weights <= (
            self._stacks.keys() | self._held.keys()
        ):
            return self._convolution(node) if node.op_type == "Conv" else self._linear(node)
        raise self._refused(node, f"no routed {node.op_type}")

    def _convolution(self, node: NodeProto) -> list[NodeProto]:
        said = attributes(node)
        w = self._stacked(node.input[1])
        axes = w.ndim - 3  # M, O, C
        pads = list(said.get("pads", [0] * 2 * axes))
        plain = said.get("group", 1) == 1 and set(said.get("dilations", [1])) == {1}
        plain = plain and said.get("auto_pad", b"NOTSET") in (b"NOTSET", b"")
        if not plain or pads[:axes] != pads[axes:] or axes not in (2, 3):
            raise self._refused(node, "no routed convolution with groups, dilations or uneven pads")
        lead = [0] * (3 - axes)
        kernel = {
            "strides": [1] * len(lead) + list(said.get("strides", [1] * axes)),
            "pads": (lead + pads[:axes]) * 2,
            "tf32": 0,
        }
        b, route = self._bias(node, w), self._route(node, axes + 2)
        if axes == 3:
            return [self._call("RoutedConv3d", node, node.input[0], route, w, b, kernel)]
        deep, flat = f"{node.output[0]}/deep", f"{node.output[0]}/flat"
        axis = self._constant(f"{PREFIX}time_axis", np.array([2], np.int64))
        w = w[:, :, :, None]
        return [
            _node("Unsqueeze", [node.input[0], axis], [deep]),
            self._call("RoutedConv3d", node, deep, route, w, b, kernel, flat),
            _node("Squeeze", [flat, axis], [node.output[0]]),
        ]

    def _linear(self, node: NodeProto) -> list[NodeProto]:
        said = attributes(node)
        w = self._stacked(node.input[1])
        plain = said.get("alpha", 1.0) == said.get("beta", 1.0) == 1 and not said.get("transA", 0)
        if not plain or w.ndim != 3:
            raise self._refused(node, f"no routed {node.op_type} of that form")
        if not said.get("transB", 0):
            w = w.transpose(0, 2, 1)
        b, route = self._bias(node, w), self._route(node, 2)
        return [self._call("RoutedLinear", node, node.input[0], route, w, b, {})]

    def _call(
        self, kind: str, node: NodeProto, x: str, route: str, w: NDArray[Any], b: NDArray[Any],
        kernel: dict[str, Any], out: str | None = None,
    ) -> NodeProto:  # fmt: skip
        if helper.np_dtype_to_tensor_dtype(w.dtype) not in KINDS:
            raise self._refused(node, f"no routed layers in {w.dtype}")
        bias = node.input[2] if len(node.input) > 2 else f"{node.input[1]}/no_bias"
        names = [self._constant(node.input[1], w), self._constant(bias, b)]
        return _node(
            kind, [x, route, *names], [out or node.output[0]], name=node.name, domain=DOMAIN,
            **kernel, relu=0, **NAMED,
        )  # fmt: skip

    def _stacked(self, name: str) -> NDArray[Any]:
        """Return a weight of all experts, [M, ...]."""
        if name in self._stacks:
            return self._stacks[name]
        return np.stack([self._held[name]] * self._experts)

    def _bias(self, node: NodeProto, w: NDArray[Any]) -> NDArray[Any]:
        if len(node.input) < 3 or not node.input[2]:
            return np.zeros(w.shape[:2], w.dtype)
        return np.broadcast_to(self._stacked(node.input[2]), w.shape[:2])

    def _route(self, node: NodeProto, rank: int) -> str:
        """Return the routes of a layer's rows: of clips, or each clip's as often as it has rows."""
        shape = self._shapes.get(node.input[0], [])
        rows = shape[0] if len(shape) == rank else None
        if rows is None or rows % BATCH:
            raise self._refused(node, "no routed layer whose rows are not those of the clips")
        if rows == BATCH:
            return "expert"
        each = rows // BATCH
        name = f"{PREFIX}expert/{each}_rows"
        if name not in {made.output[0] for made in self.before}:
            every = self._constant(f"{name}/each", np.array([1, each], np.int64))
            flat = self._constant(f"{name}/flat", np.array([-1], np.int64))
            last = self._constant(f"{name}/axis", np.array([1], np.int64))
            self.before += [
                _node("Unsqueeze", ["expert", last], [f"{name}/column"]),
                _node("Expand", [f"{name}/column", every], [f"{name}/square"]),
                _node("Reshape", [f"{name}/square", flat], [name]),
            ]
        return name

    def _constant(self, name: str, value: NDArray[Any]) -> str:
        self.made[name] = np.ascontiguousarray(value)
        return name

    def _refused(self, node: NodeProto, why: str) -> SettingError:
        return SettingError(
            f"--lowering plugin has {why}, and the experts differ in "
            f"{node.name or node.output[0]!r}. Use --lowering split or if."
        )


def _taken(node: NodeProto) -> set[str]:
    """Return the values that a node takes, or its subgraphs from around it."""
    return {*node.input, *outer_names(node)}


def _fused(nodes: list[NodeProto]) -> list[NodeProto]:
    """Return the nodes without a Relu that alone reads what a routed node gives."""
    readers: dict[str, list[NodeProto]] = {}
    for node in nodes:
        for name in _taken(node):
            readers.setdefault(name, []).append(node)
    gone: set[int] = set()
    for node in nodes:
        after = readers.get(node.output[0], [])
        if node.domain == DOMAIN and len(after) == 1 and after[0].op_type == "Relu":
            next(a for a in node.attribute if a.name == "relu").i = 1
            node.output[:] = after[0].output
            gone.add(id(after[0]))
    return [node for node in nodes if id(node) not in gone]
