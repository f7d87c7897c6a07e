"""A sink that fails is tried again with a later step, and what it missed is counted."""

from __future__ import annotations

import logging
import time
from types import TracebackType

from vmoe.errors import OutputError

from . import Sink, Step

log = logging.getLogger("vmoe")

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0  # before a failed sink is tried again; it doubles


class Kept:
    """A sink that never stops the stream; see `Sink`.

    Attributes:
        failures: how often it failed.
        missed: results and events that it did not take.
        error: the last failure.
    """

    def __init__(self, sink: Sink) -> None:
        """Take the sink."""
        self.name, self.wants_frames = sink.name, sink.wants_frames
        self.failures = self.missed = 0
        self.error: OutputError | None = None
        self._sink = sink
        self._wait_s, self._again_s = FIRST_WAIT_S, 0.0

    def take(self, step: Step) -> None:
        """Hand the step on, unless the sink failed a short while ago."""
        try:
            if time.monotonic() >= self._again_s:
                self._sink.take(step)
                self._wait_s = FIRST_WAIT_S
                return
        except OutputError as e:
            self.failures += 1
            if self.error is None:
                log.warning("%s The stream goes on; %s is tried again.", e, self.name)
            self.error = e
            self._again_s = time.monotonic() + self._wait_s
            self._wait_s = min(2 * self._wait_s, LONGEST_WAIT_S)
        self.missed += (step.result is not None) + len(step.events)

    def __enter__(self) -> Kept:
        self._sink.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._sink.__exit__(kind, error, trace)
