"""ONNX Runtime: on the CPU, and on CUDA where the installed package has it.

With a cache folder, a large part is loaded as it was optimised for this CPU before. What is not
there yet is made behind the first answer, so that no label waits for it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from vmoe.bundle import Part, check_part
from vmoe.clips import Clips
from vmoe.errors import BundleError, EngineMismatchError, MissingDependencyError, SettingError

from . import BackendSettings, Outputs, Run
from ._bound import Bound
from ._cache import DATA, Cache

FORMATS = ("onnx",)
DEVICES = ("cpu", "cuda")
CUDA_GRAPHS = True
CUDA = "CUDAExecutionProvider"
CPU = "CPUExecutionProvider"
ERRORS_ONLY = 4  # ORT's own lines would stand beside ours: fatal only

log = logging.getLogger("vmoe.runtime")


def why_unavailable() -> str | None:
    """Return why this backend cannot run here, and what mends it; None where it can."""
    if importlib.util.find_spec("onnxruntime") is None:
        return "onnxruntime is not installed: pip install 'vmoe[cpu]' or 'vmoe[gpu]'."
    return None


def open(settings: BackendSettings) -> OnnxRuntime:
    """Open the backend.

    Raises:
        MissingDependencyError: onnxruntime is not installed, or has no CUDA and CUDA is asked.
        SettingError: a device that is no device, or CUDA graphs where there is no CUDA.
    """
    why = why_unavailable()
    if why:
        raise MissingDependencyError(why)
    return OnnxRuntime(settings)


def _cuda_index(device: str) -> int | None:
    """Return N of cuda:N (cuda alone is 0), or None for the CPU."""
    if device in ("auto", "cpu"):
        return None
    found = re.fullmatch(r"cuda(?::(\d+))?", device)
    if not found:
        raise SettingError(f"--device is {device!r}; it is auto, cpu or cuda:N.")
    return int(found[1] or 0)


def find_cuda(ort: Any) -> None:
    """Let ONNX Runtime find CUDA's libraries where pip put them: by itself it asks the system only.

    What it prints of those that are missing goes to -v: standard output is for answers.
    """
    preload = getattr(ort, "preload_dlls", None)  # from 1.21 on
    if preload is not None:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            preload()
        for line in said.getvalue().splitlines():
            log.debug("onnxruntime: %s", line)


class OnnxRuntime:
    """Sessions of one bundle, all on one device."""

    def __init__(self, settings: BackendSettings) -> None:
        """Choose the device; no graph is read yet."""
        import onnxruntime

        self._ort = onnxruntime
        onnxruntime.set_default_logger_severity(ERRORS_ONLY)
        self._folder = settings.folder
        self._threads = settings.threads
        self._cuda = _cuda_index(settings.device)
        self._asked = settings.device != "auto"
        has_cuda = CUDA in onnxruntime.get_available_providers()
        if self._cuda is not None and not has_cuda:
            raise MissingDependencyError(
                f"--device {settings.device}: the installed onnxruntime {onnxruntime.__version__} "
                "has no CUDA: pip uninstall -y onnxruntime && pip install 'vmoe[gpu]' (both "
                "packages have one import name)."
            )
        if settings.device == "auto" and has_cuda and Path("/dev/nvidiactl").exists():
            self._cuda = 0
        self._graphs = bool(settings.cuda_graph)
        if self._graphs and self._cuda is None:
            raise SettingError(
                "--cuda-graph: onnxruntime runs on the CPU here, which has no CUDA graphs. "
                "Leave it out."
            )
        self._cache: Cache | None = None
        if settings.cache is not None and self._cuda is None:
            self._cache = Cache(settings.cache, onnxruntime.__version__)
        self._keeping: list[threading.Thread] = []
        if self._cuda is not None:
            find_cuda(onnxruntime)

    def load(self, part: Part) -> Run:
        """Make a session of one part; of one in the cache, no file of the bundle is read.

        Raises:
            CorruptBundleError: its files changed since the bundle was read.
            BundleError: the graph is not one that ONNX Runtime reads.
            EngineMismatchError: its inputs or outputs are not what the manifest says, or it cannot
                run as CUDA graphs.
            MissingDependencyError: the device asked cannot be used.
        """
        path = self._folder / part.file
        session = self._cached(part)
        if session is None:
            check_part(self._folder, part)
        keep = self._cache is not None and session is None and self._cache.is_worth(path)
        try:
            session = session or self._session(path, self._options())
        except Exception as e:  # ORT's errors share no base class but Exception
            self._refuse(path, _first_line(e), e)
        if self._cuda is not None and CUDA not in session.get_providers():
            if self._asked or self._graphs:
                raise MissingDependencyError(
                    f"--device cuda:{self._cuda}: onnxruntime cannot use it here: its CUDA and "
                    "cuDNN libraries are missing (pip install 'onnxruntime-gpu[cuda,cudnn]'), or "
                    "the GPU or its driver is. Use --device cpu."
                )
            self._cuda = None
        self._check_ports(session, part)
        if self._graphs:
            return self._as_graph(session, part)
        outputs = [port.name for port in part.outputs]

        first = threading.Lock()  # taken once and for all by the first run

        def run(inputs: Mapping[str, Any]) -> Outputs:
            answer = self._run(session, outputs, inputs, str(path))
            if keep and first.acquire(blocking=False):
                self._keep(part, path)
            return answer

        return run

    def _refuse(self, path: Path, said: str, e: Exception) -> NoReturn:
        if self._graphs:  # it takes no node that runs on the CPU, nor control flow
            raise EngineMismatchError(
                f"{path}: onnxruntime makes no CUDA graph of it: {said.rstrip('.')}. "
                "Leave out --cuda-graph."
            ) from e
        raise BundleError(f"{path}: onnxruntime cannot load it: {said}") from e

    def _as_graph(self, session: Any, part: Part) -> Run:
        """Make a part ready to run as CUDA graphs, one for each batch."""
        bound = Bound(self._ort, session, part, ("cuda", self._cuda or 0))

        def run(inputs: Mapping[str, Any]) -> Outputs:
            try:
                return bound.run(inputs)
            except EngineMismatchError:
                raise
            except Exception as e:  # as above
                path = self._folder / part.file
                raise EngineMismatchError(f"{path} does not run: {_first_line(e)}") from e

        return run

    def _cached(self, part: Part) -> Any:
        """Return a session of a part as it was optimised before; None where there is none."""
        found = self._cache.find(part) if self._cache is not None else None
        if self._cache is None or found is None:
            return None
        options = self._options()
        options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            return self._session(found, options)
        except Exception:  # as below
            self._cache.drop(part)
            return None

    def _keep(self, part: Part, path: Path) -> None:
        """Put a part into the cache, beside the runs that follow.

        No daemon: a process that ends in the midst of ONNX Runtime's own code may crash.
        """
        assert self._cache is not None
        thread = threading.Thread(
            target=self._cache.put, args=(part, path, self._save), name=f"cache {part.file}"
        )
        self._keeping.append(thread)
        thread.start()

    def _save(self, graph: Path, place: Path) -> None:
        """Write a graph as ONNX Runtime optimises it here."""
        options = self._options()
        options.intra_op_num_threads = 1
        options.optimized_model_filepath = str(place)
        key = "session.optimized_model_external_initializers_"
        options.add_session_config_entry(f"{key}file_name", DATA)
        options.add_session_config_entry(f"{key}min_size_in_bytes", "1024")
        self._session(graph, options)

    def _options(self) -> Any:
        options = self._ort.SessionOptions()
        options.log_severity_level = ERRORS_ONLY
        options.intra_op_num_threads = self._threads or 0
        options.inter_op_num_threads = 1
        # One part runs at a time: threads of the others must not spin beside it.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        return options

    def _session(self, path: Path, options: Any) -> Any:
        how = {"device_id": str(self._cuda), **({"enable_cuda_graph": "1"} if self._graphs else {})}
        cuda = [(CUDA, how)] if self._cuda is not None else []
        return self._ort.InferenceSession(str(path), options, providers=[*cuda, CPU])

    def _check_ports(self, session: Any, part: Part) -> None:
        has_in = {port.name: port.type for port in session.get_inputs()}
        has_out = {port.name for port in session.get_outputs()}
        missing = {p.name for p in part.inputs} - set(has_in) - {"force_route"}
        missing |= {p.name for p in part.outputs} - has_out
        if missing or has_in.get("clip") != "tensor(uint8)":
            raise EngineMismatchError(
                f"{self._folder / part.file} has inputs {sorted(has_in)} and outputs "
                f"{sorted(has_out)}; the manifest says "
                f"{sorted(p.name for p in part.inputs)} and "
                f"{sorted(p.name for p in part.outputs)}, clip as uint8. Export it again."
            )

    def _run(
        self, session: Any, outputs: list[str], inputs: Mapping[str, Any], path: str
    ) -> Outputs:
        try:
            if self._cuda is None:
                values = session.run(outputs, dict(inputs))
            else:
                uploaded = {name: self._uploaded(value) for name, value in inputs.items()}
                values = [v.numpy() for v in session.run_with_ort_values(outputs, uploaded)]
        except Exception as e:  # as above
            raise EngineMismatchError(f"{path} does not run: {_first_line(e)}") from e
        return dict(zip(outputs, values, strict=True))

    def _uploaded(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return self._ort.OrtValue.ortvalue_from_numpy(value, "cpu", 0)
        return value

    def put(self, clips: Clips) -> Any:
        """Bring clips, uint8 [N, T, H, W, 3], to the device; on the CPU they stay as they are.

        With CUDA graphs, too: each part has a place of its own for them.
        """
        contiguous = np.ascontiguousarray(clips)
        if self._cuda is None or self._graphs:
            return contiguous
        return self._ort.OrtValue.ortvalue_from_numpy(contiguous, "cuda", self._cuda)

    def close(self) -> None:
        """Wait for what is being put into the cache; sessions go with the runs that hold them."""
        while self._keeping:
            self._keeping.pop().join()


def _first_line(e: Exception) -> str:
    """Return an ORT error as one line, without paths into ORT's own sources."""
    text = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    return re.sub(r"/\S*onnxruntime/\S+\s*", "", text)[:300]
