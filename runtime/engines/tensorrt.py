"""TensorRT plans on an NVIDIA GPU: router and experts apart, the host routes.

    put     clips into pinned memory, one copy to the device that every part reads
    run     the part's plan as a CUDA graph, one for each batch of 1, 2, 4, 8; one wait; answers

All parts share one stream, one buffer for clips and one arena: only one of them runs at a time.
A batch between two sizes runs as the next larger one; the rows too many are dropped. A plan is
compared with this machine and its trust is checked before it is deserialised (`_plan`).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import math
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from vmoe import bundle as bundles
from vmoe.bundle import Part, Port, check_part
from vmoe.clips import Clips
from vmoe.errors import (
    BundleError,
    CorruptBundleError,
    EngineMismatchError,
    MissingDependencyError,
)

from . import BackendSettings, Outputs, Run, _cuda, _plan
from ._cuda import Gpu

log = logging.getLogger("vmoe.runtime")

FORMATS = ("plan",)
DEVICES = ("cuda",)
CLIP = "clip"
LEAST_ARENA = 256  # bytes; a plan may need none, and is given an address nevertheless
TYPES = {"uint8": "UINT8", "float32": "FLOAT", "int64": "INT64"}  # of ports, as TensorRT has them


def why_unavailable() -> str | None:
    """Return why this backend cannot run here, and what mends it; None where it can."""
    if importlib.util.find_spec("tensorrt") is None:
        return (
            "tensorrt is not installed: pip install 'vmoe[tensorrt]' (on a Jetson it comes with "
            "JetPack: sudo apt install python3-libnvinfer)."
        )
    return _cuda.why_unavailable()


def module() -> Any:
    """Import TensorRT.

    Raises:
        MissingDependencyError: it is not installed, or its libraries are not.
    """
    why = why_unavailable()
    if why:
        raise MissingDependencyError(why)
    try:
        import tensorrt
    except (ImportError, OSError) as e:
        raise MissingDependencyError(f"tensorrt cannot be imported: {str(e).rstrip('.')}.") from e
    return tensorrt


def open(settings: BackendSettings) -> TensorRt:
    """Open the backend.

    Raises:
        MissingDependencyError: TensorRT, cuda-python or the driver is not installed.
        SettingError: a device that is no GPU, or is not here.
        BundleError: a manifest that does not say what its plans were built with.
    """
    return TensorRt(settings, module())


class Put:
    """Clips that were given to the backend; uploaded, unless others came after them."""

    def __init__(self, clips: Clips) -> None:
        """Take clips, uint8 [N, T, H, W, 3]."""
        self.clips = np.ascontiguousarray(clips)


class TensorRt:
    """The plans of one bundle on one GPU."""

    def __init__(self, settings: BackendSettings, trt: Any) -> None:
        """Open the GPU, and make room for clips; no plan is read yet."""
        bundle = settings.bundle or bundles.read(settings.folder)
        self._trt, self._folder = trt, settings.folder
        self._trust = settings.trust
        self._shape = bundle.spec.shape
        plans = [_plan.built(part) for part in bundle.parts.values()]
        self._most = max(plan.batch[2] for plan in plans)
        self.gpu = Gpu(_cuda.index(settings.device))
        self.log = _plan.logger(trt)
        try:
            self._here = _plan.machine(trt, self.gpu.facts())
            self._runtime = constructed(lambda: trt.Runtime(self.log), "Runtime", self.log)
            clip_bytes = math.prod(self._shape)
            self._staged = self.gpu.pinned(self._most * clip_bytes)
            self.clips = self.gpu.alloc(self._most * clip_bytes)
        except BaseException:
            self.gpu.close()
            raise
        self._uploaded: tuple[Put, int] | None = None
        self._lock = threading.Lock()
        self.arena, self.arena_bytes = 0, 0
        self._loaded: list[Loaded] = []
        self._closed = False

    def load(self, part: Part) -> Run:
        """Deserialise one plan, once it is proven to be whole, trusted and for this machine.

        Raises:
            CorruptBundleError: its files changed since the bundle was read.
            EngineMismatchError: it is for another machine, nobody vouches for it, or its inputs
                and outputs are not what the manifest says.
            BundleError: TensorRT cannot read it.
        """
        was = _plan.built(part)
        _plan.check_trust(part, self._trust)
        _plan.check_machine(part, was, self._here)
        check_part(self._folder, part)
        with self._lock:
            self.gpu.enter()
            if was.version_compatible:
                self._runtime.engine_host_code_allowed = True  # it brings its own lean runtime
            plan = self._read(part)
            engine = self._runtime.deserialize_cuda_engine(plan)
            if engine is None:
                raise BundleError(
                    f"{self._folder / part.file}: TensorRT cannot load it: {self.log.said()}."
                )
            if was.weights:
                self._refit(engine, was.weights)
            self._grow(engine.device_memory_size_v2)
            loaded = Loaded(self, self._trt, engine, part, self._shape, was.batch)
            self._loaded.append(loaded)

        def run(inputs: Mapping[str, Any]) -> Outputs:
            return self._run(loaded, inputs[CLIP])

        return run

    def _read(self, part: Part) -> bytes:
        """Return a plan's bytes: the very ones that were proven, as they are code."""
        plan = (self._folder / part.file).read_bytes()
        if hashlib.sha256(plan).hexdigest() != part.hashes[part.file]:
            raise CorruptBundleError(
                f"{self._folder} changed while {part.file} was loaded. Load it again."
            )
        return plan

    def _refit(self, engine: Any, weights: str) -> None:
        """Give a stripped plan its weights, from the graph that it was built from."""
        trt, path = self._trt, str(self._folder / weights)
        refitter = trt.Refitter(engine, self.log)
        parser = trt.OnnxParserRefitter(refitter, self.log)
        checked(parser.refit_from_file(path), f"{path}: refit_from_file", self.log)
        checked(refitter.refit_cuda_engine(), f"{path}: refit_cuda_engine", self.log)

    def _grow(self, size: int) -> None:
        """Make the arena large enough; what was captured with the old one is made anew."""
        size = max(size, LEAST_ARENA)
        if size <= self.arena_bytes:
            return
        grown = self.gpu.alloc(size)  # where there is no room, all stays as it is
        self.gpu.wait()
        for loaded in self._loaded:
            loaded.forget()
        old, self.arena, self.arena_bytes = self.arena, grown, size
        if old:
            self.gpu.free(old)

    def put(self, clips: Clips) -> Put:
        """Bring clips, uint8 [N, T, H, W, 3], to the device, as many as a plan takes at once."""
        put = Put(clips)
        with self._lock:
            self.gpu.enter()
            if put.clips.shape[1:] == self._shape and 0 < len(put.clips) <= self._most:
                self._upload(put, 0)
        return put

    def _upload(self, put: Put, start: int) -> None:
        """Copy clips from `start` on to the device, unless they are there."""
        if self._uploaded == (put, start):
            return
        some = put.clips[start : start + self._most].reshape(-1)
        staged = self._staged[: some.size]
        self._uploaded = None
        staged[:] = some
        self.gpu.upload(staged, self.clips)
        self._uploaded = put, start

    def _run(self, loaded: Loaded, clips: Put | Clips) -> Outputs:
        """Run one part on clips, in pieces where they are more than a plan takes at once."""
        put = clips if isinstance(clips, Put) else Put(clips)
        if put.clips.dtype != np.uint8 or put.clips.shape[1:] != self._shape:
            raise EngineMismatchError(
                f"{loaded.name} does not run: clips are {put.clips.dtype} "
                f"{list(put.clips.shape)}; it takes uint8 [N, {', '.join(map(str, self._shape))}]."
            )
        pieces = []
        with self._lock:
            self.gpu.enter()
            for start in range(0, len(put.clips), self._most):
                self._upload(put, start)
                pieces.append(loaded.answer(min(self._most, len(put.clips) - start)))
        return {name: np.concatenate([p[name] for p in pieces]) for name in pieces[0]}

    def graphs(self) -> dict[str, dict[int, bool]]:
        """Return, for each plan and batch that was run, whether it runs as a CUDA graph."""
        return {loaded.name: dict(loaded.captured) for loaded in self._loaded}

    def close(self) -> None:
        """Free plans and memory; a second call does nothing.

        What the GPU says meanwhile is not told: it is the echo of what a call said before.
        """
        with self._lock:
            if not self._closed:
                self._closed = True
                with contextlib.suppress(EngineMismatchError):
                    self.gpu.enter()
                    self.gpu.wait()
                for loaded in self._loaded:
                    with contextlib.suppress(EngineMismatchError):
                        loaded.forget()
                    loaded.engine = None
                self._loaded.clear()
                self._runtime = None
                self.gpu.close()


