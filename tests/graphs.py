"""Small graphs over clips for the tests of graph passes, and what ONNX Runtime makes of them."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, TensorProto, helper
from onnx.numpy_helper import from_array

from tests.twins import SPEC
from vmoe.export import graphs
from vmoe.export.onnx import trace
from vmoe.models import ModelSettings, build

OPSET, IR = 20, 10
onnxruntime.set_default_logger_severity(4)


class Writer:
    """A graph from `clip`, uint8 [N, T, H, W, 3], written layer by layer."""

    def __init__(self, frames: int, size: int, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.shape = (frames, size, size, 3)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []

    def node(self, op: str, *inputs: str, **attributes: object) -> str:
        out = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [out], **attributes))
        return out

    def constant(self, value: object, dtype: type = np.float32) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(from_array(np.asarray(value, dtype), name))
        return name

    def pixels(self) -> str:
        """Normalise the clip, as an exported twin does: [N, 3, T, H, W]."""
        x = self.node("Transpose", "clip", perm=[0, 4, 1, 2, 3])
        x = self.node("Cast", x, to=TensorProto.FLOAT)
        x = self.node("Div", x, self.constant(255))
        x = self.node("Sub", x, self.constant(np.reshape([0.4, 0.5, 0.6], (1, 3, 1, 1, 1))))
        return self.node("Div", x, self.constant(np.reshape([0.2, 0.3, 0.25], (1, 3, 1, 1, 1))))

    def conv(
        self, x: str, inner: int, outer: int, kernel: Sequence[int], *, bias: bool = False,
        group: int = 1, **attributes: object,
    ) -> str:  # fmt: skip
        shape = (outer, inner // group, *kernel)
        scale = 1 / np.sqrt(np.prod(shape[1:]))
        weights = [self.constant(self.rng.normal(0, scale, shape))]
        if bias:
            weights.append(self.constant(self.rng.normal(0, 1, outer)))
        return self.node("Conv", x, *weights, kernel_shape=list(kernel), group=group, **attributes)

    def head(self, x: str, channels: int) -> str:
        axes = self.constant([2, 3, 4], np.int64)
        x = self.node("ReduceMean", x, axes, keepdims=1)
        x = self.node("Reshape", x, self.constant([-1, channels], np.int64), allowzero=1)
        weight = self.constant(self.rng.normal(0, 1, (4, channels)))
        return self.node("Gemm", x, weight, self.constant(self.rng.normal(0, 1, 4)), transB=1)

    def frames_apart(self, x: str, frames: int, channels: int) -> str:
        """Return the mean of every frame by itself, [N, frames * channels]: none can hide."""
        parts = []
        for t in range(frames):
            at = [self.constant([i], np.int64) for i in (t, t + 1, 2)]
            axes = self.constant([2, 3, 4], np.int64)
            one = self.node("ReduceMean", self.node("Slice", x, *at), axes, keepdims=1)
            to = self.constant([-1, channels], np.int64)
            parts.append(self.node("Reshape", one, to, allowzero=1))
        return self.node("Concat", *parts, axis=1)

    def model(self, out: str) -> ModelProto:
        """Return the graph that ends in a value, checked."""
        self.nodes.append(helper.make_node("Identity", [out], ["logits"]))
        clip = helper.make_tensor_value_info("clip", TensorProto.UINT8, ["N", *self.shape])
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", None])
        graph = helper.make_graph(self.nodes, "expert", [clip], [logits], self.constants)
        opsets = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR)
        onnx.checker.check_model(model, full_check=True)
        return model


@functools.cache
def experts_of(
    family: str, width: float, experts: int, classes: int
) -> tuple[torch.nn.ModuleList, list[ModelProto]]:
    """Return experts whose batch normalisations are no identity, and their graphs."""
    twin = build(ModelSettings(family, width, experts, classes), SPEC, seed=5).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in twin.experts.state_dict().items():
            if tensor.ndim == 1 and "fc" not in name:  # of a batch normalisation
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return twin.experts, trace(list(twin.experts), "logits", SPEC.shape, 20)


def clips_for(model: ModelProto, n: int = 2) -> NDArray[np.uint8]:
    """Return noise of a graph's own size."""
    sizes = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim[1:]]
    return np.random.default_rng(7).integers(0, 256, (n, *sizes), np.uint8)


def run(model: ModelProto, clips: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Run a graph in ONNX Runtime, on one thread."""
    answer: NDArray[np.float32] = session(model).run(None, {"clip": clips})[0]
    return answer


def optimised(model: ModelProto, folder: Path) -> Counter[str]:
    """Return the kinds of nodes that ONNX Runtime makes of a graph; Conv+ adds in the same pass."""
    path = folder / "optimised.onnx"
    session(model, path)
    return Counter(_kind(node) for scope in _walk(onnx.load(path).graph) for node in scope.node)


def _kind(node: onnx.NodeProto) -> str:
    nchwc = "nchwc." * node.domain.endswith("nchwc")
    return f"{nchwc}{node.op_type}{'+' * (node.op_type == 'Conv' and len(node.input) > 3)}"


def _walk(graph: GraphProto) -> list[GraphProto]:
    return list(graphs.walk(graph))


def weight_bytes(graph: GraphProto) -> int:
    """Return the bytes of a graph's own initializers, those of its subgraphs left out."""
    return sum(map(graphs.tensor_bytes, graph.initializer))


def session(model: ModelProto, path: Path | None = None) -> onnxruntime.InferenceSession:
    """Return a session on one thread; `path` is where the optimised graph goes."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if path is not None:
        options.optimized_model_filepath = str(path)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def mean_of(answer: str, weight: np.ndarray) -> ModelProto:
    """Return a graph of the clip's mean colour times a matrix: an expert that needs no tracing."""
    initializers = [
        from_array(np.array([1, 2, 3], np.int64), "axes"),
        from_array(np.float32(255), "white"),
        from_array(weight.astype(np.float32), "module.1.fc.weight"),
    ]
    nodes = [
        helper.make_node("Cast", ["clip"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "axes"], ["sum"], keepdims=0),
        helper.make_node("Div", ["sum", "white"], ["mean"]),
        helper.make_node("Gemm", ["mean", "module.1.fc.weight"], [answer]),
    ]
    for node in nodes:
        node.name = node.op_type
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "part", [info("clip", TensorProto.UINT8, ["N", *SPEC.shape])],
        [info(answer, TensorProto.FLOAT, ["N", weight.shape[1]])], initializers,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
