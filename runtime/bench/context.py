"""Where and with what it was measured."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import vmoe

from . import sensors

PACKAGES = (
    "numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "torch", "opencv-python",
    "opencv-python-headless",
)  # fmt: skip
CPU0 = Path("/sys/devices/system/cpu/cpu0/cpufreq")


def read() -> dict[str, Any]:
    """Return the machine as it is now; what cannot be read is None."""
    return {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": cores(),
        "virtual": "hypervisor" in sensors.text(Path("/proc/cpuinfo")),
        "quota_cores": sensors.quota().cores,
        "load_1min": load(),
        "governor": sensors.text(CPU0 / "scaling_governor") or None,
        "clock_mhz": _clock_mhz(),
        "temperature_c": sensors.temperature_c(),
        "board": sensors.text(Path("/proc/device-tree/model")).rstrip("\0") or None,
        "gpu": _nvidia("name,driver_version"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {"vmoe": vmoe.__version__, **_versions()},
    }


def cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load() -> float | None:
    """Return how many threads wanted to run in the last minute, on average."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def gpu_now() -> tuple[float | None, float | None]:
    """Return the clock in MHz and the temperature in deg C of the first NVIDIA GPU."""
    first = (_nvidia("clocks.sm,temperature.gpu", "nounits") or "").partition(";")[0]
    clock, _, temperature = (part.strip() for part in first.partition(","))
    return _number(clock), _number(temperature)


def line(context: dict[str, Any]) -> str:
    """Return the machine as one line."""
    cpu = f"{context['cpu']}, {context['cores']} cores"
    if context.get("quota_cores") is not None:  # older records do not say
        cpu += f" (a container may use {context['quota_cores']:g})"
    gpu = f"; {context['gpu']}" if context["gpu"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in context["versions"].items())
    return f"{cpu}{gpu}; load {context['load_1min']}; Python {context['python']}, {versions}"


def _cpu_model() -> str:
    for row in sensors.text(Path("/proc/cpuinfo")).splitlines():
        name, _, value = row.partition(":")
        if name.strip() in ("model name", "Model"):
            return value.strip()
    return platform.processor() or platform.machine()


def _clock_mhz() -> float | None:
    measured = sensors.clock_mhz()
    if measured is not None:
        return measured
    for row in sensors.text(Path("/proc/cpuinfo")).splitlines():
        if row.startswith("cpu MHz"):
            return float(row.partition(":")[2])
    return None


def _number(text: str) -> float | None:
    return float(text) if text.isdecimal() else None


def _nvidia(fields: str, *form: str) -> str | None:
    """Return what nvidia-smi says of every GPU, with `; ` between; None where there is none."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={fields}", ",".join(["--format=csv,noheader", *form])]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (found.stdout.strip().replace("\n", "; ") or None) if found.returncode == 0 else None


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
