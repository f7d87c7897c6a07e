"""What Linux tells of the machine: clocks, temperatures, and who takes CPU time from us.

Everything is read from files below `root`; what is not there, or is no number, is None.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

ROOT = Path("/")
CPUS = "sys/devices/system/cpu"


class Quota(NamedTuple):
    """What a container may use of the CPU.

    Attributes:
        cores: so many at once, such as 1.5; None where nothing limits it.
        stopped_s: seconds for which its threads were stopped so far, because it had used them up.
    """

    cores: float | None
    stopped_s: float | None


def clock_mhz(root: Path = ROOT) -> float | None:
    """Return the clock of the fastest core now, as the kernel measures it; mostly not in a VM."""
    clocks = _numbers(root, f"{CPUS}/cpu[0-9]*/cpufreq/scaling_cur_freq")
    return max(clocks) / 1000 if clocks else None


def temperature_c(root: Path = ROOT) -> float | None:
    """Return the temperature of the hottest sensor now."""
    found = _numbers(root, "sys/class/thermal/thermal_zone*/temp")
    found += _numbers(root, "sys/class/hwmon/hwmon*/temp*_input")
    return max(found) / 1000 if found else None


def throttles(root: Path = ROOT) -> int | None:
    """Return how often heat has lowered a clock since the machine was started."""
    counts = _numbers(root, f"{CPUS}/cpu[0-9]*/thermal_throttle/*_throttle_count")
    return int(sum(counts)) if counts else None


def stolen(root: Path = ROOT) -> tuple[int, int] | None:
    """Return the CPU time that a hypervisor gave to others, and all CPU time, in ticks so far."""
    fields = text(root / "proc/stat").partition("\n")[0].split()[1:9]
    if len(fields) < 8 or not all(field.isdecimal() for field in fields):
        return None
    ticks = [int(field) for field in fields]  # user nice system idle iowait irq softirq steal
    return ticks[7], sum(ticks)


def quota(root: Path = ROOT) -> Quota:
    """Return what this process's control groups let it use, of version 2 or 1."""
    for line in text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            found = _quota_v2(root / "sys/fs/cgroup", path)
        elif "cpu" in controllers.split(","):
            found = _quota_v1(root / "sys/fs/cgroup/cpu", path)
        else:
            continue
        if found.cores is not None:
            return found
    return Quota(None, None)


def _quota_v2(mount: Path, path: str) -> Quota:
    """Return the narrowest limit of a group and of those above it."""
    limits = []
    for folder in _upwards(mount, path):
        most, _, period = text(folder / "cpu.max").partition(" ")
        if most.isdecimal() and period.isdecimal():
            limits.append((int(most) / int(period), folder))
    if not limits:
        return Quota(None, None)
    cores, folder = min(limits)
    stopped = _field(text(folder / "cpu.stat"), "throttled_usec")
    return Quota(cores, None if stopped is None else stopped / 1e6)


def _quota_v1(mount: Path, path: str) -> Quota:
    for folder in _upwards(mount, path):
        most, period = (text(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if most.isdecimal() and period.isdecimal():  # -1 is no limit
            stopped = _field(text(folder / "cpu.stat"), "throttled_time")
            return Quota(int(most) / int(period), None if stopped is None else stopped / 1e9)
    return Quota(None, None)


def _upwards(mount: Path, path: str) -> list[Path]:
    """Return the folders of a group and of those above it, up to the mount."""
    inside = mount / path.strip("/")
    return [folder for folder in (inside, *inside.parents) if folder.is_relative_to(mount)]


def _field(lines: str, name: str) -> int | None:
    for line in lines.splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.isdecimal():
            return int(value)
    return None


def _numbers(root: Path, pattern: str) -> list[float]:
    return [float(found) for path in root.glob(pattern) if (found := text(path)).isdecimal()]


def text(path: Path) -> str:
    """Return what a file holds, stripped; nothing where it cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
