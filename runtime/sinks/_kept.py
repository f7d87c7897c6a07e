"""A sink that fails is tried again with a later step, and what it missed is counted."""

from __future__ import annotations

import logging
import time
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

from vmoe.errors import OutputError

from . import Sink, Step
from ._sender import Sender

log = logging.getLogger("vmoe")

FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0  # before a failed sink is tried again; it doubles


@runtime_checkable
class Sending(Protocol):
    """A sink that sends what it took in a thread of its own, where it may fail later."""

    sender: Sender[Any]


class Kept:
    """A sink that never stops the stream; see `Sink`.

    Attributes:
        failures: how often it failed; of what is sent over a network, how often sending did.
        missed: results and events that it did not take, or that never arrived.
        error: the last failure.
    """

    def __init__(self, sink: Sink) -> None:
        """Take the sink."""
        self.name, self.wants_frames = sink.name, sink.wants_frames
        self._failures = self._missed = 0
        self.error: OutputError | None = None
        self._sink = sink
        self._sender = sink.sender if isinstance(sink, Sending) else None
        self._wait_s, self._again_s = FIRST_WAIT_S, 0.0

    @property
    def failures(self) -> int:
        """See above."""
        return self._failures + (self._sender.failures if self._sender else 0)

    @property
    def missed(self) -> int:
        """See above."""
        return self._missed + (self._sender.dropped if self._sender else 0)

    def take(self, step: Step) -> None:
        """Hand the step on, unless the sink failed a short while ago."""
        try:
            if time.monotonic() >= self._again_s:
                self._sink.take(step)
                self._wait_s = FIRST_WAIT_S
                return
        except BrokenPipeError:  # whoever read it has seen enough
            raise
        except (OutputError, OSError, UnicodeError) as e:
            first, error = self.error is None, self._failed(e)
            if first:
                log.warning("%s The stream goes on; %s is tried again.", error, self.name)
            self._again_s = time.monotonic() + self._wait_s
            self._wait_s = min(2 * self._wait_s, LONGEST_WAIT_S)
        self._missed += (step.result is not None) + len(step.events)

    def _failed(self, e: Exception) -> OutputError:
        """Count and keep a failure; return it as the error that it is to the user."""
        self._failures += 1
        why = getattr(e, "strerror", None) or e
        self.error = e if isinstance(e, OutputError) else OutputError(f"{self.name}: {why}.")
        return self.error

    def __enter__(self) -> Kept:
        self._sink.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the sink. Its failure is kept: the sinks left after it learn how the stream ended.

        Where something else ended the stream, nobody will raise the failure, so it is told here.
        """
        try:
            self._sink.__exit__(kind, error, trace)
        except BrokenPipeError:
            raise
        except (OutputError, OSError, UnicodeError) as e:
            failed = self._failed(e)
            if kind is not None:
                log.warning("%s", failed)
