"""Launch compiled kernels through the CUDA driver, on a stream that is given.

A launch allocates nothing, waits for nothing and copies nothing: it can be captured in a CUDA
graph, once its kernel was loaded (`prepare`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vmoe.errors import EngineMismatchError, MissingDependencyError

from .calls import Call
from .compiled import Kernel, arch_for, archs, kernel, text

THREADS = 32  # of a warp
STATIC_BYTES = 48 * 1024  # of shared memory; a kernel that takes more has to ask


class Launcher:
    """The kernels in one CUDA context, loaded when first prepared or launched."""

    def __init__(self, arch: int | None = None, folder: Path | None = None) -> None:
        """Choose the kernels for the GPU of the current context.

        Args:
            arch: take those of this architecture; None is what suits the GPU best.
            folder: take them, as PTX or cubin, from here; None is what vmoe carries.

        Raises:
            MissingDependencyError: cuda-bindings or the driver is missing.
            EngineMismatchError: there is no current context.
            BundleError: the GPU is older than the kernels.
        """
        try:
            from cuda.bindings import driver

            self._driver = driver
            device = self._do("cuCtxGetDevice")
        except (ImportError, RuntimeError) as e:
            raise MissingDependencyError(
                "the routed kernels need NVIDIA's driver and cuda-bindings: "
                "pip install 'vmoe[tensorrt]'."
            ) from e
        kinds = driver.CUdevice_attribute
        self.capability = 10 * self._do(
            "cuDeviceGetAttribute", kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device
        ) + self._do(
            "cuDeviceGetAttribute", kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device
        )
        self.arch = arch_for(self.capability, archs(folder)) if arch is None else arch
        self._folder = folder
        self._loaded: dict[str, tuple[Kernel, Any]] = {}

    def prepare(self, name: str) -> None:
        """Load one kernel; a second time does nothing."""
        if name in self._loaded:
            return
        found = kernel(name, self.arch, self._folder)
        module = self._do("cuModuleLoadData", text(found, self._folder))
        function = self._do("cuModuleGetFunction", module, found.entry.encode())
        if found.shared_bytes > STATIC_BYTES:
            kind = self._driver.CUfunction_attribute
            wanted = kind.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._do("cuFuncSetAttribute", function, wanted, found.shared_bytes)
        self._loaded[name] = found, function

    def launch(self, call: Call, stream: int) -> None:
        """Put a call on a stream; the pointers among its arguments are the first ones.

        Raises:
            EngineMismatchError: the driver refuses it.
        """
        self.bind(call)(stream)

    def bind(self, call: Call) -> Callable[[int], None]:
        """Return a call as a function of the stream, which can be called again and again."""
        self.prepare(call.kernel)
        found, function = self._loaded[call.kernel]
        held, addresses = packed(call, found)
        at, threads = ctypes.addressof(addresses), THREADS * found.warps
        shared = found.shared_bytes

        def go(stream: int, _kept: Any = (held, addresses)) -> None:
            self._do("cuLaunchKernel", function, *call.grid, threads, 1, 1, shared, stream, at, 0)

        return go

    def _do(self, name: str, *args: Any) -> Any:
        """Call the driver; return what it gives, or nothing."""
        error, *values = getattr(self._driver, name)(*args)
        if error != self._driver.CUresult.CUDA_SUCCESS:
            raise EngineMismatchError(f"CUDA's {name} says {error.name}; see vmoe doctor.")
        return values[0] if values else None


def packed(call: Call, found: Kernel) -> tuple[list[Any], Any]:
    """Return a call's arguments in C, and the array of their addresses.

    Raises:
        EngineMismatchError: the kernel takes another number of arguments.
    """
    if len(call.args) != found.params:
        raise EngineMismatchError(
            f"kernel {call.kernel} takes {found.params} arguments and was given "
            f"{len(call.args)}. Install vmoe again."
        )
    held: list[Any] = [
        ctypes.c_void_p(value) if i < found.pointers else ctypes.c_int32(value)
        for i, value in enumerate(call.args)
    ]
    return held, (ctypes.c_void_p * len(held))(*map(ctypes.addressof, held))


_shared: dict[int, Launcher] = {}


def shared() -> Launcher:
    """Return the launcher of the current context: all plugins of a process use one."""
    key = _context()
    if key not in _shared:
        _shared[key] = Launcher()
    return _shared[key]


def _context() -> int:
    """Return a number that no other context of the process has, also when this one is gone.

    Its address is another's after that, whose kernels are not those that were loaded here.
    """
    try:
        from cuda.bindings import driver

        return int(driver.cuCtxGetId(None)[1] or 0)
    except (ImportError, RuntimeError):
        return 0  # Launcher says what is missing
