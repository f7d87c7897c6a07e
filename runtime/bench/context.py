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

PACKAGES = ("numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "opencv-python")
CLOCK = Path("/sys/devices/system/cpu/cpu0/cpufreq")
NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")


def read() -> dict[str, Any]:
    """Return the machine as it is now; what cannot be read is None."""
    return {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": cores(),
        "virtual": "hypervisor" in _text(Path("/proc/cpuinfo")),
        "load_1min": load(),
        "governor": _text(CLOCK / "scaling_governor") or None,
        "clock_mhz": _clock_mhz(),
        "board": _text(Path("/proc/device-tree/model")).rstrip("\0") or None,
        "gpu": _gpu(),
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


def line(context: dict[str, Any]) -> str:
    """Return the machine as one line."""
    cpu = f"{context['cpu']}, {context['cores']} cores"
    gpu = f"; {context['gpu']}" if context["gpu"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in context["versions"].items())
    return f"{cpu}{gpu}; load {context['load_1min']}; Python {context['python']}, {versions}"


def _cpu_model() -> str:
    for row in _text(Path("/proc/cpuinfo")).splitlines():
        name, _, value = row.partition(":")
        if name.strip() in ("model name", "Model"):
            return value.strip()
    return platform.processor() or platform.machine()


def _clock_mhz() -> float | None:
    khz = _text(CLOCK / "scaling_cur_freq")
    if khz.isdigit():
        return int(khz) / 1000
    for row in _text(Path("/proc/cpuinfo")).splitlines():
        if row.startswith("cpu MHz"):
            return float(row.partition(":")[2])
    return None


def _gpu() -> str | None:
    if shutil.which(NVIDIA_SMI[0]) is None:
        return None
    try:
        found = subprocess.run(NVIDIA_SMI, capture_output=True, text=True, timeout=10, check=False)
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


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
