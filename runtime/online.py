"""The online form: an expert takes the frames that it has not seen, and its own states.

    expert_i:  clip uint8 [N, S, H, W, 3], state0 .. -> logits [N, K], next_state0 ..

From states of zero, a whole clip gives that clip's logits; after that, every next frame gives the
logits of the clip that ends with it, for a fraction of the work. Both forms are one function
(vmoe.models.experts.tsm_online says why): what is kept is a cache, whatever the stream does.

Two neighbouring windows must hold the same frames for that: they are taken one by one as the
stream goes on, not backwards from each window's end as for other models.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vmoe.bundle import Bundle, Part, Port
from vmoe.clips import ClipSpec
from vmoe.errors import EngineMismatchError

from .frames import Frame
from .windows import EARLY_S, EXACT, Kept, Window, Windows

if TYPE_CHECKING:
    from .engine import Engine, Prediction

States = dict[str, NDArray[Any]]  # by the names of a part's inputs
FORM, ONLINE = "form", "online"  # in the manifest; the form of other bundles is the window
TINY = 1e-6  # of a place
LATEST = 3 / 4  # of a spacing: a later frame stands for the next time that is wanted
FOLLOWS = 1 / 16  # share of a frame's lateness by which the times that are wanted move


def is_online(bundle: Bundle) -> bool:
    """Return whether a bundle's experts follow a stream frame by frame."""
    return bundle.extra.get(FORM) == ONLINE


def after(name: str) -> str:
    """Return the output of a part that is a state's next value."""
    return f"next_{name}"


def state_ports(part: Part) -> list[Port]:
    """Return the inputs of a part that are states: those that it also gives out."""
    given = {port.name for port in part.outputs}
    return [port for port in part.inputs if after(port.name) in given]


def first(part: Part, n: int) -> States:
    """Return the states of n streams before their first frame: zeros; none of a plain part.

    Raises:
        EngineMismatchError: a state whose size the manifest does not say.
    """
    states = {}
    for port in state_ports(part):
        sizes = [size for size in port.shape[1:] if size is not None]
        if len(sizes) != len(port.shape) - 1:
            raise EngineMismatchError(
                f"{part.file}: state {port.name} has shape {list(port.shape)} in the manifest; "
                "only the first size may be free. Export it again."
            )
        states[port.name] = np.zeros((n, *sizes), port.dtype)
    return states


class Follower:
    """Answers the windows of one stream; the routed expert runs the frames that are new to it.

    The router sees every window whole. An expert that was away for less than a clip catches up on
    what it missed; one that was away longer, or that is new, runs the whole clip in one call. So
    the answer is the window's own, up to rounding, after a flip, a break, or windows that were
    dropped on the way.

    Attributes:
        frames: how many frames experts ran.
        warm_ups: how often an expert ran a whole clip.
    """

    def __init__(self, engine: Engine) -> None:
        """Take a loaded bundle of the online form."""
        self._engine = engine
        self._held: dict[int, tuple[int, States]] = {}  # by expert: its last slot, its states
        self.frames = self.warm_ups = 0

    def infer(self, window: Window) -> Prediction:
        """Answer the next window that `OnlineWindows` made of the stream."""
        from .engine import Prediction

        clip = window.clip[np.newaxis]
        scores = self._engine.scores(clip)
        route = scores.argmax(axis=1)
        expert, slot, frames = int(route[0]), window.slot or 0, clip.shape[1]
        last, states = self._held.get(expert, (slot - frames, None))
        new = slot - last
        if not 0 < new < frames:
            new, states = frames, None
        logits, states = self._engine.follow(expert, clip[:, -new:], states)
        self._held[expert] = slot, states
        self.frames += new
        self.warm_ups += new == frames
        return Prediction(logits, scores, route)


class OnlineWindows(Windows):
    """Windows that share their frames: one is taken for every spacing, as the stream goes on.

    A frame is taken when it is nearer to the time that is wanted than the next one will be, as far
    as the source's habit tells: none waits for another. What is wanted follows the source by a
    share of each frame's lateness, so that one a little slower than the spacing is not lost.
    A wanted time without a frame is a hole, and no window holds one.
    """

    def __init__(
        self, spec: ClipSpec, source: str, *, hop_s: float | None = None, sampling: str = EXACT
    ) -> None:
        """Take the arguments of `Windows`; without a hop, every frame that is taken ends one."""
        super().__init__(
            spec, source, hop_s=spec.spacing_s if hop_s is None else hop_s, sampling=sampling
        )
        self._wanted_s = 0.0  # the time of the frame that comes next
        self._place = 0  # its number since the epoch's first, holes counted
        self._due = 0.0  # the place at which the next window ends
        self._slot = -1  # number of the last frame taken, from the stream's first, none left out

    def push(self, frame: Frame) -> Window | None:
        """Take a frame; return the window that ends with it, if one is due.

        Raises:
            SourceError: the source's frames are too far apart for the spec.
        """
        if not self._account(frame):
            return None
        early_s = statistics.median(self._came_apart_s) / 2 if self._came_apart_s else 0.0
        if frame.t_s < self._wanted_s - early_s - EARLY_S:
            return None
        place = self._take(Kept(frame))
        hops = self.hop_s / self._spec.spacing_s
        if place < self._due - TINY:
            return None
        self._due += hops * (1 + (place - self._due + TINY) // hops)
        if not self._is_whole():
            self._miss_window(frame)
            return None
        return self._made(list(self._ring), frame, self._slot)

    def _begin(self, t_s: float) -> None:
        super()._begin(t_s)
        self._wanted_s, self._place, self._due = t_s, 0, self._spec.frames - 1

    def _is_whole(self) -> bool:
        """Return whether the ring is a clip: each frame within half a spacing of its own time."""
        if len(self._ring) < self._spec.frames:
            return False
        off_s = [kept.t_s - i * self._spec.spacing_s for i, kept in enumerate(self._ring)]
        return self._nearest or max(off_s) - min(off_s) <= self._spec.spacing_s + EARLY_S

    def _take(self, frame: Kept) -> int:
        """Put a frame into the ring, and what stands for frames that lack; return its place."""
        spacing_s = self._spec.spacing_s
        late_s = frame.t_s - self._wanted_s
        if late_s > LATEST * spacing_s:
            self._miss(frame, max(1, round(late_s / spacing_s)))
            late_s = frame.t_s - self._wanted_s
        self._append(frame)
        self._wanted_s += spacing_s + FOLLOWS * late_s
        self._place += 1
        return self._place - 1

    def _miss(self, frame: Kept, count: int) -> None:
        """Pass over times that have no frame: nothing before them is in a window with this one.

        Where the nearest frame will do, it stands for them.
        """
        if not self._nearest:
            self._ring.clear()
        for _ in range(count):
            if self._nearest:
                last = self._ring[-1]
                before = self._wanted_s - last.t_s <= frame.t_s - self._wanted_s + EARLY_S
                self._append(last if before else frame)
            self._wanted_s += self._spec.spacing_s
            self._place += 1

    def _append(self, frame: Kept) -> None:
        self._keep(frame)
        self._slot += 1
        if len(self._ring) > self._spec.frames:
            self._ring.popleft()
