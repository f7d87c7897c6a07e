"""What is sent over a network goes out in a thread of its own: a slow peer delays nobody."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

from vmoe.errors import OutputError

log = logging.getLogger("vmoe")

T = TypeVar("T")
WAITING = 256  # messages that wait for the network; then the oldest is dropped
FIRST_WAIT_S, LONGEST_WAIT_S = 0.25, 10.0  # before a message is sent again; it doubles
END_S = 3.0  # how long the last messages may take at the end


class Sender(Generic[T]):
    """Sends messages in order, each until it arrives; those that wait too long are dropped.

    Attributes:
        sent: how many arrived.
        failures: how often sending one failed.
        dropped: how many never arrived.
    """

    def __init__(self, name: str, send: Callable[[T], None]) -> None:
        """Take what sends one message, and raises OSError or ValueError where it fails."""
        self.sent = self.failures = self.dropped = 0
        self._name, self._send = name, send
        self._waiting: deque[T] = deque()
        self._changed = threading.Condition()
        self._ended_s: float | None = None
        self._thread = threading.Thread(target=self._run, name=f"vmoe-send-{name}", daemon=True)

    def start(self) -> None:
        """Begin to send."""
        self._thread.start()

    def put(self, message: T) -> None:
        """Add a message; never waits. The first one is under way, so the second is dropped."""
        with self._changed:
            if len(self._waiting) >= WAITING:
                del self._waiting[1]
                self.dropped += 1
            self._waiting.append(message)
            self._changed.notify()

    def end(self, kind: type[BaseException] | None = None) -> None:
        """Let the last messages go out, for a short while; `kind` is what ended the stream.

        Raises:
            OutputError: some messages never arrived, and nothing worse has happened.
        """
        with self._changed:
            self._ended_s = time.monotonic()
            self._changed.notify()
        self._thread.join(2 * END_S)
        self.dropped += len(self._waiting)
        if self.dropped and kind is None:
            raise OutputError(
                f"{self._name}: {self.dropped} messages never arrived, {self.sent} did. Look at "
                "its address and at the network."
            )

    def _run(self) -> None:
        wait_s = FIRST_WAIT_S
        while True:
            with self._changed:
                while not self._waiting and self._ended_s is None:
                    self._changed.wait()
                if not self._waiting:
                    return
                message = self._waiting[0]  # it stays there, and counted, until it has arrived
            try:
                self._send(message)
            except (OSError, ValueError) as e:
                self._failed(e)
                self._pause(wait_s)
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)
            else:
                with self._changed:
                    self._waiting.popleft()
                self.sent, wait_s = self.sent + 1, FIRST_WAIT_S
            if self._is_over():
                return

    def _failed(self, e: Exception) -> None:
        self.failures += 1
        if self.failures == 1:
            why = getattr(e, "strerror", None) or e
            log.warning("%s: %s. It is tried again.", self._name, why)

    def _pause(self, wait_s: float) -> None:
        """Wait before a message is sent again: until the end begins, then shortly."""
        with self._changed:
            if self._ended_s is None:
                self._changed.wait_for(lambda: self._ended_s is not None, wait_s)
            else:
                self._changed.wait(FIRST_WAIT_S)

    def _is_over(self) -> bool:
        return self._ended_s is not None and time.monotonic() > self._ended_s + END_S
