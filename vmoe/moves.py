"""A video whose camera moves are known: what `vmoe demo` watches and is judged by.

A camera pans, tilts, zooms, rolls and shakes over photographs, or over the frames of any video.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np

from vmoe import opencv, video
from vmoe.clips import Frame
from vmoe.data._textures import picture
from vmoe.data.camera_motion import (
    IMAGE_SUFFIXES,
    LABELS,
    PICTURE,
    as_picture,
    camera_path,
    look,
    read_picture,
)
from vmoe.errors import MissingDependencyError, SettingError

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
SEED = 9  # of drawn pictures; those of camera-motion have seeds of four numbers
# Of a user's own file. A move lasts 40 frames; 180 of a phone's video are a quarter of a GiB.
MAX_FRAMES = 600
MAX_BYTES = 256 << 20


@dataclass(frozen=True)
class Segment:
    """One move.

    Attributes:
        label: of camera_motion.LABELS.
        start_s: time of its first frame, in seconds.
        end_s: time of its last frame, in seconds.
        picture: what was looked at.
    """

    label: str
    start_s: float
    end_s: float
    picture: str


@dataclass(frozen=True)
class Scene:
    """What a camera looks at: one photograph, or the frames of a video, forth and back."""

    name: str
    frames: tuple[Frame, ...]


def photographs() -> list[Scene]:
    """Return the photographs that scikit-image ships.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import skimage
    except ImportError as e:
        raise MissingDependencyError(
            "the demo's photographs ship with scikit-image: pip install 'vmoe[demo]', "
            "or give a picture or video of your own with --source."
        ) from e
    folder = Path(skimage.__file__).parent / "data"
    return [Scene(name, (read_picture(folder / name),)) for name in PHOTOGRAPHS]


def procedural(count: int = len(PHOTOGRAPHS)) -> list[Scene]:
    """Return drawn pictures, for where there are no photographs.

    They are of the kind that the model was trained on, though it saw none of these: what is
    measured over them is no harder than its own test.
    """
    drawn = (picture(np.random.default_rng((SEED, n)), PICTURE) for n in range(count))
    return [Scene(f"procedural-{n}", (image,)) for n, image in enumerate(drawn)]


def scenes_of(source: Path) -> list[Scene]:
    """Return what a user's own file shows: a picture, a folder of pictures, or a video.

    Of a long video the first frames are taken, of a full folder the first pictures.

    Raises:
        SettingError: it cannot be read.
    """
    if not opencv.can_open(source):
        raise SettingError(f"--source {str(source)!a} is no UTF-8: rename it.")
    if source.is_dir():
        found = sorted(p for p in source.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise SettingError(f"{source} holds no picture ({', '.join(sorted(IMAGE_SUFFIXES))}).")
        pictures = _first(read_picture(path) for path in found)
        return [Scene(p.name, (picture,)) for p, picture in zip(found, pictures, strict=False)]
    if not source.is_file():
        raise SettingError(f"--source {source} does not exist.")
    if source.suffix.lower() in IMAGE_SUFFIXES:
        return [Scene(source.name, (read_picture(source),))]
    frames = tuple(_first(_frames(source)))
    if not frames:
        raise SettingError(f"--source {source} cannot be read as a picture or a video.")
    return [Scene(source.name, frames)]


def _first(frames: Iterable[Frame]) -> Iterator[Frame]:
    """Yield the first frames, at least one, for as long as they are few and small."""
    held = 0
    for frame in islice(frames, MAX_FRAMES):
        held += frame.nbytes
        if held > MAX_BYTES and held > frame.nbytes:
            return
        yield frame


def _frames(path: Path) -> Iterator[Frame]:
    """Yield a video's frames, scaled as pictures are."""
    cv2 = opencv.quiet()
    # FFmpeg takes `12:30.avi` for an address, but not where a folder stands before it.
    capture = cv2.VideoCapture(str(path.resolve()), cv2.CAP_FFMPEG)
    try:
        while (read := capture.read())[0]:
            yield as_picture(read[1])
    finally:
        capture.release()


def render(
    scenes: Sequence[Scene],
    path: Path,
    *,
    rounds: int = 4,
    move_s: float = 2.0,
    fps: float = 20.0,
    size: tuple[int, int] = (360, 480),
    seed: int = 0,
) -> list[Segment]:
    """Write a video in which every move is made once in each round, in a drawn order.

    Args:
        scenes: what is looked at, in turn; a video's frames go on from move to move, and back
            from its end: a jump from last to first would be a motion that no label names.
        path: an .avi, Motion JPEG; written whole.
        rounds: how often each of the ten moves is made.
        move_s: length of a move, in seconds.
        fps: frames per second.
        size: height and width of a frame.
        seed: draws order, speeds and shakes.

    Returns:
        The moves, in order.

    Raises:
        SettingError: its name is no UTF-8.
        OutputError: it cannot be written whole; nothing of it is left.
    """
    rng = np.random.default_rng(seed)
    order = [LABELS[i] for _ in range(rounds) for i in rng.permutation(len(LABELS))]
    shown = {s.name: cycle((*s.frames, *s.frames[-2:0:-1])) for s in scenes}
    segments: list[Segment] = []
    count = round(move_s * fps)
    with video.writing(path, fps, size) as append:
        for number, (label, scene) in enumerate(zip(order, cycle(scenes), strict=False)):
            for frame in _move(label, shown[scene.name], np.arange(count) / fps, size, rng):
                append(frame)
            start = number * count / fps
            segments.append(Segment(label, start, start + (count - 1) / fps, scene.name))
    return segments


def _move(
    label: str,
    pictures: Iterator[Frame],
    times_s: np.ndarray,
    size: tuple[int, int],
    rng: np.random.Generator,
) -> Iterator[Frame]:
    """Yield the frames of one move, which passes the picture's centre at half of its time."""
    poses = camera_path(label, times_s, rng)
    poses = poses - poses[len(poses) // 2]
    for pose in poses:
        yield look(next(pictures), pose, size)


def truth(segments: Sequence[Segment], first_s: float, last_s: float) -> Segment | None:
    """Return the move that a window lies in, or None where it spans two.

    Args:
        segments: the moves of the video.
        first_s: time of the window's first frame, in seconds.
        last_s: time of its last frame.
    """
    slack = 1e-3  # a container stores times in milliseconds
    for segment in segments:
        if first_s >= segment.start_s - slack and last_s <= segment.end_s + slack:
            return segment
    return None
