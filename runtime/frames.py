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
BLOCK, LATEST, OLDEST = "block", "latest", "oldest"  # what a full queue does
UNLIMITED = 1 << 30
POLL_S = 0.1  # how soon a waiting stage sees that the pipeline has been stopped


@dataclass(frozen=True)
class Frame:
    """One frame of a source.

    Attributes:
        pixels: uint8 [H, W, 3], RGB; stay as they are, since windows to come may take them.
        t_s: its timestamp on the source's own clock, in seconds; rises within an epoch, but for
            a source that gives a frame twice.
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

    def __init__(self, above: Stop | None = None) -> None:
        """Start unset; what `above` is asked is asked here, too."""
        self._asked = False
        self._deadline_s = math.inf
        self._above = above

    def ask(self) -> None:
        """Ask every stage to end after what it holds."""
        self._asked = True

    def ask_at(self, deadline_s: float) -> None:
        """Ask every stage to end at a time of `time.monotonic`, in seconds."""
        self._deadline_s = deadline_s

    def asked(self) -> bool:
        """Return whether the pipeline is to end."""
        above = self._above is not None and self._above.asked()
        return self._asked or above or time.monotonic() >= self._deadline_s


class Handover(Generic[T]):
    """A bounded queue between two threads, with an end and an error that arrive in order.

    What happens where it is full is asked at every `put`: BLOCK waits until there is room, and
    nothing is dropped; LATEST drops the oldest, and OLDEST what is put. Neither of those ever
    waits, and what they drop is told to `on_drop`.

    Several may share one `changed`, so that one thread can wait for any of them.
    """

    def __init__(
        self,
        limit: int,
        *,
        policy: Callable[[], str],
        precious: Callable[[T], bool] = lambda item: False,
        on_drop: Callable[[T], None] = lambda item: None,
        changed: threading.Condition | None = None,
    ) -> None:
        """Take how many items it may hold, and which of them are dropped last."""
        self._limit = limit
        self._precious, self._on_drop = precious, on_drop
        self._policy = policy
        self._items: deque[T] = deque()
        self._changed = changed or threading.Condition()
        self._ended = False
        self._abandoned = False
        self._error: BaseException | None = None

    def put(self, item: T) -> bool:
        """Add an item; return False where nobody will take it any more."""
        with self._changed:
            while len(self._items) >= self._limit and not self._abandoned:
                policy = self._policy()
                if policy == BLOCK:
                    self._changed.wait(POLL_S)
                    continue
                if policy == OLDEST and not (self._precious(item) and self._drop_plain()):
                    self._on_drop(item)
                    return True
                if policy == LATEST and not self._drop_plain():
                    self._on_drop(self._items.popleft())
            if self._abandoned:
                return False
            self._items.append(item)
            self._changed.notify_all()
            return True

    def _drop_plain(self) -> bool:
        """Drop the oldest item that is not precious, if there is one."""
        index = next((i for i, item in enumerate(self._items) if not self._precious(item)), None)
        if index is None:
            return False
        item = self._items[index]
        del self._items[index]
        self._on_drop(item)
        return True

    def end(self, error: BaseException | None = None) -> None:
        """Say that nothing more comes; an error is raised to the taker, after the last item."""
        with self._changed:
            if not self._ended:
                self._ended, self._error = True, error
            self._changed.notify_all()

    def abandon(self) -> None:
        """Say that nobody takes any more: whoever puts is let go."""
        with self._changed:
            self._abandoned = True
            self._items.clear()
            self._changed.notify_all()

    def room(self) -> int:
        """Return how many items `put` would take without waiting."""
        if self._abandoned or self._policy() != BLOCK:
            return UNLIMITED
        return self._limit - len(self._items)

    def first(self) -> T | None:
        """Return what `take` would, and leave it there."""
        return self._items[0] if self._items else None

    def take(self) -> T | None:
        """Return the next item at once; None where there is none now."""
        with self._changed:
            if not self._items:
                return None
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    @property
    def done(self) -> bool:
        """Whether everything was taken and nothing more comes."""
        return self._abandoned or (self._ended and not self._items)

    @property
    def error(self) -> BaseException | None:
        """What ended it, other than its end."""
        return self._error

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
