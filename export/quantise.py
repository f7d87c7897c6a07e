"""int8: Q/DQ pairs around what ONNX Runtime's quantiser knows, ranges from calibration clips.

before: Conv(x, w) -- Relu
after:  DQ(Q(x)), DQ(w as int8, a scale for each output channel), DQ(bias as int32) -- Conv -- Q

Two forms. u8s8: activations uint8, weights int8; ONNX Runtime runs every convolution as
QLinearConv. s8s8: activations int8 and symmetric, so that every zero point is 0, biases float, as
TensorRT's parser wants it; ONNX Runtime leaves many of those convolutions in float.

Pixels are scaled in float: it is a multiplication of what is a byte already, and a Q/DQ pair on
each side of it took a tenth of the time of a large expert, half of that of a small one.

Logits and scores are not quantised: the largest of a calibration is no bound for the largest in
service, and a saturated logit is the one that decides.

Only plain and directly unrolled graphs are taken: Winograd's transforms enlarge the ranges.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from onnx import GraphProto, ModelProto

from vmoe.clips import Clips

from . import graphs, layers, optimize
from .passes._builder import Constants
from .precision import PrecisionSettings

log = logging.getLogger("vmoe.export")
BATCH = 8  # clips of one run of the calibration


def quantise(model: ModelProto, part: str, clips: Clips, settings: PrecisionSettings) -> ModelProto:
    """Return a part with Q/DQ pairs; the same for the same graph and clips.

    Args:
        model: the part in fp32, from `clip`.
        part: its name.
        clips: uint8 [N, T, H, W, 3], that give the ranges: the smallest and largest value seen.
        settings: the form, and the layers that stay fp32.
    """
    from onnxruntime import quantization as ort

    held = layers.of_model(model, part)
    kept = [layer.node for layer in held if settings.keeps(layer.place)]
    if len(kept) == len(held):
        return model
    source = ModelProto()  # the quantiser changes what it is given
    source.CopyFrom(model)
    for apply in optimize.QUANTISED:
        apply(source.graph)
    kept += _scaling(source.graph)
    symmetric = settings.int8_form == "s8s8"
    options = {"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]}
    if symmetric:
        options |= _symmetric()
    with tempfile.TemporaryDirectory() as folder, _quiet():
        path = Path(folder) / "int8.onnx"
        ort.quantize_static(
            source, path, _reader(ort, clips),
            quant_format=ort.QuantFormat.QDQ,
            calibrate_method=ort.CalibrationMethod.MinMax,
            per_channel=True,
            activation_type=ort.QuantType.QInt8 if symmetric else ort.QuantType.QUInt8,
            weight_type=ort.QuantType.QInt8,
            nodes_to_exclude=kept,
            extra_options=options,
        )  # fmt: skip
        made = onnx.load(path)
    for apply in optimize.RANGED:
        apply(made.graph)
    return graphs.model(made.graph, model)


def _scaling(graph: GraphProto) -> list[str]:
    """Return the nodes that multiply by a constant or add one: no layers, and cheap as they are."""
    constants = Constants(graph)
    return [
        node.name
        for node in graph.node
        if node.op_type in ("Mul", "Add") and any(name in constants for name in node.input)
    ]


def _symmetric() -> dict[str, Any]:
    return {
        "ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False,
        "AddQDQPairToWeight": True,
    }  # fmt: skip


def _reader(ort: Any, clips: Clips) -> Any:
    """Return clips in batches, as the quantiser asks for them."""
    batches = [clips[at : at + BATCH] for at in range(0, len(clips), BATCH)]

    class Reader(ort.CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, Clips] | None:
            return {"clip": batches.pop(0)} if batches else None

    return Reader()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the quantiser's advice out of the user's sight; it logs to the root."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = [logging.NullHandler()]
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
