"""Meters of energy, one file each: `open_meter(device) -> Meter`.

    nvml         the GPU, by the counter of NVIDIA's driver
    tegrastats   a whole Jetson module
    rapl         the CPU's packages and memory, Intel and AMD

A meter that cannot be read says why, and what would make it readable; nothing is ever estimated.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple, Protocol

from vmoe import registry
from vmoe.errors import MissingDependencyError, VmoeError

FOLDER = "vmoe.runtime.bench.power"
AUTO, NONE = "auto", "none"
CHOICES = (AUTO, *registry.names(FOLDER), NONE)


class Meter(Protocol):
    """What counts energy; it counts all that runs on what it covers, not this process alone.

    Attributes:
        covers: what it counts, and by what: `GPU 0 (NVIDIA H200), by NVML's counter`.
        step_s: time between two of its readings: a block must last many of them.
    """

    covers: str
    step_s: float

    def joules(self) -> float:
        """Return the energy since it was opened.

        Raises:
            VmoeError: it can no longer be read.
        """
        ...

    def close(self) -> None:
        """Free what is held; a second call does nothing."""
        ...


class Found(NamedTuple):
    """What can be read here.

    Attributes:
        meters: they cover different parts of the machine, so that they may be added.
        why_not: of those that were tried, why others cannot be read.
    """

    meters: tuple[Meter, ...]
    why_not: tuple[str, ...]


def open_meters(stack: ExitStack, asked: str, device: str) -> Found:
    """Open what --power asks for; `stack` closes it.

    auto is tegrastats where it counts a whole module; else the GPU, unless the bundles run on the
    CPU, and the CPU: what of them can be read.

    Args:
        stack: closes the meters.
        asked: one of CHOICES.
        device: auto, cpu or cuda:N: where the bundles run.

    Raises:
        MissingDependencyError: a meter was named, and what it reads by is not installed.
        VmoeError: a meter was named, and cannot be read.
    """
    if asked == NONE:
        return Found((), ())
    if asked != AUTO:
        return Found((_open(stack, asked, device),), ())
    whole = _try_all(stack, ["tegrastats"], device)
    if whole.meters:
        return Found(whole.meters, ())
    some = _try_all(stack, ["rapl"] if device == "cpu" else ["nvml", "rapl"], device)
    why_not = (*some.why_not, *whole.why_not)
    if not some.meters:
        return Found((), tuple(str(e) for e in why_not))
    # What is not installed is of hardware that is not here: nothing is missing from the sum.
    lacks = [str(e) for e in why_not if not isinstance(e, MissingDependencyError)]
    return Found(some.meters, tuple(lacks))


class _Tried(NamedTuple):
    meters: tuple[Meter, ...]
    why_not: tuple[VmoeError, ...]


def _try_all(stack: ExitStack, names: Sequence[str], device: str) -> _Tried:
    meters: list[Meter] = []
    why_not: list[VmoeError] = []
    for name in names:
        try:
            meters.append(_open(stack, name, device))
        except VmoeError as e:
            why_not.append(e)
    return _Tried(tuple(meters), tuple(why_not))


def _open(stack: ExitStack, name: str, device: str) -> Meter:
    meter: Meter = registry.load(FOLDER, name, "--power").open_meter(device)
    stack.callback(meter.close)
    return meter
