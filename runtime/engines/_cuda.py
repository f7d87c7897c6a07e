"""A GPU through CUDA's driver, by cuda-python: memory, a stream, graphs; every call checked.

Handles are plain integers outside of this file: addresses are what TensorRT takes. What is held
is freed by `Gpu.close`; a process that ends frees it as well.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vmoe.errors import EngineMismatchError, MissingDependencyError, SettingError

NAME_BYTES = 256
# How long the host asks whether the stream is done, before it leaves the wait to the driver (who
# spins or sleeps, as the context's flags say: by default mostly the former). That wait ends 25 to
# 60 us late (benchmarks/results/gpu.md); a router takes about 100 us, and what takes longer than
# this is an expert, beside which 60 us are little. To ask costs others little, too: each question
# lets go of the interpreter's lock, and though who asks again mostly has it back first, 200 us are
# far below the 5 ms after which a thread that waits for the lock is given it.
SPIN_S = 200e-6


def why_unavailable() -> str | None:
    """Return why CUDA cannot be called from here, and what mends it; None where it can."""
    try:
        found = importlib.util.find_spec("cuda.bindings")
    except ModuleNotFoundError:  # no package `cuda` at all
        found = None
    if found is None:
        return "cuda-python is not installed: pip install 'vmoe[tensorrt]'."
    return None


def index(device: str) -> int:
    """Return N of a device cuda:N; cuda alone, and auto, is 0.

    Raises:
        SettingError: it is no GPU.
    """
    found = re.fullmatch(r"(?:auto|cuda(?::(\d+))?)", device)
    if not found:
        raise SettingError(f"--device is {device!r}; TensorRT runs on a GPU only: auto or cuda:N.")
    return int(found[1] or 0)


class GpuFacts(NamedTuple):
    """What a plan is bound to, and what a report says of a GPU.

    Attributes:
        name: such as `NVIDIA H100`.
        capability: its compute capability, such as `8.7`.
        driver: the newest CUDA that the driver runs, such as `12.6`.
        memory_bytes: of the device.
    """

    name: str
    capability: str
    driver: str
    memory_bytes: int


def call(driver: Any, name: str, *arguments: Any) -> Any:
    """Call a function of `cuda.bindings.driver`; return what it gives, if anything.

    Raises:
        EngineMismatchError: it fails.
    """
    error, *values = getattr(driver, name)(*arguments)
    _check(name, error)
    return values[0] if values else None


def _check(name: str, error: Any) -> None:
    if int(error) != 0:
        raise EngineMismatchError(f"CUDA: {name} failed: {getattr(error, 'name', error)}.")


def finish(driver: Any, stream: Any) -> None:
    """Wait until a stream has done all it was given: ask for SPIN_S, then let the driver wait.

    Args:
        driver: `cuda.bindings.driver`.
        stream: its handle.

    Raises:
        EngineMismatchError: what it was given failed.
    """
    until = time.perf_counter() + SPIN_S
    query, busy = driver.cuStreamQuery, driver.CUresult.CUDA_ERROR_NOT_READY
    while (error := query(stream)[0]) == busy:
        if time.perf_counter() > until:
            call(driver, "cuStreamSynchronize", stream)
            return
    _check("cuStreamQuery", error)


class Gpu:
    """One GPU's primary context, a stream of its own, and the memory that was asked of it.

    The context belongs to a process, and is current in a thread: `enter` makes it so.
    """

    def __init__(self, index: int = 0) -> None:
        """Open a device.

        Raises:
            MissingDependencyError: cuda-python or the driver is not installed.
            SettingError: there is no such device.
        """
        why = why_unavailable()
        if why:
            raise MissingDependencyError(why)
        self._driver = importlib.import_module("cuda.bindings.driver")
        try:
            self.call("cuInit", 0)
        except (RuntimeError, EngineMismatchError) as e:  # the first: no libcuda
            raise MissingDependencyError(
                f"no NVIDIA driver or GPU answers here ({str(e).rstrip('.')})."
            ) from e
        count = self.call("cuDeviceGetCount")
        if index >= count:
            raise SettingError(f"--device is cuda:{index}; here are {count} GPUs, from cuda:0 on.")
        self._device = self.call("cuDeviceGet", index)
        self._context = self.call("cuDevicePrimaryCtxRetain", self._device)
        self._frees: list[tuple[str, Any]] = []
        self._open = True
        self._capturing = False
        self.enter()
        flags = int(self._driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
        self._stream = self.call("cuStreamCreate", flags)
        self._frees.append(("cuStreamDestroy", self._stream))

    @property
    def stream(self) -> int:
        """The stream's handle."""
        return int(self._stream)

    def facts(self) -> GpuFacts:
        """Say what this device is."""
        kind = self._driver.CUdevice_attribute
        major, minor = (
            self.call("cuDeviceGetAttribute", attribute, self._device)
            for attribute in (
                kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                kind.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        name = self.call("cuDeviceGetName", NAME_BYTES, self._device)
        driver = self.call("cuDriverGetVersion")
        return GpuFacts(
            name=name.partition(b"\0")[0].decode(errors="replace"),
            capability=f"{major}.{minor}",
            driver=f"{driver // 1000}.{driver % 1000 // 10}",
            memory_bytes=int(self.call("cuDeviceTotalMem", self._device)),
        )

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the driver; return what it gives, if anything.

        Raises:
            EngineMismatchError: it fails.
        """
        return call(self._driver, name, *arguments)

    def enter(self) -> None:
        """Make the device's context current in this thread."""
        self.call("cuCtxSetCurrent", self._context)

    def alloc(self, size: int) -> int:
        """Return the address of new memory on the device, all zeros."""
        memory = self.call("cuMemAlloc", max(1, size))
        self._frees.append(("cuMemFree", memory))
        self.call("cuMemsetD8Async", memory, 0, max(1, size), self._stream)
        return int(memory)

    def pinned(self, size: int) -> NDArray[np.uint8]:
        """Return new host memory that the device copies from and to by itself, uint8 [size]."""
        address = self.call("cuMemHostAlloc", max(1, size), 0)
        self._frees.append(("cuMemFreeHost", address))
        held = (ctypes.c_uint8 * size).from_address(int(address))
        return np.ctypeslib.as_array(held)

    def free(self, address: int) -> None:
        """Free memory of the device now; else `close` does."""
        self._free("cuMemFree", address)

    def _free(self, by: str, handle: int) -> None:
        held = next(x for x in self._frees if x[0] == by and int(x[1]) == handle)
        self._frees.remove(held)
        self.call(*held)

    def upload(self, source: NDArray[np.uint8], target: int) -> None:
        """Copy pinned memory to the device, in the order of the stream."""
        self.call("cuMemcpyHtoDAsync", self._typed(target), source.ctypes.data, source.nbytes,
                  self._stream)  # fmt: skip

    def download(self, source: int, target: NDArray[np.uint8]) -> None:
        """Copy from the device to pinned memory, in the order of the stream."""
        self.call("cuMemcpyDtoHAsync", target.ctypes.data, self._typed(source), target.nbytes,
                  self._stream)  # fmt: skip

    def wait(self) -> None:
        """Wait until the stream has done all it was given."""
        finish(self._driver, self._stream)

    def event(self) -> Any:
        """Return a new event, for `mark`."""
        flags = int(self._driver.CUevent_flags.CU_EVENT_DEFAULT)
        made = self.call("cuEventCreate", flags)
        self._frees.append(("cuEventDestroy", made))
        return made

    def mark(self, event: Any) -> None:
        """Let the stream note in an event when it comes by; in a graph, at each launch of it."""
        kinds = self._driver.CUevent_record_flags
        kind = kinds.CU_EVENT_RECORD_EXTERNAL if self._capturing else kinds.CU_EVENT_RECORD_DEFAULT
        self.call("cuEventRecordWithFlags", event, self._stream, int(kind))

    def elapsed_ms(self, begin: Any, end: Any) -> float:
        """Return the time between two events that the stream has come by."""
        return float(self.call("cuEventElapsedTime", begin, end))

    def capture(self, body: Callable[[], None]) -> Any:
        """Record what `body` gives the stream as one CUDA graph; return its handle.

        The capture is this thread's alone: other threads may allocate meanwhile.

        Raises:
            EngineMismatchError: what was given cannot be captured; the stream is as before.
        """
        mode = self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self.call("cuStreamBeginCapture", self._stream, mode)
        self._capturing = True
        try:
            body()
        except BaseException:
            with contextlib.suppress(EngineMismatchError):  # what was captured so far is dropped
                self._destroy(self.call("cuStreamEndCapture", self._stream))
            raise
        finally:
            self._capturing = False
        with self._graph() as graph:
            made = self.call("cuGraphInstantiate", graph, 0)
        self._frees.append(("cuGraphExecDestroy", made))
        return made

    def launch(self, graph: Any) -> None:
        """Give the stream a graph."""
        self.call("cuGraphLaunch", graph, self._stream)

    def drop(self, graph: Any) -> None:
        """Free a graph now; else `close` does."""
        self._free("cuGraphExecDestroy", int(graph))

    def close(self) -> None:
        """Free everything, the last first; a second call does nothing.

        An error is not told: after one that a kernel made, every call answers with the same.
        """
        if not self._open:
            return
        self._open = False
        steps = [("cuCtxSetCurrent", self._context), ("cuStreamSynchronize", self._stream),
                 *reversed(self._frees), ("cuDevicePrimaryCtxRelease", self._device)]  # fmt: skip
        self._frees.clear()
        for step in steps:
            with contextlib.suppress(EngineMismatchError):
                self.call(*step)

    @contextlib.contextmanager
    def _graph(self) -> Iterator[Any]:
        graph = self.call("cuStreamEndCapture", self._stream)
        try:
            yield graph
        finally:
            self._destroy(graph)

    def _destroy(self, graph: Any) -> None:
        if graph is not None and int(graph):
            self.call("cuGraphDestroy", graph)

    def _typed(self, address: int) -> Any:
        return self._driver.CUdeviceptr(address)
