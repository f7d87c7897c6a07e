"""The machine while it is measured: looked at between calls, never beside one."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from . import context, sensors

EVERY_S = 0.5
GPU_EVERY_S = 5.0  # asking nvidia-smi takes a process


class Watch:
    """What clocks and temperatures did from when it was made, and who took CPU time meanwhile."""

    def __init__(self, *, gpu: bool = False, root: Path = sensors.ROOT) -> None:
        """Note how things stand.

        Args:
            gpu: ask nvidia-smi, too.
            root: below it lie sys/ and proc/.
        """
        self._root, self._gpu = root, gpu
        self._began = time.monotonic()
        self._stolen = sensors.stolen(root)
        self._throttles = sensors.throttles(root)
        self._stopped_s = sensors.quota(root).stopped_s
        self._seen: dict[str, list[float]] = {
            name: []
            for name in ("clock_mhz", "temperature_c", "gpu_clock_mhz", "gpu_temperature_c")
        }
        self._next = self._next_gpu = 0.0
        self.look()

    def rounds(self, rounds: Iterable[int]) -> Iterator[int]:
        """Yield the rounds of a measurement; look between them."""
        for number in rounds:
            self.look()
            yield number

    def look(self) -> None:
        """Read clocks and temperatures, unless that was done a moment ago."""
        now = time.monotonic()
        if now >= self._next:
            self._next = now + EVERY_S
            self._add("clock_mhz", sensors.clock_mhz(self._root))
            self._add("temperature_c", sensors.temperature_c(self._root))
        if self._gpu and now >= self._next_gpu:
            clock, temperature = context.gpu_now()
            self._add("gpu_clock_mhz", clock)
            self._add("gpu_temperature_c", temperature)
            self._next_gpu = time.monotonic() + GPU_EVERY_S

    def found(self) -> dict[str, Any]:
        """Return what was seen since the beginning; what cannot be read is None."""
        return {
            "seconds": round(time.monotonic() - self._began, 3),
            "load_1min": context.load(),
            **{name: _halves(values) for name, values in self._seen.items()},
            "steal_share": self._steal_share(),
            "throttles": _since(self._throttles, sensors.throttles(self._root)),
            "quota_stopped_s": _since(self._stopped_s, sensors.quota(self._root).stopped_s),
        }

    def _add(self, name: str, value: float | None) -> None:
        if value is not None:
            self._seen[name].append(value)

    def _steal_share(self) -> float | None:
        before, now = self._stolen, sensors.stolen(self._root)
        if before is None or now is None or now[1] <= before[1]:
            return None
        return round((now[0] - before[0]) / (now[1] - before[1]), 4)


def _since(before: float | None, now: float | None) -> float | None:
    return None if before is None or now is None else round(now - before, 3)


def _halves(values: list[float]) -> dict[str, float] | None:
    """Return the range, and the medians of the first and of the second half."""
    if not values:
        return None
    middle = len(values) // 2
    return {
        "min": min(values),
        "max": max(values),
        "first_half": median(values[: middle or 1]),
        "second_half": median(values[middle:]),
    }
