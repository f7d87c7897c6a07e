"""A video whose camera moves are known: what `vmoe demo` watches and is judged by.

A camera pans, tilts, zooms, rolls and shakes over photographs, or over the frames of any video.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np

from vmoe import opencv, output
from vmoe.clips import Frame
from vmoe.data.camera_motion import IMAGE_SUFFIXES, LABELS, camera_path, look, read_picture
from vmoe.errors import MissingDependencyError, OutputError, SettingError

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
MAX_FRAMES = 600  # of a user's video; enough for every move, and small in memory


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
    """What a camera looks at: one photograph, or the frames of a video one after another."""

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


def scenes_of(source: Path) -> list[Scene]:
    """Return what a user's own file shows: a picture, a folder of pictures, or a video.

    Raises:
        SettingError: it cannot be read.
    """
    if source.is_dir():
        found = sorted(p for p in source.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise SettingError(f"{source} holds no picture ({', '.join(sorted(IMAGE_SUFFIXES))}).")
        return [Scene(path.name, (read_picture(path),)) for path in found]
    if not source.is_file():
        raise SettingError(f"--source {source} does not exist.")
    if source.suffix.lower() in IMAGE_SUFFIXES:
        return [Scene(source.name, (read_picture(source),))]
    return [Scene(source.name, _video(source))]


def _video(path: Path) -> tuple[Frame, ...]:
    cv2 = opencv.quiet()
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
    frames: list[Frame] = []
    while len(frames) < MAX_FRAMES:
        ok, frame = capture.read()
        if not ok:
            break
        frames.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
    capture.release()
    if not frames:
        raise SettingError(f"--source {path} cannot be read as a picture or a video.")
    return tuple(frames)


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
        scenes: what is looked at, in turn; a video's frames go on from move to move.
        path: an .avi, Motion JPEG; written whole.
        rounds: how often each of the ten moves is made.
        move_s: length of a move, in seconds.
        fps: frames per second.
        size: height and width of a frame.
        seed: draws order, speeds and shakes.

    Returns:
        The moves, in order.

    Raises:
        OutputError: it cannot be written.
    """
    import cv2

    rng = np.random.default_rng(seed)
    order = [LABELS[i] for _ in range(rounds) for i in rng.permutation(len(LABELS))]
    shown = {scene.name: cycle(scene.frames) for scene in scenes}
    segments: list[Segment] = []
    with output.whole_file(path) as temporary:
        codec = cv2.VideoWriter.fourcc(*"MJPG")
        writer = cv2.VideoWriter(str(temporary), codec, fps, (size[1], size[0]))
        if not writer.isOpened():
            raise OutputError(f"cannot write {path}: OpenCV has no encoder for it.")
        count = round(move_s * fps)
        for number, (label, scene) in enumerate(zip(order, cycle(scenes), strict=False)):
            for frame in _move(label, shown[scene.name], np.arange(count) / fps, size, rng):
                writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
            start = number * count / fps
            segments.append(Segment(label, start, start + (count - 1) / fps, scene.name))
        writer.release()
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
