"""What a backend makes of a bundle's int8 layers on this CPU: int8, or float after all.

A graph may hold every Q/DQ pair that was asked for, and be computed in float: by what a backend
says of its own optimised graph it is seen. What it does not show is not proven.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import onnx

from vmoe.bundle import Bundle, Part
from vmoe.runtime.engines import BackendSettings

from . import layers
from .gates import Gate
from .precision import Proof

# As OpenVINO calls layers with weights, and those whose inside it does not show.
OPENVINO_LAYERS = ("Convolution", "FullyConnected", "MatMul", "Deconvolution")
OPENVINO_CLOSED = ("If", "Loop", "TensorIterator")
OPENVINO_INT8 = ("i8", "u8")


class Executed(NamedTuple):
    """What a backend makes of one part's layers.

    Attributes:
        layers: how many run in each precision, `int8` or `float`.
        why: why that is not shown; None where it is.
    """

    layers: dict[str, int]
    why: str | None = None

    def to_report(self) -> dict[str, int] | str:
        """Return it as report.json has it."""
        return self.layers if self.why is None else f"not proven: {self.why}"


def on(backend: str, bundle: Bundle) -> dict[str, Executed]:
    """Ask a backend what it makes of each part's layers."""
    ask = ASKED.get(backend)
    if ask is None:
        unknown = Executed({}, f"{backend} does not show what it runs")
        return dict.fromkeys(bundle.parts, unknown)
    return {name: ask(bundle, part) for name, part in bundle.parts.items()}


def gate(backend: str, proofs: Sequence[Proof], ran: Mapping[str, Executed]) -> Gate:
    """Judge whether a backend runs as int8 what was asked to be; what is not proven is not."""
    missed, whys = 0, []
    for proof in proofs:
        asked, found = proof.asked.get("int8", 0), ran[proof.part]
        missed += max(0, asked - found.layers.get("int8", 0))
        if asked and found.why is not None:
            whys.append(f"{proof.part} is not proven: {found.why}")
    shown = f" ({'; '.join(whys[:1])})" if whys else ""
    return Gate("precision", f"int8 layers that {backend} runs in float{shown}", missed, 0)


def _onnxruntime(bundle: Bundle, part: Part) -> Executed:
    """Read the graph that ONNX Runtime saves after its own passes."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        try:
            onnxruntime.InferenceSession(
                str(bundle.path / part.file), options, providers=["CPUExecutionProvider"]
            )
            saved = onnx.load(options.optimized_model_filepath, load_external_data=False)
        except Exception as e:  # ORT's errors share no base class but Exception
            why = str(e).strip().splitlines() or [type(e).__name__]
            return Executed({}, f"onnxruntime cannot save its optimised graph: {why[0][:150]}")
        return Executed(layers.runs_as(saved))


def _openvino(bundle: Bundle, part: Part) -> Executed:
    """Read the graph that OpenVINO shows of a compiled part."""
    from vmoe.runtime.engines import openvino

    compiled, _ = openvino.open(BackendSettings(bundle.path, "cpu", 1)).compiled(
        bundle.path / part.file
    )
    nodes = [op.get_rt_info() for op in compiled.get_runtime_model().get_ops()]
    kinds = [_said(node, "layerType") for node in nodes]
    if any(kind in OPENVINO_CLOSED for kind in kinds):
        return Executed({}, "openvino does not show what it runs inside of one file, which "
                        "--lowering split has apart")  # fmt: skip
    return Executed(
        layers.counts(
            "int8" if _said(node, "runtimePrecision") in OPENVINO_INT8 else "float"
            for node, kind in zip(nodes, kinds, strict=True)
            if kind in OPENVINO_LAYERS
        )
    )


def _said(node: Any, key: str) -> str:
    return str(node[key].astype(str)) if key in node else ""


ASKED: dict[str, Callable[[Bundle, Part], Executed]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
