"""Where frames come from, one file each: `claims(name)` and `open(name, settings)`.

`open` only looks whether the source can be there (and raises SourceError if not); the thread
that iterates `frames` opens the capture, reads it and releases it. OpenCV crashes otherwise.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

from vmoe import registry
from vmoe.errors import SourceError
from vmoe.runtime import addresses
from vmoe.runtime.frames import Frame, Stop

NAMES = (
    "Name a video file, a folder of pictures, a camera's number, an address (rtsp, http, udp), - "
    "or test."
)
SOURCES = "vmoe.runtime.sources"

# States of a source. A live one is stalled when it is silent for half of its read timeout.
OPENING, RUNNING, STALLED, REOPENING, ENDED = "opening", "running", "stalled", "reopening", "ended"
STATES = (OPENING, RUNNING, STALLED, REOPENING, ENDED)
PATHS = ("images", "file")  # sources that take names of any kind, asked last


@dataclass(frozen=True)
class SourceSettings:
    """How sources are read.

    Attributes:
        loop: start a file again when it ends.
        reconnect: tries to reopen a live source that was lost.
        patient: try that often to open it for the first time, too; else a source that is not
            there is an error at once.
        read_timeout_s: a live source that is silent for so long is lost.
        rtsp_transport: tcp or udp; of all RTSP streams of this process.
        fps: frames per second of pictures and of raw frames, which carry no times.
        raw: (width, height) of raw RGB frames on stdin; None is a container such as MPEG-TS.
        replay: of a file: its own times are the clock, also for when frames arrived.
        seed: of the test pattern.
    """

    loop: bool = False
    reconnect: int = 60
    patient: bool = False
    read_timeout_s: float = 3.0
    rtsp_transport: str = "tcp"
    fps: float = 10.0
    raw: tuple[int, int] | None = None
    replay: bool = False
    seed: int = 0


class Source(Protocol):
    """One source of frames.

    Attributes:
        name: as the user named it, without any password.
        live: frames come whether or not somebody takes them, so the newest wins. Known once
            frames flow.
        fps: frames per second that it claims; 0 where it does not say. Known once frames flow.
        state: one of STATES.
    """

    name: str
    live: bool
    fps: float

    @property
    def state(self) -> str: ...

    def frames(self, stop: Stop) -> Generator[Frame, None, None]:
        """Open, yield frames until the end or until `stop`, release.

        Each frame's pixels are an array of its own, which nobody writes to any more: they are read
        later, in other threads.

        Raises:
            SourceError: it cannot be opened, breaks in the middle, or was lost for good.
        """
        ...


def open(name: str, settings: SourceSettings | None = None) -> Source:
    """Return the source that a name stands for.

    Args:
        name: a video file, a folder or glob of pictures; a camera's number, or its device as
            /dev/video0; an address (rtsp, http, udp); `-`, stdin; or `test`.
        settings: how it is read.

    Raises:
        SourceError: no source of this kind, or it is not there.
    """
    settings = settings or SourceSettings()
    if not name.strip():
        raise SourceError(f"--source is empty. {NAMES}")
    modules = {kind: registry.load(SOURCES, kind, "source") for kind in registry.names(SOURCES)}
    for module in _paths_last(modules):
        if module.claims(name):
            source: Source = module.open(name, settings)
            return source
    raise SourceError(f"source {addresses.shown(name)!r}: cannot read this kind. {NAMES}")


def _paths_last(modules: dict[str, ModuleType]) -> list[ModuleType]:
    """Return the modules with pictures and files last: a folder may be called `test`."""
    others = sorted(set(modules) - set(PATHS))
    return [modules[kind] for kind in (*others, *PATHS)]
