"""The topics under which `vmoe-export --help` sets its options."""

from __future__ import annotations

from .tensorrt.settings import BuildSettings

_BUILD = tuple(BuildSettings.__dataclass_fields__)

TOPICS = {
    "What is made": (
        "onnx", "trt", "from_onnx", "out", "name", "lowering", "form", "optimize", "opset", "twin",
        "counterpart", "overwrite",
    ),
    "Precision": (
        "fp16", "bf16", "int8", "int8_form", "keep_fp32", "calib", "calib_clips", "calib_adv",
    ),
    "Gates and what they judge on": (
        "gate_parity", "gate_parity_mean", "gate_route", "gate_clean", "gate_robust",
        "gate_sparsity", "robust", "robust_clips", "verify_data", "verify_clips", "group", "bisect",
    ),
    "TensorRT": _BUILD,
    "Triton Inference Server": ("triton_repo", "triton_backend", "triton_batch"),
}  # fmt: skip
