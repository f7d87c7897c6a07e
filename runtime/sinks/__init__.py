"""Where results go, one file each: `open(...)` gives a context manager that takes steps."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from vmoe.runtime.frames import Frame
from vmoe.runtime.results import Result


@dataclass(frozen=True)
class Step:
    """One frame of the stream, in order, and the result that came with it.

    Attributes:
        frame: the frame; None where no sink wants frames.
        result: of the window that ends with this frame; None where none does.
        fps: what the source says of its rate; 0 where it says nothing.
    """

    frame: Frame | None
    result: Result | None
    fps: float


class Sink(Protocol):
    """Takes steps. Leaving it finishes what it writes, or removes it after an error of its own.

    Attributes:
        wants_frames: whether steps must carry frames.
    """

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
