"""One small graph for each plugin: whether TensorRT takes it, and answers as NumPy does.

VmoeTopK        scores [N, 4] -> weights [N, 2], route [N, 2]
RoutedLinear    x [N, 8], expert [N], w [4, 6, 8], b [4, 6] -> y [N, 6]
RoutedConv3d    x [N, 4, 2, 6, 6], expert [N], w [4, 8, 4, 3, 3, 3], b [4, 8] -> y [N, 8, 2, 6, 6]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from onnx import ValueInfoProto, helper
from onnx.numpy_helper import from_array

from vmoe.errors import EngineMismatchError
from vmoe.runtime.engines import _trt
from vmoe.runtime.engines._cuda import Gpu
from vmoe.runtime.engines._trt import checked, constructed
from vmoe.runtime.engines.tensorrt import LEAST_ARENA

M = 4  # experts
OPSET, IR = 20, 10
DOMAIN, VERSION = "vmoe", "1"
ROWS = 3
BOUND = 1e-4  # of answers to NumPy's, as a share of the largest: sums are of float32
Arrays = dict[str, NDArray[Any]]


class Trial(NamedTuple):
    """One plugin, and what it should say.

    Attributes:
        graph: an ONNX of one node.
        given: its inputs.
        wanted: the answers to them.
    """

    graph: bytes
    given: Arrays
    wanted: Arrays


def trials() -> dict[str, Trial]:
    """Return a trial of each plugin, by its name."""
    rng = np.random.default_rng(0)

    def noise(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal(shape).astype(np.float32)

    scores, expert = noise(ROWS, M), np.array([2, 0, 2], np.int32)
    route = np.argsort(-scores, axis=1, kind="stable")[:, :2]
    e = np.exp(scores - scores.max(axis=1, keepdims=True))
    share = np.take_along_axis(e / e.sum(axis=1, keepdims=True), route, axis=1)
    topk = _trial("VmoeTopK", {"scores": scores}, {},
                  {"weights": share, "route": route.astype(np.int32)}, k=2)  # fmt: skip
    x, w, b = noise(ROWS, 8), noise(M, 6, 8), noise(M, 6)
    linear = _trial("RoutedLinear", {"x": x, "expert": expert}, {"w": w, "b": b},
                    {"y": np.einsum("ni,noi->no", x, w[expert]) + b[expert]}, relu=0)  # fmt: skip
    x, w, b = noise(ROWS, 4, 2, 6, 6), noise(M, 8, 4, 3, 3, 3), noise(M, 8)
    seen = sliding_window_view(np.pad(x, [(0, 0)] * 2 + [(1, 1)] * 3), (3, 3, 3), axis=(2, 3, 4))
    y = np.einsum("ncthwijk,nocijk->nothw", seen, w[expert]) + b[expert][..., None, None, None]
    conv = _trial("RoutedConv3d", {"x": x, "expert": expert}, {"w": w, "b": b}, {"y": y},
                  strides=[1, 1, 1], pads=[1] * 6, relu=0, tf32=0)  # fmt: skip
    return {"VmoeTopK": topk, "RoutedLinear": linear, "RoutedConv3d": conv}


def difference(trt: Any, gpu: Gpu, plan: bytes, name: str, trial: Trial) -> float:
    """Run a plan once; return the largest difference of an answer, as a share of the largest.

    Args:
        trt: the module tensorrt.
        gpu: the GPU, current in this thread.
        plan: of the trial's graph.
        name: the plugin's, for messages.
        trial: what it is given, and should say.

    Raises:
        EngineMismatchError: TensorRT or CUDA refuses a call, or an answer has another shape.
    """
    found = _run(trt, gpu, plan, name, trial)
    return max(float(np.abs(found[k] - wanted).max() / np.abs(wanted).max())
               for k, wanted in trial.wanted.items())  # fmt: skip


def _run(trt: Any, gpu: Gpu, plan: bytes, name: str, trial: Trial) -> Arrays:
    log_ = _trt.logger(trt)

    def must(value: Any, what: str) -> Any:
        return checked(value, f"{name}: {what}", log_)

    runtime = constructed(lambda: trt.Runtime(log_), "Runtime", log_)
    engine = must(runtime.deserialize_cuda_engine(plan), "deserialize_cuda_engine")
    strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    context = must(engine.create_execution_context(strategy), "create_execution_context")
    size = max(LEAST_ARENA, engine.device_memory_size_v2)
    context.set_device_memory(gpu.alloc(size), size)
    for tensor, value in trial.given.items():
        must(context.set_input_shape(tensor, value.shape), "set_input_shape")
        held, address = gpu.pinned(value.nbytes), gpu.alloc(value.nbytes)
        held[:] = value.reshape(-1).view(np.uint8)
        gpu.upload(held, address)
        must(context.set_tensor_address(tensor, address), "set_tensor_address")
    _trt.shapes(context, name, log_)
    answers = {}
    for tensor, wanted in trial.wanted.items():
        shape = tuple(context.get_tensor_shape(tensor))
        if shape != wanted.shape:
            raise EngineMismatchError(
                f"{name}: {tensor} has the shape {list(shape)}, not {list(wanted.shape)}."
            )
        answers[tensor] = gpu.pinned(wanted.nbytes), gpu.alloc(wanted.nbytes)
        must(context.set_tensor_address(tensor, answers[tensor][1]), "set_tensor_address")
    must(context.execute_async_v3(gpu.stream), "execute_async_v3")
    for held, address in answers.values():
        gpu.download(address, held)
    gpu.wait()
    return {tensor: answers[tensor][0].view(wanted.dtype).reshape(wanted.shape).copy()
            for tensor, wanted in trial.wanted.items()}  # fmt: skip


def _trial(kind: str, given: Arrays, weights: Arrays, wanted: Arrays, **attributes: Any) -> Trial:
    return Trial(_graph(kind, given, weights, wanted, **attributes), given, wanted)


def _graph(
    kind: str, given: Arrays, weights: Arrays, wanted: Arrays, **attributes: Any
) -> bytes:  # fmt: skip
    """Return a model of one node, for any number of rows; attributes as the lowering has them."""
    inputs, outputs = _values(given), _values(wanted)
    held = [from_array(value, name) for name, value in weights.items()]
    node = helper.make_node(
        kind, [*given, *weights], [*wanted], domain=DOMAIN, plugin_namespace=DOMAIN,
        plugin_version=VERSION, **attributes,
    )  # fmt: skip
    model = helper.make_model(
        helper.make_graph([node], kind, inputs, outputs, held), ir_version=IR,
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)],
    )  # fmt: skip
    return bytes(model.SerializeToString())


def _values(arrays: Arrays) -> Sequence[ValueInfoProto]:
    return [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(value.dtype), ["N", *value.shape[1:]]
        )
        for name, value in arrays.items()
    ]
