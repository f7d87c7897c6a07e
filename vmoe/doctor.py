"""What `vmoe doctor` says: what is installed, what can run here, what was verified where."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from pathlib import Path
from typing import Any

import vmoe
from vmoe import latest, report

PACKAGES = {
    "numpy": "everything", "opencv-python-headless": "decoding, cameras",
    "opencv-python": "the same, and vmoe-run --show", "onnxruntime": "serving on a CPU",
    "onnxruntime-gpu": "serving on an NVIDIA GPU", "openvino": "serving int8 on a CPU",
    "tritonclient": "a Triton server by gRPC",
    "tensorrt": "plans, built and served on an NVIDIA GPU", "cuda-bindings": "plans",
    "torch": "training, attacks, export", "onnx": "export", "onnxscript": "export",
    "safetensors": "checkpoints", "scikit-image": "the demo's photographs",
}  # fmt: skip
COMMANDS = {  # what each imports, beyond what is always installed
    "vmoe-run": ("onnxruntime",), "vmoe-bench": ("onnxruntime",),
    "vmoe-train": ("torch", "safetensors"), "vmoe-attack": ("torch", "safetensors"),
    "vmoe-export": ("torch", "safetensors", "onnx", "onnxscript", "onnxruntime"),
}  # fmt: skip
VERIFIED = [
    ["fp32: ONNX Runtime CPU, OpenVINO CPU", "tests in CI, without a GPU"],
    ["int8: ONNX Runtime CPU", "tests in CI; benchmarks/export.py"],
    ["int8: OpenVINO CPU", "benchmarks/export.py; against the twin at each export"],
    ["fp16: ONNX Runtime CPU", "tests in CI: its answers; it gains no speed there"],
    ["bf16", "tests in CI: the graphs; run by OpenVINO at export, where it is"],
    ["routing, streaming, attacks, training, export", "tests in CI, without a GPU"],
    ["a camera through OpenCV's V4L2 code", "an emulated device; no camera hardware"],
    ["kernels of the plugins, launched as the plugins do; host routing by CUDA graphs; energy",
     "one NVIDIA H200: benchmarks/results/gpu.md; in CI in Triton's interpreter"],
    ["TensorRT plans: what is built, loaded, refused", "tests in CI, over the names and signatures "
     "of the real bindings 10.3 to 11.4; no plan was ever built"],
    ["Triton Inference Server: repository, client, restarts",
     "tests in CI, against the real server 2.51 with its python backend"],
]  # fmt: skip
UNVERIFIED = [  # on any machine of ours; --self-test is for those marked with *
    "ONNX Runtime CUDA",
    "the driver's calls behind plans (copies, graphs, waits, times) and the plugins' enqueue: "
    "benchmarks/gpu.py --section driver, on any NVIDIA GPU with torch",
    "how long the host waits between router and expert as it waits now: --section routing",
    "* TensorRT reading the ONNX, its plans and what they answer, fp32, fp16",
    "* CUDA graphs of plans, the arena that parts share, latency by route",
    "* the layers that TensorRT's inspector names, and their types",
    "plans that are int8, TF32, dense, stripped, version-compatible, for other GPUs; --torch-trt",
    "* the plugins of --lowering plugin in TensorRT, and its one plan",
    "Triton's onnxruntime and tensorrt backends; the images of docker/",
    "Jetson (JetPack 6 and 7), ARM servers",
]


def found() -> dict[str, Any]:
    """Return the machine and its packages, what each command lacks, and what was verified where."""
    return {
        "vmoe": vmoe.__version__, "python": platform.python_version(),
        "system": platform.platform(), "machine": platform.machine(),
        "packages": {name: _version(name) for name in PACKAGES},
        "missing": {command: missing(command) for command in COMMANDS},
        "cameras": sorted(str(path) for path in Path("/dev").glob("video*")),
        "model": str(latest.SHIPPED), "card": str(latest.CARD), "verified": dict(VERIFIED),
        "unverified": UNVERIFIED,
    }  # fmt: skip


def text(found: dict[str, Any]) -> str:
    """Return what `found` returned, for people."""
    machine = ("vmoe", "python", "system", "machine")
    packages = [[name, version, PACKAGES[name]] for name, version in found["packages"].items()]
    commands = [[command, "is installed" if not lacks else f"needs {', '.join(lacks)}"]
                for command, lacks in found["missing"].items()]  # fmt: skip
    return "\n\n".join([
        "  ".join(f"{key} {found[key]}" for key in machine),
        report.table(packages, ["package", "installed", "for"]),
        report.table(commands, ["command", "here"]),
        f"cameras: {', '.join(found['cameras']) or 'none'}\n"
        f"the model that ships: {found['model']}, and its card: {found['card']}",
        report.table(VERIFIED, ["claim", "verified where"]),
        "\n".join(["unverified, run on no machine of ours (*: vmoe doctor --self-test runs it):",
                   *(f"  {line}" for line in found["unverified"])]),
    ])  # fmt: skip


def missing(command: str) -> list[str]:
    """Return what a command imports and is not installed."""
    return [name for name in COMMANDS[command] if importlib.util.find_spec(name) is None]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
