"""Energy from readings of power, where there is no counter of energy."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Integral:
    """Sums up power over time: trapezoids between readings, the last one held since.

    One thread adds, another may ask.
    """

    def __init__(self, now_s: Callable[[], float] = time.perf_counter) -> None:
        """Begin at 0 J; `now_s` is the clock, in seconds."""
        self._now_s = now_s
        self._lock = threading.Lock()
        self._joules = 0.0
        self._last: tuple[float, float] | None = None  # seconds, watts

    def add(self, watts: float) -> None:
        """Add a reading that was taken now."""
        now = self._now_s()
        with self._lock:
            if self._last is not None:
                then, before = self._last
                self._joules += (now - then) * (watts + before) / 2
            self._last = now, watts

    def joules(self) -> float:
        """Return the energy from the first reading until now; 0 before it."""
        with self._lock:
            if self._last is None:
                return 0.0
            then, watts = self._last
            return self._joules + (self._now_s() - then) * watts


class Poll:
    """Reads a power again and again, in a thread of its own, until it is closed."""

    def __init__(self, watts: Callable[[], float], step_s: float) -> None:
        """Begin; `watts` is called every `step_s` seconds.

        Raises:
            VmoeError: what `watts` raises at its first call.
        """
        self._watts, self._step_s = watts, step_s
        self._sum = Integral()
        self._sum.add(watts())
        self._failed: Exception | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._read, name="power", daemon=True)
        self._thread.start()

    def joules(self) -> float:
        """Return the energy since it began.

        Raises:
            VmoeError: a reading failed since.
        """
        if self._failed is not None:
            raise self._failed
        return self._sum.joules()

    def close(self) -> None:
        """End the thread; a second call does nothing."""
        self._ended.set()
        self._thread.join()

    def _read(self) -> None:
        while not self._ended.wait(self._step_s):
            try:
                self._sum.add(self._watts())
            except Exception as e:  # whoever asks for the joules gets it
                self._failed = e
                return
