"""OpenVINO, on the CPU: the fastest there for int8; fp32 stays fp32."""

from __future__ import annotations

import importlib.util
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vmoe.bundle import Part, check_part
from vmoe.clips import Clips
from vmoe.errors import BundleError, EngineMismatchError, MissingDependencyError, SettingError

from . import BackendSettings, Outputs, Run

FORMATS = ("onnx",)
DEVICES = ("cpu",)
DEFAULTED = "force_route"  # an input that has a value of its own, and may be left out


def why_unavailable() -> str | None:
    """Return why this backend cannot run here, and what mends it; None where it can."""
    if importlib.util.find_spec("openvino") is None:
        return "openvino is not installed: pip install 'vmoe[openvino]'."
    return None


def open(settings: BackendSettings) -> OpenVino:
    """Open the backend.

    Raises:
        MissingDependencyError: openvino is not installed.
        SettingError: a device that is not the CPU.
    """
    why = why_unavailable()
    if why:
        raise MissingDependencyError(why)
    if settings.device not in ("auto", "cpu"):
        raise SettingError(
            f"--device is {settings.device!r}; backend openvino runs on the CPU only. "
            "Use --device cpu, or --backend onnxruntime."
        )
    return OpenVino(settings)


class OpenVino:
    """Compiled models of one bundle."""

    def __init__(self, settings: BackendSettings) -> None:
        """Start OpenVINO; no graph is read yet."""
        import openvino

        self._ov = openvino
        self._core = openvino.Core()
        # Core.read_model would let every reader that it has try a file that is no ONNX.
        self._reader = openvino.frontend.FrontEndManager().load_by_framework("onnx")
        self._folder = settings.folder
        self._options = {
            "INFERENCE_PRECISION_HINT": "f32",  # else it may compute in bf16 or f16
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
        }
        if settings.threads:
            self._options["INFERENCE_NUM_THREADS"] = str(settings.threads)

    def load(self, part: Part) -> Run:
        """Compile one part.

        Raises:
            CorruptBundleError: its files changed since the bundle was read.
            BundleError: the graph is not one that OpenVINO reads.
            EngineMismatchError: its inputs or outputs are not what the manifest says.
        """
        path = self._folder / part.file
        check_part(self._folder, part)
        try:
            compiled, defaults = self.compiled(path)
        except Exception as e:  # OpenVINO raises RuntimeError, and others for what it cannot parse
            raise BundleError(f"{path}: openvino cannot load it: {_first_line(e)}") from e
        self._check_ports(compiled, part)
        requests = threading.local()  # a request runs one at a time; each thread has its own
        names = [port.name for port in part.outputs]

        def run(inputs: Mapping[str, Any]) -> Outputs:
            if not hasattr(requests, "own"):
                requests.own = compiled.create_infer_request()
            try:
                requests.own.infer({**defaults, **inputs}, share_inputs=True)
                return {name: requests.own.get_tensor(name).data.copy() for name in names}
            except Exception as e:  # as above
                raise EngineMismatchError(f"{path} does not run: {_first_line(e)}") from e

        return run

    def compiled(self, path: Path) -> tuple[Any, dict[str, Any]]:
        """Return a graph as OpenVINO runs it, and the defaults of inputs that may be left out."""
        model = self._reader.convert(self._reader.load(str(path)))
        defaults = self._opened(model)
        return self._core.compile_model(model, "CPU", self._options), defaults

    def _opened(self, model: Any) -> dict[str, Any]:
        """Make the input that has a default an input again; return the default by its name.

        OpenVINO reads an ONNX input with an initializer as that constant, for good.
        """
        for node in model.get_ops():
            if node.get_type_name() == "Constant" and node.get_friendly_name() == DEFAULTED:
                value = np.array(node.data)
                door = self._ov.opset13.parameter([], value.dtype, name=DEFAULTED)
                door.output(0).get_tensor().set_names({DEFAULTED})
                node.output(0).replace(door.output(0))
                model.add_parameters([door])
                model.validate_nodes_and_infer_types()
                return {DEFAULTED: value}
        return {}

    def _check_ports(self, compiled: Any, part: Part) -> None:
        has_in = {name: port for port in compiled.inputs for name in port.names}
        has_out = {name for port in compiled.outputs for name in port.names}
        missing = {p.name for p in part.inputs} - set(has_in) - {DEFAULTED}
        missing |= {p.name for p in part.outputs} - has_out
        if missing or "clip" not in has_in or has_in["clip"].element_type != self._ov.Type.u8:
            raise EngineMismatchError(
                f"{self._folder / part.file} has inputs {sorted(has_in)} and outputs "
                f"{sorted(has_out)}; the manifest says "
                f"{sorted(p.name for p in part.inputs)} and "
                f"{sorted(p.name for p in part.outputs)}, clip as uint8. Export it again."
            )

    def put(self, clips: Clips) -> Any:
        """Return clips, uint8 [N, T, H, W, 3], as they are: memory is shared."""
        return np.ascontiguousarray(clips)

    def close(self) -> None:
        """Do nothing: compiled models are freed with the runs that hold them."""


def _first_line(e: Exception) -> str:
    """Return what an OpenVINO error says at last, without paths into its own sources."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    said = [
        line
        for line in lines
        if not re.match(r"Exception from |Check .* failed at |FrontEnd API failed", line)
    ]
    return (said or lines or [type(e).__name__])[-1][:300]
