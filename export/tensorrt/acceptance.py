"""One small graph for each plugin, so that TensorRT can say whether it takes them.

VmoeTopK        scores [N, 4] -> weights [N, 2], route [N, 2]
RoutedLinear    x [N, 8], expert [N], w [4, 6, 8], b [4, 6] -> y [N, 6]
RoutedConv3d    x [N, 4, 2, 6, 6], expert [N], w [4, 8, 4, 3, 3, 3], b [4, 8] -> y [N, 8, 2, 6, 6]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import TensorProto, helper
from onnx.numpy_helper import from_array

M = 4  # experts
OPSET, IR = 20, 10
DOMAIN, VERSION = "vmoe", "1"


def graphs() -> dict[str, bytes]:
    """Return a graph for each plugin, by its name."""
    return {
        "VmoeTopK": _graph("VmoeTopK", [("scores", [M])], ["weights", "route"], k=[2]),
        "RoutedLinear": _graph("RoutedLinear", [("x", [8])], ["y"], (M, 6, 8)),
        "RoutedConv3d": _graph(
            "RoutedConv3d", [("x", [4, 2, 6, 6])], ["y"], (M, 8, 4, 3, 3, 3),
            strides=[1, 1, 1], pads=[1] * 6,
        ),
    }  # fmt: skip


def _graph(
    kind: str, given: Sequence[tuple[str, list[int]]], answers: Sequence[str],
    weights: tuple[int, ...] = (), **attributes: Any,
) -> bytes:  # fmt: skip
    """Return a model of one node; with weights it takes the expert of each row as well."""
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", *shape])
              for name, shape in given]  # fmt: skip
    held = []
    if weights:
        inputs.append(helper.make_tensor_value_info("expert", TensorProto.INT32, ["N"]))
        rng = np.random.default_rng(0)
        held = [from_array(rng.standard_normal(shape).astype(np.float32), name)
                for name, shape in (("w", weights), ("b", weights[:2]))]  # fmt: skip
    names = [value.name for value in inputs] + [tensor.name for tensor in held]
    node = helper.make_node(kind, names, list(answers), domain=DOMAIN, plugin_namespace=DOMAIN,
                            plugin_version=VERSION, **attributes)  # fmt: skip
    types = {"route": TensorProto.INT32}
    outputs = [helper.make_tensor_value_info(name, types.get(name, TensorProto.FLOAT), None)
               for name in answers]  # fmt: skip
    model = helper.make_model(
        helper.make_graph([node], kind, inputs, outputs, held), ir_version=IR,
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)],
    )  # fmt: skip
    return bytes(model.SerializeToString())
