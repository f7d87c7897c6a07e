"""What runs on a GPU take, by its own events; nothing is noted unless somebody asks.

    h2d      uploaded .. on device           enqueue   the host's calls, by the host's clock
    device   begin .. computed               d2h       computed .. end

The last three events are recorded inside of the CUDA graphs, at each launch of one.
"""

from __future__ import annotations

from . import Times
from ._cuda import Gpu

EVENTS = ("uploading", "uploaded", "begin", "computed", "end")


class Clock:
    """Events on one stream, and the sum of what they said."""

    def __init__(self, gpu: Gpu) -> None:
        """Make the events."""
        self._gpu = gpu
        self._events = {name: gpu.event() for name in EVENTS}
        self._upload = False  # one was made that no run has waited for yet
        self._sum = Times()

    def mark(self, what: str) -> None:
        """Let the stream note the time of one of EVENTS when it comes by."""
        self._gpu.mark(self._events[what])
        self._upload = self._upload or what == "uploaded"

    def add(self, enqueue_ms: float) -> None:
        """Add a run that the host has waited for, and the upload before it, where there was one."""
        h2d = self._between("uploading", "uploaded") if self._upload else 0.0
        self._upload = False
        self._sum = Times(
            self._sum.h2d_ms + h2d,
            self._sum.enqueue_ms + enqueue_ms,
            self._sum.device_ms + self._between("begin", "computed"),
            self._sum.d2h_ms + self._between("computed", "end"),
        )

    def take(self) -> Times:
        """Return the sums since they were taken last."""
        taken, self._sum = self._sum, Times()
        return taken

    def _between(self, begin: str, end: str) -> float:
        return self._gpu.elapsed_ms(self._events[begin], self._events[end])
