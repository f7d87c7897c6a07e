"""NVML: the energy counter of an NVIDIA GPU, through the library of its driver.

Six functions of libnvidia-ml.so.1, called by ctypes: they come with the driver, so that nothing is
installed for them. nvidia-smi shows power alone, and its manual says that its output may change.

Source: NVML API reference, nvmlDeviceGetTotalEnergyConsumption (Volta or newer),
nvmlDeviceGetPowerUsage.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from typing import Any

from vmoe.errors import MissingDependencyError, SettingError, VmoeError

from ._sampled import Poll

LIBRARY = "libnvidia-ml.so.1"
NOT_SUPPORTED = 3  # NVML_ERROR_NOT_SUPPORTED
STEP_S = 0.1  # the counter rises every 20 to 100 ms
POLL_S = 0.02
NAME_BYTES = 96  # NVML_DEVICE_NAME_V2_BUFFER_SIZE


class _NotSupportedError(VmoeError):
    """The GPU is too old for what was asked."""


def open_meter(device: str, library: Any = None) -> Nvml:
    """Open the GPU of a device: N of cuda:N, in the order of the PCI bus; else the first.

    Args:
        device: auto, cpu or cuda:N.
        library: the functions; None loads the driver's.

    Raises:
        MissingDependencyError: no driver of NVIDIA's.
        SettingError: the bundles run on the CPU.
        VmoeError: no such GPU, or its energy cannot be read.
    """
    if device == "cpu":
        raise SettingError("--power nvml counts a GPU that --device cpu leaves idle: take rapl.")
    found = re.fullmatch(r"cuda:(\d+)", device)
    return Nvml(library or _load(), int(found[1]) if found else 0)


def _load() -> Any:
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError as e:
        raise MissingDependencyError(
            f"NVML ({LIBRARY}) is not here: it comes with the driver of an NVIDIA GPU, and into a "
            "container by --gpus all."
        ) from e


class Nvml:
    """One GPU: its counter of energy; of a GPU older than Volta, its power, summed up."""

    def __init__(self, library: Any, index: int) -> None:
        """Open NVML and the GPU."""
        self._library = library
        library.nvmlErrorString.restype = ctypes.c_char_p
        self._ask("nvmlInit_v2")
        self._open = True
        self._poll: Poll | None = None
        try:
            self._card = ctypes.c_void_p()
            name = ctypes.create_string_buffer(NAME_BYTES)
            self._ask("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), _by(self._card))
            self._ask("nvmlDeviceGetName", self._card, name, ctypes.c_uint(NAME_BYTES))
            self._joules, by, self.step_s = self._counter()
        except VmoeError:
            self.close()
            raise
        self.covers = f"GPU {index} ({name.value.decode(errors='replace')}), by NVML's {by}"

    def joules(self) -> float:
        """Return the energy since it was opened."""
        return self._joules()

    def close(self) -> None:
        """Close NVML; a second call does nothing."""
        if self._poll is not None:
            self._poll.close()
        if self._open:
            self._open = False
            self._library.nvmlShutdown()

    def _counter(self) -> tuple[Callable[[], float], str, float]:
        """Return what reads the joules, by what, and how often that changes."""
        try:
            begin = self._total()
        except _NotSupportedError:
            self._poll = Poll(self._watts, POLL_S)
            return self._poll.joules, "power, summed up", POLL_S
        return lambda: self._total() - begin, "counter", STEP_S

    def _total(self) -> float:
        millijoules = ctypes.c_ulonglong()
        self._ask("nvmlDeviceGetTotalEnergyConsumption", self._card, _by(millijoules))
        return millijoules.value / 1000

    def _watts(self) -> float:
        milliwatts = ctypes.c_uint()
        self._ask("nvmlDeviceGetPowerUsage", self._card, _by(milliwatts))
        return milliwatts.value / 1000

    def _ask(self, name: str, *args: Any) -> None:
        code = getattr(self._library, name)(*args)
        if code:
            kind = _NotSupportedError if code == NOT_SUPPORTED else VmoeError
            said = self._library.nvmlErrorString(code).decode(errors="replace")
            raise kind(f"NVML's {name} says {said!r}: the GPU's energy cannot be read here.")


def _by(value: Any) -> Any:
    return ctypes.byref(value)
