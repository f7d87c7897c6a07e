"""Where results go, one file each: `open(...)` gives a context manager that takes steps."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from vmoe.runtime.frames import Frame
from vmoe.runtime.results import Result
from vmoe.runtime.smoothing import Event

if TYPE_CHECKING:
    from vmoe.runtime.pipeline import Pipeline


@dataclass(frozen=True)
class Step:
    """One frame of the stream, in order, and the result that came with it.

    Attributes:
        frame: the frame; None where no sink wants frames, and at the end of a stream.
        result: of the window that ends with this frame; None where none does.
        fps: what the source says of its rate; 0 where it says nothing.
        stream: the number of the stream, from 0.
        events: what began, goes on or ended with the result.
    """

    frame: Frame | None
    result: Result | None
    fps: float
    stream: int = 0
    events: tuple[Event, ...] = ()


class Sink(Protocol):
    """Takes steps. Leaving it finishes what it writes, or removes it after an error of its own.

    After an OutputError it may be given a later step: it goes on with that one, or begins anew.

    Attributes:
        name: as it is called in a message.
        wants_frames: whether steps must carry frames.
    """

    name: str
    wants_frames: bool

    def take(self, step: Step) -> None:
        """Take the next step.

        Raises:
            OutputError: it cannot be written.
        """
        ...

    def __enter__(self) -> Sink: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


@runtime_checkable
class Watching(Protocol):
    """A sink that shows more than its steps: the run's counts, and the states of its sources."""

    def watches(self, pipeline: Pipeline) -> None:
        """Take the run, before its first step."""
        ...
