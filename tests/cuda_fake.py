"""CUDA's driver as far as vmoe calls it, in a process's own memory: `cuda.bindings.driver`.

Allocations are real memory, copies are real copies, and every address is looked up: what reaches
beyond an allocation fails the test. What a stream is given runs at once, or, while it is captured,
when the graph is launched. `fail` makes a function answer an error.
"""

# ruff: noqa: N801, N802  # the names are those of CUDA and of TensorRT
from __future__ import annotations

import ctypes
import enum
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy as np
import pytest


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_INVALID_HANDLE = 400
    CUDA_ERROR_NOT_READY = 600
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900


class CUstream_flags(enum.IntEnum):
    CU_STREAM_NON_BLOCKING = 1


class CUstreamCaptureMode(enum.IntEnum):
    CU_STREAM_CAPTURE_MODE_THREAD_LOCAL = 1


class CUevent_flags(enum.IntEnum):
    CU_EVENT_DEFAULT = 0


class CUevent_record_flags(enum.IntEnum):
    CU_EVENT_RECORD_DEFAULT = 0
    CU_EVENT_RECORD_EXTERNAL = 1


class CUdevice_attribute(enum.IntEnum):
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76


OK = CUresult.CUDA_SUCCESS
Answer = tuple[Any, ...]


class Driver(ModuleType):
    """The functions, and what a test sees of them.

    Attributes:
        fail: errors that functions answer instead, by name.
        calls: names of the functions that were called, in order.
        live: handles and addresses that are not freed yet, by kind.
        launches: how many graphs were launched.
        busy: how often a stream is asked before it says that it is done.
    """

    CUresult = CUresult
    CUevent_flags = CUevent_flags
    CUevent_record_flags = CUevent_record_flags
    CUstream_flags = CUstream_flags
    CUstreamCaptureMode = CUstreamCaptureMode
    CUdevice_attribute = CUdevice_attribute
    CUdeviceptr = int

    def __init__(self, name: str = "NVIDIA Test", capability: tuple[int, int] = (8, 7)) -> None:
        super().__init__("cuda.bindings.driver")
        self.gpu, self.capability = name, capability
        self.fail: dict[str, CUresult] = {}
        self.calls: list[str] = []
        self.launches, self.busy, self._asked = 0, 0, 0
        self.current = False
        self.live: dict[str, dict[int, Any]] = {
            kind: {} for kind in ("memory", "host", "stream", "graph", "exec", "context", "event")
        }
        self._captured: list[Callable[[], None]] | None = None
        self._next, self._ticks = 1, 0

    def __getattribute__(self, name: str) -> Any:
        held = super().__getattribute__(name)
        if not name.startswith("cu") or not callable(held):
            return held

        def call(*arguments: Any) -> Answer:
            self.calls.append(name)
            if name in self.fail:
                return (self.fail[name], *[None] * 1)
            if name not in ("cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuCtxSetCurrent",
                            "cuDevicePrimaryCtxRetain", "cuDriverGetVersion"):  # fmt: skip
                assert self.current, f"{name} without a context"
            answer: Answer = held(*arguments)
            return answer

        return call

    def _handle(self, kind: str, value: Any) -> int:
        self._next += 1
        self.live[kind][self._next] = value
        return self._next

    @property
    def captures(self) -> bool:
        """Whether what the stream is given is being captured."""
        return self._captured is not None

    def run(self, work: Callable[[], None]) -> None:
        """Do what a stream was given: now, or with the graph that is being captured."""
        if self._captured is None:
            work()
        else:
            self._captured.append(work)

    def check(self, address: int, size: int) -> int:
        """Return an address, once it is known that so many bytes there are ours."""
        for kind in ("memory", "host"):
            for start, held in self.live[kind].items():
                if start <= address and address + size <= start + held.nbytes:
                    return address
        raise AssertionError(f"{size} bytes at {address:#x} are outside of every allocation")

    def cuInit(self, flags: int) -> Answer:
        return (OK,)

    def cuDriverGetVersion(self) -> Answer:
        return OK, 12060

    def cuDeviceGetCount(self) -> Answer:
        return OK, 1

    def cuDeviceGet(self, ordinal: int) -> Answer:
        return OK, ordinal

    def cuDeviceGetName(self, length: int, device: int) -> Answer:
        return OK, self.gpu.encode().ljust(length, b"\0")

    def cuDeviceGetAttribute(self, attribute: CUdevice_attribute, device: int) -> Answer:
        return OK, self.capability[attribute - 75]

    def cuDeviceTotalMem(self, device: int) -> Answer:
        return OK, 8 << 30

    def cuDevicePrimaryCtxRetain(self, device: int) -> Answer:
        return OK, self._handle("context", device)

    def cuDevicePrimaryCtxRelease(self, device: int) -> Answer:
        self.live["context"].popitem()
        self.current = bool(self.live["context"])
        return (OK,)

    def cuCtxSetCurrent(self, context: int) -> Answer:
        assert context in self.live["context"]
        self.current = True
        return (OK,)

    def cuStreamCreate(self, flags: int) -> Answer:
        return OK, self._handle("stream", flags)

    def cuStreamDestroy(self, stream: int) -> Answer:
        del self.live["stream"][stream]
        return (OK,)

    def cuStreamSynchronize(self, stream: int) -> Answer:
        assert self._captured is None, "a wait in a capture"
        self._asked = 0
        return (OK,)

    def cuStreamQuery(self, stream: int) -> Answer:
        assert self._captured is None, "a question in a capture, which would end it"
        self._asked += 1
        if self._asked <= self.busy:
            return (CUresult.CUDA_ERROR_NOT_READY,)
        self._asked = 0
        return (OK,)

    def cuEventCreate(self, flags: int) -> Answer:
        return OK, self._handle("event", None)

    def cuEventDestroy(self, event: int) -> Answer:
        del self.live["event"][event]
        return (OK,)

    def cuEventRecordWithFlags(self, event: int, stream: int, flags: int) -> Answer:
        """Note the time: a millisecond after the one before."""
        outside = flags == CUevent_record_flags.CU_EVENT_RECORD_DEFAULT
        assert outside == (self._captured is None), "EXTERNAL is for a capture, and only for one"

        def note() -> None:
            self._ticks += 1
            self.live["event"][event] = self._ticks

        self.run(note)
        return (OK,)

    def cuEventElapsedTime(self, begin: int, end: int) -> Answer:
        held = self.live["event"]
        if held[begin] is None or held[end] is None:  # never recorded
            return CUresult.CUDA_ERROR_INVALID_HANDLE, None
        return OK, float(held[end] - held[begin])

    def _alloc(self, kind: str, size: int) -> Answer:
        held = np.full(size, 0xAB, np.uint8)
        self.live[kind][held.ctypes.data] = held
        return OK, held.ctypes.data

    def cuMemAlloc(self, size: int) -> Answer:
        assert self._captured is None, "an allocation in a capture"
        return self._alloc("memory", size)

    def cuMemFree(self, address: int) -> Answer:
        del self.live["memory"][address]
        return (OK,)

    def cuMemHostAlloc(self, size: int, flags: int) -> Answer:
        return self._alloc("host", size)

    def cuMemFreeHost(self, address: int) -> Answer:
        del self.live["host"][address]
        return (OK,)

    def cuMemsetD8Async(self, address: int, value: int, size: int, stream: int) -> Answer:
        self.run(lambda: ctypes.memset(self.check(address, size), value, size) and None)
        return (OK,)

    def _copy(self, target: int, source: int, size: int) -> Answer:
        self.check(target, size), self.check(source, size)
        self.run(lambda: ctypes.memmove(target, source, size) and None)
        return (OK,)

    def cuMemcpyHtoDAsync(self, target: int, source: int, size: int, stream: int) -> Answer:
        assert source in self.live["host"], "a copy from memory that is not pinned"
        return self._copy(target, source, size)

    def cuMemcpyDtoHAsync(self, target: int, source: int, size: int, stream: int) -> Answer:
        assert target in self.live["host"], "a copy to memory that is not pinned"
        return self._copy(target, source, size)

    def cuStreamBeginCapture(self, stream: int, mode: CUstreamCaptureMode) -> Answer:
        self._captured = []
        return (OK,)

    def cuStreamEndCapture(self, stream: int) -> Answer:
        held, self._captured = self._captured, None
        return OK, self._handle("graph", held)

    def cuGraphInstantiate(self, graph: int, flags: int) -> Answer:
        return OK, self._handle("exec", self.live["graph"][graph])

    def cuGraphDestroy(self, graph: int) -> Answer:
        del self.live["graph"][graph]
        return (OK,)

    def cuGraphExecDestroy(self, made: int) -> Answer:
        del self.live["exec"][made]
        return (OK,)

    def cuGraphLaunch(self, made: int, stream: int) -> Answer:
        self.launches += 1
        for work in self.live["exec"][made]:
            work()
        return (OK,)

    def left(self) -> dict[str, int]:
        """Return how much of each kind is not freed."""
        return {kind: len(held) for kind, held in self.live.items() if held}


def install(patch: pytest.MonkeyPatch, driver: Driver) -> Driver:
    """Let `import cuda.bindings.driver` find the fake, until the test ends."""
    for name in ("cuda", "cuda.bindings"):
        package = ModuleType(name)
        package.__path__ = []
        package.__spec__ = ModuleSpec(name, None, is_package=True)
        patch.setitem(sys.modules, name, package)
    driver.__spec__ = ModuleSpec("cuda.bindings.driver", None)
    patch.setitem(sys.modules, "cuda.bindings.driver", driver)
    return driver
