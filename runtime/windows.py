"""Frames with true timestamps into windows: the clips of a stream.

A window ends at a frame; its other frames are chosen backwards from there by the clip spec's
spacing and the true timestamps. Windows are due every hop, counted from the first that could be
filled. A frame is prepared when a window first takes it: of a camera at 30 frames a second whose
frames fit into RAW_BYTES (1280x720 for 8 frames 100 ms apart) two of three never are. Until then it
is kept as it came; beyond that memory the oldest are prepared, most of them for no window.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections import deque
from dataclasses import dataclass

import numpy as np

from vmoe import clips
from vmoe.clips import ClipSpec
from vmoe.errors import SettingError, SourceError

from .frames import Frame

log = logging.getLogger("vmoe")

EXACT, NEAREST = "exact", "nearest"
LOOKED_AT = 8  # distances between frames after which a source counts as too slow
EARLY_S = 1e-6  # timestamps are floats: a frame this much before its time is on time
# A break is a hole that no clip can honour (over two spacings some wanted time always lies more
# than half a spacing from every frame), and that is no habit of the source: a slow one is regular.
BREAK_SPACINGS = 2
BREAK_USUAL = 3
PROMPT_S = 30.0  # the promptest frame of one to two such times is what others are late against
RAW_BYTES = 64 << 20  # of frames that no window has taken yet; beyond, the oldest are prepared
TELL_S = 60.0  # between two lines that say that a source has become slow
REMEMBERED = 16  # newest distances between frames, whose median is the usual one


@dataclass(frozen=True)
class Window:
    """The frames of one clip of a stream.

    Attributes:
        number: of the window, from 0.
        clip: uint8 [T, H, W, 3], prepared as the spec has it.
        epoch: of its frames; changes with the source's own, and at every break in its times.
        t_first_s: timestamp of its first frame, on the source's clock, in seconds.
        t_s: timestamp of its last frame.
        frame_first: sequence of its first frame.
        frame_last: sequence of its last frame.
        arrived_s: when its last frame was there, on `time.monotonic`'s clock.
        gap: whether the stream was broken between the window before and this one.
        dropped: frames of the source that were lost since the window before.
        stage_ms: `decode_ms` of its last frame; `prepare_ms` of all frames that were prepared since
            the window before: those that it was the first to take, and those for which there was no
            more room as they came.
        slot: its last frame's number among the frames that were taken, where windows share them
            (runtime/online.py); else None.
        took_s: what making it took when its last frame was there, in seconds.
    """

    number: int
    clip: clips.Frame
    epoch: int
    t_first_s: float
    t_s: float
    frame_first: int
    frame_last: int
    arrived_s: float
    gap: bool
    dropped: int
    stage_ms: dict[str, float]
    slot: int | None = None
    took_s: float = 0.0


class Kept:
    """A frame in the ring: as it came, until a window takes it; then prepared.

    Attributes:
        t_s: its timestamp, in seconds.
        sequence: its number.
        raw_bytes: what it holds in memory as it came; 0 once it is prepared.
    """

    __slots__ = ("_pixels", "raw_bytes", "sequence", "t_s")

    def __init__(self, frame: Frame) -> None:
        """Take the frame; its pixels must stay as they are."""
        self.t_s, self.sequence = frame.t_s, frame.sequence
        self._pixels = frame.pixels
        self.raw_bytes = frame.pixels.nbytes

    def prepared(self, spec: ClipSpec) -> clips.Frame:
        """Return it as the spec has it; the work is done once."""
        if self.raw_bytes:
            self._pixels, self.raw_bytes = clips.prepare(self._pixels, spec), 0
        return self._pixels


def default_hop_s(spec: ClipSpec) -> float:
    """Return the hop where none is given: half of a window's frames, so that two share the rest."""
    return max(1, spec.frames // 2) * spec.spacing_s


class Windows:
    """Takes the frames of one source, in order, and gives its windows.

    Attributes:
        frames: how many were taken.
        made: how many windows were.
        incomplete: windows that were due, but whose times the frames could not honour.
        dropped: frames that the source or its queue lost.
        duplicated: frames with the timestamp of the one before; they are in no window.
        late: frames that came more than half a spacing later, by their timestamps, than the
            promptest of about the last minute (two clocks drift apart).
        frame_s: median distance between the first frames, in seconds; 0 before it is known.
        epoch: of the newest frame: the source's own, and one more for every break in its times.
    """

    def __init__(
        self, spec: ClipSpec, source: str, *, hop_s: float | None = None, sampling: str = EXACT
    ) -> None:
        """Take how windows are made.

        Args:
            spec: of the clips.
            source: its name, for the error.
            hop_s: time between two windows, in seconds; None is half of a window's frames.
            sampling: `exact` refuses a source whose frames are too far apart; `nearest` takes
                the nearest frame, also twice.
        """
        if sampling not in (EXACT, NEAREST):
            raise SettingError(f"--sampling is {sampling!r}; it is {EXACT} or {NEAREST}.")
        self.hop_s = default_hop_s(spec) if hop_s is None else hop_s
        if not self.hop_s > 0:
            raise SettingError(f"--hop is {hop_s}; it must be above 0 seconds.")
        self.frames = self.made = self.incomplete = self.dropped = 0
        self.duplicated = self.late = 0
        self.frame_s = 0.0
        self._spec, self._source, self._nearest = spec, source, sampling == NEAREST
        self._ring: deque[Kept] = deque()
        self.epoch = 0
        self._breaks = 0
        self._last: Frame | None = None
        # Seconds between two frames that came, and between two that the source made, where some
        # between them were lost; a break is in the first alone.
        self._came_apart_s: deque[float] = deque(maxlen=REMEMBERED)
        self._made_apart_s: deque[float] = deque(maxlen=REMEMBERED)
        self._prepare_s = 0.0  # what preparing took since the window before
        self._told_s = -math.inf  # when it was last said that it has become slow
        self._due_s = 0.0
        self._next = 0  # the sequence that comes next where nothing is lost
        self._lost = 0
        self._broken = False
        # The least that a frame came after its timestamp, in this half minute and the one before.
        self._prompt_s = self._prompt_before_s = 0.0
        self._half_s = 0.0  # when this half minute began

    def push(self, frame: Frame) -> Window | None:
        """Take a frame; return the window that ends with it, if one is due.

        Raises:
            SourceError: the source's frames are too far apart for the spec.
        """
        if not self._account(frame):
            return None
        self._forget(max(frame.t_s, self._due_s - EARLY_S))
        self._keep(Kept(frame))
        if frame.t_s < self._due_s - EARLY_S:
            return None
        late = frame.t_s - self._due_s
        self._due_s += self.hop_s * (1 + int((late + EARLY_S) // self.hop_s))
        return self._window(frame)

    def end(self) -> None:
        """Say that no frame follows, so that a short source is judged too.

        Raises:
            SourceError: the source's frames were too far apart for the spec.
        """
        self.release()
        self._refuse_slow()

    def release(self) -> None:
        """Let go of all frames; counts stay."""
        self._ring.clear()
        self._last = None

    def _account(self, frame: Frame) -> bool:
        """Count the frame and what was lost before it; begin anew after a break.

        Returns:
            Whether it may be in a window; a duplicate may not.
        """
        lost = max(0, frame.sequence - self._next)
        self.frames += 1
        self.dropped += lost
        self._lost += lost
        self._next = frame.sequence + 1
        last = self._last
        if last is not None and frame.epoch == last.epoch and frame.t_s <= last.t_s:
            self.duplicated += 1
            return False
        self._last = frame
        if last is None or frame.epoch != last.epoch or self._is_break(last, frame):
            self._broken = last is not None
            self.epoch = frame.epoch + self._breaks
            self._begin(frame.t_s)
            self._prompt_s = self._prompt_before_s = frame.arrived_s - frame.t_s
            self._half_s = frame.arrived_s
        else:
            steps = max(1, frame.sequence - last.sequence)
            self._made_apart_s.append((frame.t_s - last.t_s) / steps)
            if len(self._made_apart_s) >= LOOKED_AT:
                self._refuse_slow()
        self._count_late(frame)
        return True

    def _count_late(self, frame: Frame) -> None:
        after_s = frame.arrived_s - frame.t_s
        if frame.arrived_s - self._half_s > PROMPT_S:
            self._half_s = frame.arrived_s
            self._prompt_before_s, self._prompt_s = self._prompt_s, after_s
        self._prompt_s = min(self._prompt_s, after_s)
        prompt_s = min(self._prompt_s, self._prompt_before_s)
        self.late += after_s - prompt_s > self._spec.spacing_s / 2

    def _begin(self, t_s: float) -> None:
        """Forget what was, at the first frame of an epoch."""
        self._ring.clear()
        self._due_s = t_s + self._spec.window_s

    def _is_break(self, last: Frame, frame: Frame) -> bool:
        """Return whether two frames of an epoch are too far apart for this source; count it."""
        apart_s = frame.t_s - last.t_s
        broken = apart_s > BREAK_SPACINGS * self._spec.spacing_s + EARLY_S
        if broken:
            usual_s = statistics.median(self._came_apart_s) if self._came_apart_s else apart_s
            broken = apart_s > BREAK_USUAL * usual_s + EARLY_S
        self._came_apart_s.append(apart_s)
        self._breaks += broken
        return broken

    def _refuse_slow(self) -> None:
        if self.frame_s or not self._made_apart_s:
            return
        self.frame_s = statistics.median(self._made_apart_s)
        if clips.too_slow(self.frame_s, self._spec) and not self._nearest:
            raise SourceError(
                f"{self._source} has a frame every {self.frame_s * 1000:.0f} ms; this model wants "
                f"one every {self._spec.spacing_s * 1000:.0f} ms. Take a faster source, or say "
                "--sampling nearest (frames are repeated, and labels are less sure)."
            )

    def _keep(self, kept: Kept) -> None:
        """Put a frame into the ring; where too many wait there as they came, prepare the oldest."""
        self._ring.append(kept)
        raw_bytes = sum(one.raw_bytes for one in self._ring)
        for one in self._ring:
            if raw_bytes <= RAW_BYTES:
                return
            raw_bytes -= one.raw_bytes
            self._prepared(one)

    def _prepared(self, one: Kept) -> clips.Frame:
        """Return a frame as the spec has it; note how long that took."""
        began = time.monotonic()
        pixels = one.prepared(self._spec)
        self._prepare_s += time.monotonic() - began
        return pixels

    def _forget(self, end_s: float) -> None:
        """Drop frames that no window which ends then or later can want.

        One is kept before the oldest that is wanted.
        """
        oldest_s = end_s - self._spec.window_s - self._spec.spacing_s / 2
        while len(self._ring) > 1 and self._ring[1].t_s < oldest_s:
            self._ring.popleft()

    def _window(self, frame: Frame) -> Window | None:
        times = [kept.t_s for kept in self._ring]
        chosen = clips.choose(times, frame.t_s, self._spec, nearest=self._nearest)
        if chosen is None:
            self._miss_window(frame)
            return None
        return self._made([self._ring[i] for i in chosen], frame)

    def _miss_window(self, frame: Frame) -> None:
        """Count a window that was due; where the source has become slow, say so once in a while."""
        self.incomplete += 1
        known = len(self._made_apart_s) == REMEMBERED
        apart_s = statistics.median(self._made_apart_s) if known else 0.0
        if not clips.too_slow(apart_s, self._spec) or frame.arrived_s < self._told_s + TELL_S:
            return
        self._told_s = frame.arrived_s
        log.warning(
            "%s has become slow: a frame every %.0f ms, where this model wants one every %.0f ms. "
            "Its windows are not labelled until it is faster; --sampling nearest repeats frames.",
            self._source, apart_s * 1000, self._spec.spacing_s * 1000,
        )  # fmt: skip

    def _made(self, kept: list[Kept], frame: Frame, slot: int | None = None) -> Window:
        began = time.monotonic()
        clip = np.stack([self._prepared(one) for one in kept])
        took_s = time.monotonic() - began
        prepare_ms, self._prepare_s = self._prepare_s * 1000, 0.0
        window = Window(
            number=self.made,
            clip=clip,
            epoch=self.epoch,
            t_first_s=kept[0].t_s,
            t_s=frame.t_s,
            frame_first=kept[0].sequence,
            frame_last=frame.sequence,
            arrived_s=frame.arrived_s,
            gap=self._broken,
            dropped=self._lost,
            stage_ms={"decode_ms": frame.decode_ms, "prepare_ms": prepare_ms},
            slot=slot,
            took_s=took_s,
        )
        self.made, self._lost, self._broken = self.made + 1, 0, False
        return window
