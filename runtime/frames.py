"""What sources give: frames with their true times; and the queue that hands them on."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:  # numpy would make vmoe-run deaf to signals for so long
    from vmoe import clips

T = TypeVar("T")
POLL_S = 0.1  # how soon a waiting stage sees that the pipeline has been stopped


@dataclass(frozen=True)
class Frame:
    """One frame of a source.

    Attributes:
        pixels: uint8 [H, W, 3], RGB.
        t_s: its timestamp on the source's own clock, in seconds; rises within an epoch.
        sequence: its number since the source was opened, dropped frames counted.
        epoch: changes at every reconnect and every loop: a window never holds frames of two.
        arrived_s: when it was there, on `time.monotonic`'s clock, in seconds.
        decode_ms: time that decoding took, without waiting for the frame.
    """

    pixels: clips.Frame
    t_s: float
    sequence: int
    epoch: int
    arrived_s: float
    decode_ms: float


class Stop:
    """A flag that ends a pipeline. Plain, without a lock: a signal handler may raise it."""

    def __init__(self) -> None:
        """Start unset."""
        self._asked = False
        self._deadline_s = math.inf

    def ask(self) -> None:
        """Ask every stage to end after what it holds."""
        self._asked = True

    def ask_at(self, deadline_s: float) -> None:
        """Ask every stage to end at a time of `time.monotonic`, in seconds."""
        self._deadline_s = deadline_s

    def asked(self) -> bool:
        """Return whether the pipeline is to end."""
        return self._asked or time.monotonic() >= self._deadline_s


class Handover(Generic[T]):
    """A bounded queue between two threads, with an end and an error that arrive in order.

    Where `newest_wins` (live sources), `put` never blocks: the oldest is dropped, and told to
    `on_drop`. Else `put` waits until there is room, and nothing is dropped.
    """

    def __init__(
        self,
        limit: int,
        *,
        newest_wins: bool,
        precious: Callable[[T], bool] = lambda item: False,
        on_drop: Callable[[T], None] = lambda item: None,
    ) -> None:
        """Take how many items it may hold, and which of them are dropped last."""
        self._limit = limit
        self._precious, self._on_drop = precious, on_drop
        self._newest_wins = newest_wins
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._abandoned = False
        self._error: BaseException | None = None

    def put(self, item: T) -> bool:
        """Add an item; return False where nobody will take it any more."""
        with self._changed:
            while len(self._items) >= self._limit and not self._abandoned:
                if self._newest_wins:
                    self._drop()
                else:
                    self._changed.wait()
            if self._abandoned:
                return False
            self._items.append(item)
            self._changed.notify_all()
            return True

    def _drop(self) -> None:
        """Drop the oldest item that is not precious, or else the oldest."""
        plain = (i for i, item in enumerate(self._items) if not self._precious(item))
        index = next(plain, 0)
        item = self._items[index]
        del self._items[index]
        self._on_drop(item)

    def end(self, error: BaseException | None = None) -> None:
        """Say that nothing more comes; an error is raised to the taker, after the last item."""
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def abandon(self) -> None:
        """Say that nobody takes any more: whoever puts is let go."""
        with self._changed:
            self._abandoned = True
            self._items.clear()
            self._changed.notify_all()

    def __iter__(self) -> Iterator[T]:
        """Yield what is put, in order, until the end; then raise the error, if there was one."""
        while True:
            with self._changed:
                while not (self._items or self._ended or self._abandoned):
                    self._changed.wait(POLL_S)  # a signal must find the main thread awake
                if not self._items:
                    if self._error is not None:
                        raise self._error
                    return
                item = self._items.popleft()
                self._changed.notify_all()
            yield item