class Prepared(NamedTuple):
    """One batch size of a plan, ready to run.

    Attributes:
        context: held here, as a graph runs on memory that it owns.
        graph: the CUDA graph; None where it could not be captured.
        enqueue: gives the stream the same without a graph.
    """

    context: Any
    graph: Any
    enqueue: Callable[[], None]


class Loaded:
    """One plan: its answers' memory, and how each batch size of it is launched."""

    def __init__(
        self, backend: TensorRt, trt: Any, engine: Any, part: Part, shape: tuple[int, ...],
        batch: tuple[int, int, int],
    ) -> None:  # fmt: skip
        """Compare a deserialised plan with the manifest, and make room for its answers."""
        self.name, self.engine = part.file, engine
        self._backend, self._trt, self._shape = backend, trt, shape
        self._least, _, self._most = batch
        self._ports = part.outputs
        self._check_ports(part)
        gpu = backend.gpu
        self._on_device = {p.name: gpu.alloc(self._most * _row_bytes(p)) for p in self._ports}
        self._on_host = {p.name: gpu.pinned(self._most * _row_bytes(p)) for p in self._ports}
        self._prepared: dict[int, Prepared] = {}  # by batch
        self.captured: dict[int, bool] = {}

    def forget(self) -> None:
        """Drop what was prepared with memory that is about to go."""
        for prepared in self._prepared.values():
            if prepared.graph is not None:
                self._backend.gpu.drop(prepared.graph)
        self._prepared.clear()

    def answer(self, n: int) -> Outputs:
        """Run the first n clips that are on the device; n is at most the plan's largest batch."""
        if n > self._most:  # another part takes more at once
            raise EngineMismatchError(
                f"{self.name} takes at most {self._most} clips at once, other parts more. "
                "Build all parts with one --max-batch."
            )
        size = _plan.bucket(n, self._least, self._most)
        prepared = self._prepared.get(size)
        if prepared is None:
            prepared = self._prepared[size] = self._prepare(size)
        if prepared.graph is None:
            prepared.enqueue()
        else:
            self._backend.gpu.launch(prepared.graph)
        self._backend.gpu.wait()
        return {
            port.name: self._on_host[port.name][: n * _row_bytes(port)]
            .view(port.dtype)
            .reshape(n, *port.shape[1:])
            .copy()
            for port in self._ports
        }

    def _prepare(self, size: int) -> Prepared:
        """Make a context for one batch size, and a graph that runs it and brings answers back.

        A context of its own for each size: a graph stays true while its context's shapes do.
        """
        gpu, backend, context = self._backend.gpu, self._backend, self._context(size)
        self._must(context.set_tensor_address(CLIP, backend.clips), "set_tensor_address(clip)")
        for name, address in self._on_device.items():
            self._must(context.set_tensor_address(name, address), f"set_tensor_address({name})")

        def enqueue() -> None:
            self._must(context.execute_async_v3(gpu.stream), "execute_async_v3")
            for port in self._ports:
                rows = self._on_host[port.name][: size * _row_bytes(port)]
                gpu.download(self._on_device[port.name], rows)

        enqueue()  # what is set up at a first run cannot be captured
        gpu.wait()
        graph = None
        try:
            graph = gpu.capture(enqueue)
        except EngineMismatchError as e:
            log.warning("%s, batch %d: runs without a CUDA graph: %s", self.name, size, e)
        self.captured[size] = graph is not None
        return Prepared(context, graph, enqueue)

    def _context(self, size: int) -> Any:
        gpu, backend = self._backend.gpu, self._backend
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self.engine.create_execution_context(strategy)
        self._must(context is not None, "create_execution_context")
        context.set_device_memory(backend.arena, backend.arena_bytes)
        self._must(context.set_optimization_profile_async(0, gpu.stream),
                   "set_optimization_profile_async")  # fmt: skip
        gpu.wait()
        self._must(context.set_input_shape(CLIP, (size, *self._shape)), "set_input_shape")
        unknown = context.infer_shapes()
        self._must(not unknown, f"infer_shapes ({', '.join(unknown)})")
        return context

    def _must(self, ok: bool, what: str) -> None:
        checked(ok, f"{self.name}: {what}", self._backend.log)

    def _check_ports(self, part: Part) -> None:
        """Refuse a plan whose inputs and outputs are not what the manifest says."""
        engine, trt = self.engine, self._trt
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs = trt.TensorIOMode.INPUT
        has = {
            name: (
                engine.get_tensor_mode(name) == inputs,
                engine.get_tensor_dtype(name),
                tuple(engine.get_tensor_shape(name))[1:],
            )
            for name in names
        }
        wanted = {
            port.name: (port in part.inputs, getattr(trt.DataType, TYPES[port.dtype]),
                        tuple(port.shape[1:]))
            for port in (*part.inputs, *part.outputs)
            if port.dtype in TYPES
        }  # fmt: skip
        takes = [port.name for port in part.inputs]
        if has != wanted or takes != [CLIP] or part.inputs[0].shape[1:] != self._shape:
            raise EngineMismatchError(
                f"{self.name} has the inputs and outputs {_told(has)}; the manifest says "
                f"{_told(wanted)}. {_plan.REBUILD}"
            )


def checked(value: Any, what: str, logger: Any) -> Any:
    """Return what TensorRT answered, unless it is a refusal.

    Raises:
        EngineMismatchError: it is False or None; with TensorRT's own words.
    """
    if value is None or value is False:
        raise EngineMismatchError(f"{what} failed: {logger.said()}.")
    return value


def constructed(make: Callable[[], Any], what: str, logger: Any) -> Any:
    """Construct an object of TensorRT's.

    Raises:
        EngineMismatchError: TensorRT gives none, which its bindings say by a TypeError.
    """
    try:
        return make()
    except TypeError as e:
        raise EngineMismatchError(f"TensorRT: {what} cannot be made: {logger.said()}.") from e


def _told(ports: Mapping[str, tuple[bool, Any, tuple[Any, ...]]]) -> str:
    return ", ".join(
        f"{name} {getattr(kind, 'name', kind)} [N{''.join(f', {d}' for d in shape)}]"
        for name, (_, kind, shape) in sorted(ports.items())
    )


def _row_bytes(port: Port) -> int:
    """Return the bytes of one clip's answer."""
    return np.dtype(port.dtype).itemsize * math.prod(n or 1 for n in port.shape[1:])
