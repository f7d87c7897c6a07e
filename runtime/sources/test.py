"""A pattern that needs no file and no camera: a camera moves over a picture, and how is known.

The moves are those of the built-in task, a few seconds each, in an order that the seed gives;
`move_at` tells which one a time falls into. It is live: it keeps to the clock as a camera does.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from vmoe import clips, opencv
from vmoe.runtime.frames import Frame, Stop

from . import ENDED, OPENING, RUNNING, SourceSettings

FPS = 30.0
MOVE_S = 3.0  # how long one move takes
SIZE = (360, 480)  # height and width of a frame
BEHIND_S = 1.0  # a pattern that is so late skips frames, as a camera would


def claims(name: str) -> bool:
    """Return whether a name is `test`."""
    return name == "test"


def open(name: str, settings: SourceSettings) -> TestSource:
    """Return the pattern; it cannot fail."""
    return TestSource(settings.seed)


def move_at(t_s: float, seed: int = 0) -> str:
    """Return the name of the move that goes on at a time of the pattern, in seconds."""
    from vmoe.data.camera_motion import LABELS

    number = int(t_s // MOVE_S)
    round_, place = divmod(number, len(LABELS))
    return LABELS[int(np.random.default_rng((seed, round_)).permutation(len(LABELS))[place])]


def render(number: int, seed: int = 0) -> clips.Frame:
    """Return frame `number` of the pattern, uint8 [H, W, 3]; it shows time number / FPS."""
    from vmoe.data.camera_motion import look

    per_move = round(MOVE_S * FPS)
    move, place = divmod(number, per_move)
    image, poses = _scene(move, seed)
    return look(image, poses[place], SIZE)


@lru_cache(maxsize=2)
def _scene(move: int, seed: int) -> tuple[clips.Frame, NDArray[np.floating]]:
    """Return the picture of one move, and where the camera looks, [frames, 4]."""
    from vmoe.data._textures import picture
    from vmoe.data.camera_motion import camera_path

    rng = np.random.default_rng((seed, move))
    label = move_at((move + 0.5) * MOVE_S, seed)
    times = np.arange(round(MOVE_S * FPS)) / FPS
    return picture(rng, 512), camera_path(label, times, rng)


class TestSource:
    """See `Source`."""

    __test__ = False  # pytest looks for classes of this name
    live = True

    def __init__(self, seed: int) -> None:
        """Take what draws the pictures and the order of moves."""
        self.name = "test"
        self.fps = FPS
        self.state = OPENING
        self._seed = seed

    def frames(self, stop: Stop) -> Generator[Frame, None, None]:
        """Yield the pattern in its own time, for ever; timestamps are exactly number / FPS."""
        opencv.quiet()
        began, number = time.monotonic(), 0
        while not stop.asked():
            due = began + number / FPS
            now = time.monotonic()
            if now < due:
                time.sleep(min(due - now, 0.05))
                continue
            if now - due > BEHIND_S:
                number += round((now - due) * FPS)
                continue
            self.state = RUNNING
            pixels = render(number, self._seed)
            ms = (time.monotonic() - now) * 1000
            yield Frame(pixels, number / FPS, number, 0, time.monotonic(), ms)
            number += 1
        self.state = ENDED
