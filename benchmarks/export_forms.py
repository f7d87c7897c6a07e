"""What benchmarks/export.py compares: models as everybody exports them, and as vmoe does."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from onnx import ModelProto

from vmoe.checkpoint import Checkpoint
from vmoe.clips import Clips, ClipSpec
from vmoe.export import onnx, optimize, pipeline
from vmoe.export.lowerings import dense
from vmoe.export.onnx import Parts
from vmoe.export.pipeline import ExportSettings, Plan
from vmoe.export.precision import PrecisionSettings
from vmoe.export.quantise import quantise
from vmoe.models import ModelSettings, VideoMoE, build, dense_counterpart
from vmoe.runtime import load
from vmoe.runtime.bench.subjects import random_clips

log = logging.getLogger("vmoe")

SIZES = {
    "": ClipSpec(),
    "large_": ClipSpec(frames=16, spacing_s=0.1, height=112, width=112),
}
FP32, INT8 = "winograd", "joined"  # forms of an expert; OpenVINO runs int8 fastest as exported
EXPERTS, OPSET, GEMM = 4, 20, 2048
CALIBRATION = 2  # clips: time does not depend on the ranges that they give

Call = Callable[[], Any]


class Case(NamedTuple):
    """One size of clips, and all that is measured on it.

    Attributes:
        prefix: of its figures.
        spec: the clips.
        twin: the mixture.
        plain: its graphs as exported.
        lowered: the same, experts lowered.
        dense: the dense counterpart's graph as exported.
        int8: an expert in int8, lowered for ONNX Runtime.
        int8_plain: the same, not lowered, for OpenVINO.
    """

    prefix: str
    spec: ClipSpec
    twin: VideoMoE
    plain: Parts
    lowered: Parts
    dense: ModelProto
    int8: ModelProto
    int8_plain: ModelProto

    @property
    def clips(self) -> Clips:
        """Eight clips."""
        return random_clips(self.spec, 8, seed=0)

    @property
    def size(self) -> str:
        """Frames, height and width, as a title says them."""
        return f"{self.spec.frames}x{self.spec.height}x{self.spec.width}"


def prepare(prefix: str) -> Case:
    """Export the mixture and its dense counterpart at one size of clips."""
    spec = SIZES[prefix]
    log.info("exporting for %d frames of %d", spec.frames, spec.height)
    twin = build(ModelSettings(experts=EXPERTS), spec).eval()
    plain = onnx.from_twin(twin, OPSET)
    wide = build(dense_counterpart(twin.settings), spec).eval()
    counterpart = onnx.trace([wide.experts[0]], "logits", spec.shape, OPSET)[0]
    lowered = Parts(plain.router, [_lowered(expert, FP32) for expert in plain.experts])
    joined, as_exported = (
        quantise(expert, "expert0", random_clips(spec, CALIBRATION, seed=1),
                 PrecisionSettings(int8=True))
        for expert in (_lowered(plain.experts[0], INT8), plain.experts[0])
    )  # fmt: skip
    return Case(prefix, spec, twin, plain, lowered, counterpart, joined, as_exported)


def _lowered(expert: ModelProto, form: str) -> ModelProto:
    made = optimize.lower(expert, form)
    assert made is not None
    return made


def subjects(case: Case, folder: Path, threads: int) -> dict[str, Call]:
    """Return every form as a call; OpenVINO's are left out where it is not installed."""
    assert case.plain.router is not None
    one, eight = case.clips[:1], case.clips
    every = dense.lower(case.plain.router, case.plain.experts)["moe"]
    split, if_ = (deploy(case, case.lowered, folder / how, how, threads)
                  for how in ("split", "if"))  # fmt: skip
    mixed = [i % EXPERTS for i in range(len(eight))]
    found: dict[str, Call | None] = {
        "naive expert": session(case.plain.experts[0], one, threads),
        "lowered expert": session(case.lowered.experts[0], one, threads),
        "int8 expert": session(case.int8, one, threads),
        "OpenVINO expert": openvino(case.plain.experts[0], one, threads),
        "OpenVINO int8 expert": openvino(case.int8_plain, one, threads),
        "router": session(case.plain.router, one, threads),
        "split, one clip": lambda: split.infer(one, 0),
        "if, one clip": lambda: if_.infer(one, 0),
        "split, eight clips": lambda: split.infer(eight, mixed),
        "naive dense": session(case.dense, one, threads),
        "lowered dense": session(_lowered(case.dense, FP32), one, threads),
        "all experts, then mask": session(every, one, threads),
        "gemm": gemm(threads),
    }
    return {name: call for name, call in found.items() if call is not None}


def deploy(case: Case, parts: Parts, folder: Path, lowering: str, threads: int) -> Any:
    """Write a bundle of the mixture, and load all of it."""
    return load(write(case, parts, folder, lowering), threads=threads, device="cpu",
                backend="onnxruntime", all_parts=True)  # fmt: skip


def write(case: Case, parts: Parts, folder: Path, lowering: str) -> Path:
    """Write a bundle of the mixture."""
    folder.mkdir(parents=True)
    labels = tuple(f"label{i}" for i in range(case.twin.settings.classes))
    plan = Plan(Checkpoint(case.twin, labels), None, "mixture", ExportSettings(lowering=lowering))
    pipeline.write(plan, parts, folder)
    return folder


def session(model: ModelProto, clips: Clips, threads: int) -> Call:
    """Return a graph in ONNX Runtime as a call on clips."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.force_spinning_stop", "1")
    made = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda: made.run(None, {"clip": clips})


def openvino(model: ModelProto, clips: Clips, threads: int) -> Call | None:
    """Return a graph in OpenVINO as a call on clips; None where that is not installed."""
    try:
        from openvino import Core
    except ImportError:
        return None
    core = Core()
    read = core.read_model(model.SerializeToString())
    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads,
             "PERFORMANCE_HINT": "LATENCY"}  # fmt: skip
    request = core.compile_model(read, "CPU", hints).create_infer_request()
    return lambda: request.infer({"clip": clips})


def gemm(threads: int) -> Call:
    """Return the product of two matrices, as what this CPU can do at most."""
    a = torch.rand(GEMM, GEMM)

    def call() -> None:
        torch.set_num_threads(threads)
        torch.mm(a, a)

    return call
