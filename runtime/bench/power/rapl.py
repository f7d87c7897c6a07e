"""RAPL: the energy counters of a CPU's packages and memory, as Linux shows them (powercap).

    /sys/class/powercap/intel-rapl:0/name                  package-0
    /sys/class/powercap/intel-rapl:0/energy_uj             rises; begins anew at max_energy_range_uj
    /sys/class/powercap/intel-rapl:0:0/name                core, uncore or dram

A package counts its cores and its graphics, not the memory: dram is a zone of its own where there
is one. psys, the whole system, holds the packages once more. AMD's counters have the same names,
without dram.

Source: Linux, Documentation/power/powercap/powercap.rst.
"""

from __future__ import annotations

import re
from pathlib import Path

from vmoe.errors import VmoeError

ROOT = Path("/sys/class/powercap")
ZONES = "intel-rapl:*"  # of AMD's, too; intel-rapl-mmio:* are the same packages once more
COUNTED = re.compile(r"package-\d+(-die-\d+)?|dram")
STEP_S = 0.001  # the processor counts every millisecond
READABLE = f"Run as root, or until the next boot: sudo chmod a+r {ROOT}/{ZONES}/energy_uj"


def open_meter(device: str, root: Path = ROOT) -> Rapl:
    """Open the counters of all packages; they are the CPU's, whatever the device is.

    Raises:
        VmoeError: there is none, or it may not be read.
    """
    zones = sorted(zone for zone in root.glob(ZONES) if COUNTED.fullmatch(_name(zone)))
    if not zones:
        raise VmoeError(
            f"no RAPL counter of a package under {root}: Linux on the bare machine has them, a "
            "virtual machine seldom does."
        )
    return Rapl(zones)


class Rapl:
    """The sum of the counters of all packages, and of the memory where it has some."""

    def __init__(self, zones: list[Path]) -> None:
        """Begin at 0 J with the zones' folders."""
        named = [_name(zone) for zone in zones]
        packages = sum(name.startswith("package") for name in named)
        memory = ", memory" if "dram" in named else ", memory not counted"
        self.covers = f"CPU ({packages} package{'s' * (packages > 1)}{memory}), by RAPL"
        self.step_s = STEP_S
        self._joules = 0.0
        # A counter begins anew after its range: 65 to 262 kJ, minutes of a busy server.
        self._zones = [(zone, _micro(zone / "max_energy_range_uj")) for zone in zones]
        self._last = [_micro(zone / "energy_uj") for zone in zones]

    def joules(self) -> float:
        """Return the energy since it was opened; to be asked at least once in a counter's range."""
        for i, (zone, whole) in enumerate(self._zones):
            now = _micro(zone / "energy_uj")
            risen = now - self._last[i]
            self._joules += (risen if risen >= 0 else risen + whole) / 1e6
            self._last[i] = now
        return self._joules

    def close(self) -> None:
        """Nothing is held."""


def _name(zone: Path) -> str:
    try:
        return (zone / "name").read_text().strip()
    except OSError:
        return ""


def _micro(path: Path) -> int:
    try:
        return int(path.read_text())
    except PermissionError as e:
        raise VmoeError(f"cannot read {path}: {e.strerror}. {READABLE}") from e
    except OSError as e:
        raise VmoeError(f"cannot read {path}: {e.strerror}. Use --power none.") from e
    except ValueError as e:
        raise VmoeError(f"{path} holds no number: {e}. Use --power none.") from e
