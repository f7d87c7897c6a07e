"""TensorRT plans on an NVIDIA GPU: router and experts apart, the host routes; or all in one plan.

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
import math
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from vmoe import bundle as bundles
from vmoe.bundle import Part, check_part
from vmoe.clips import Clips
from vmoe.errors import (
    BundleError,
    CorruptBundleError,
    EngineMismatchError,
    MissingDependencyError,
)
from vmoe.runtime.plugins import nodes

from . import BackendSettings, Outputs, Run, Times, _cuda, _plan, _trt
from ._clock import Clock
from ._cuda import Gpu
from ._loaded import CLIP, Loaded, Shared
from ._trt import constructed

FORMATS = ("plan",)
DEVICES = ("cuda",)
CUDA_GRAPHS = True
LEAST_ARENA = 256  # bytes; a plan may need none, and is given an address nevertheless


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
        plans = [_plan.built(part) for part in bundle.parts.values()]
        self._most = max(plan.batch[2] for plan in plans)
        self.gpu = Gpu(_cuda.index(settings.device))
        self._shared = Shared(trt, self.gpu, _trt.logger(trt), bundle.spec.shape)
        self._shared.graphs = settings.cuda_graph is not False
        try:
            self._here = _plan.machine(trt, self.gpu.facts())
            log = self._shared.log
            self._runtime = constructed(lambda: trt.Runtime(log), "Runtime", log)
            clip_bytes = math.prod(self._shared.shape)
            self._staged = self.gpu.pinned(self._most * clip_bytes)
            self._shared.clips = self.gpu.alloc(self._most * clip_bytes)
        except BaseException:
            self.gpu.close()
            raise
        self._uploaded: tuple[Put, int] | None = None
        self._lock = threading.Lock()
        self._loaded: list[Loaded] = []
        self._closed = False

    def load(self, part: Part) -> Run:
        """Deserialise one plan, once it is proven to be whole, trusted and for this machine.

        Raises:
            CorruptBundleError: its files changed since the bundle was read.
            EngineMismatchError: it is for another machine, nobody vouches for it, or its plugins,
                inputs or outputs are not what they should be.
            BundleError: TensorRT cannot read it, or the GPU is older than its plugins' kernels.
        """
        was = _plan.built(part)
        _plan.check_trust(part, self._trust)
        _plan.check_machine(part, was, self._here)
        nodes.check(was.plugins, part.file, self._here.gpu.capability)
        check_part(self._folder, part)
        with self._lock:
            self.gpu.enter()
            if was.plugins:  # before: a plan is deserialised by their creators
                nodes.register(self._trt)
            if was.version_compatible:
                self._runtime.engine_host_code_allowed = True  # it brings its own lean runtime
            plan = self._read(part)
            engine = self._runtime.deserialize_cuda_engine(plan)
            if engine is None:
                said = self._shared.log.said()
                raise BundleError(f"{self._folder / part.file}: TensorRT cannot load it: {said}.")
            if was.weights:
                weights = self._folder / was.weights
                _trt.refit(self._trt, engine, weights, str(weights), self._shared.log)
            self._grow(engine.device_memory_size_v2)
            loaded = Loaded(self._shared, engine, part, was.batch)
            self._loaded.append(loaded)

        def run(inputs: Mapping[str, Any]) -> Outputs:
            return self._run(loaded, inputs)

        return run

    def _read(self, part: Part) -> bytes:
        """Return a plan's bytes: the very ones that were proven, as they are code."""
        plan = (self._folder / part.file).read_bytes()
        if hashlib.sha256(plan).hexdigest() != part.hashes[part.file]:
            raise CorruptBundleError(
                f"{self._folder} changed while {part.file} was loaded. Load it again."
            )
        return plan

    def _grow(self, size: int) -> None:
        """Make the arena large enough; what was captured with the old one is made anew."""
        size, shared = max(size, LEAST_ARENA), self._shared
        if size <= shared.arena_bytes:
            return
        grown = self.gpu.alloc(size)  # where there is no room, all stays as it is
        self.gpu.wait()
        for loaded in self._loaded:
            loaded.forget()
        old, shared.arena, shared.arena_bytes = shared.arena, grown, size
        if old:
            self.gpu.free(old)

    def put(self, clips: Clips) -> Put:
        """Bring clips, uint8 [N, T, H, W, 3], to the device, as many as a plan takes at once."""
        put = Put(clips)
        with self._lock:
            self.gpu.enter()
            if put.clips.shape[1:] == self._shared.shape and 0 < len(put.clips) <= self._most:
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
        self._shared.mark("uploading")
        self.gpu.upload(staged, self._shared.clips)
        self._shared.mark("uploaded")
        self._uploaded = put, start

    def _run(self, loaded: Loaded, inputs: Mapping[str, Any]) -> Outputs:
        """Run one part on clips, in pieces where they are more than a plan takes at once."""
        given, shape = inputs[CLIP], self._shared.shape
        put = given if isinstance(given, Put) else Put(given)
        if put.clips.dtype != np.uint8 or put.clips.shape[1:] != shape:
            raise EngineMismatchError(
                f"{loaded.name} does not run: clips are {put.clips.dtype} "
                f"{list(put.clips.shape)}; it takes uint8 [N, {', '.join(map(str, shape))}]."
            )
        pieces = []
        with self._lock:
            self.gpu.enter()
            for start in range(0, len(put.clips), self._most):
                self._upload(put, start)
                rows = min(self._most, len(put.clips) - start)
                pieces.append(loaded.answer(rows, inputs))
        return {name: np.concatenate([p[name] for p in pieces]) for name in pieces[0]}

    def graphs(self) -> dict[str, dict[int, bool]]:
        """Return, for each plan and batch that was run, whether it runs as a CUDA graph."""
        return {loaded.name: dict(loaded.captured) for loaded in self._loaded}

    def time_calls(self) -> None:
        """Note from now on what runs take; graphs are captured anew, with events inside."""
        with self._lock:
            self.gpu.enter()
            for loaded in self._loaded:
                loaded.forget()
            self._shared.clock = self._shared.clock or Clock(self.gpu)

    def last_times(self) -> Times:
        """Return what all runs took since it was asked last; zeros before `time_calls`."""
        with self._lock:
            self.gpu.enter()
            return self._shared.clock.take() if self._shared.clock else Times()

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
                    del loaded.engine
                self._loaded.clear()
                self._runtime = None
                self.gpu.close()
