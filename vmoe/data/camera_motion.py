"""The built-in task, camera-motion: how does the camera move? Rendered, so the label is exact.

A camera looks through a window at a picture and moves: ten classes. Pictures are procedural, or
the photographs of a folder (`camera-motion:/path`). Objects that move by themselves, changing
light, blur, noise and compression distract. Directions are the camera's own: in `pan-left` the
camera turns left, and what it sees moves to the right.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from vmoe import opencv
from vmoe.clips import ClipSpec, Frame
from vmoe.data import DataSettings
from vmoe.data._splits import split_of
from vmoe.data._textures import picture
from vmoe.errors import SettingError

LABELS = (
    "static", "pan-left", "pan-right", "tilt-up", "tilt-down",
    "zoom-in", "zoom-out", "roll-left", "roll-right", "shake",
)  # fmt: skip
REVERSED = {
    "pan-left": "pan-right", "tilt-up": "tilt-down", "zoom-in": "zoom-out",
    "roll-left": "roll-right",
}  # fmt: skip
REVERSED |= {b: a for a, b in REVERSED.items()}  # what a label becomes when time runs backwards

PAN_PER_S = (0.12, 0.9)  # speed of a pan or tilt, in shorter sides of the frame per second
ZOOM_PER_S = (0.12, 0.9)  # speed of a zoom: the logarithm of its factor per second
ROLL_PER_S = (0.14, 1.1)  # speed of a roll, in radians per second
SHAKE = (0.015, 0.06)  # amplitude of a shake, in shorter sides
DEFAULT_CLIPS = 2000
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
PICTURE = 512  # shorter side of a photograph, at most: pixels beyond would be averaged away
SPLIT_KEYS = {"train": 0, "val": 1, "test": 2}

Floats = NDArray[np.floating]
# One row for each frame: right and down in shorter sides, log of the zoom, roll in radians.
Poses = NDArray[np.floating]


def camera_path(label: str, times_s: Floats, rng: np.random.Generator) -> Poses:
    """Return where the camera looks at each time.

    Args:
        label: one of LABELS.
        times_s: times of the frames, in seconds.
        rng: draws speed, and the small drift that every hand and motor has.

    Returns:
        [T, 4]: right and down in shorter sides of the frame, log zoom, roll in radians
        (clockwise, of the camera).
    """
    t = times_s - times_s[0]
    poses = np.zeros((len(t), 4))
    axis, sign = _AXES.get(label, (0, 0))
    for other in range(4):
        if other != axis or not sign:
            poses[:, other] += rng.normal(0, 0.006) * t
    if label == "shake":
        poses += _shake(t, rng)
    elif sign:
        slowest, fastest = _SPEEDS[axis]
        speed = slowest * (fastest / slowest) ** rng.uniform()
        ease = rng.uniform(-0.25, 0.25)  # it speeds up or slows down a little
        span = max(float(t[-1]), 1e-9)
        poses[:, axis] += sign * speed * (t + ease * t * (t - span) / span)
    return poses


_AXES = {
    "pan-left": (0, -1), "pan-right": (0, 1), "tilt-up": (1, -1), "tilt-down": (1, 1),
    "zoom-in": (2, 1), "zoom-out": (2, -1), "roll-left": (3, -1), "roll-right": (3, 1),
}  # fmt: skip
_SPEEDS = (PAN_PER_S, PAN_PER_S, ZOOM_PER_S, ROLL_PER_S)


def _shake(t: Floats, rng: np.random.Generator) -> Poses:
    """Return a shake, [T, 4]: a few oscillations of 1.5 to 4.5 Hz on every axis, without drift."""
    amplitude = SHAKE[0] * (SHAKE[1] / SHAKE[0]) ** rng.uniform()
    total = np.zeros((len(t), 4))
    for _ in range(3):
        hertz = rng.uniform(1.5, 4.5, 4)
        phase = rng.uniform(0, 2 * np.pi, 4)
        total += np.sin(2 * np.pi * hertz * t[:, None] + phase)
    poses: Poses = amplitude * total * np.array([1.0, 1.0, 0.4, 0.7]) / np.sqrt(1.5)
    return poses


def look(image: Frame, pose: Floats, size: tuple[int, int], view: float = 0.5) -> Frame:
    """Return what the camera sees, uint8 [height, width, 3].

    Args:
        image: the picture, uint8 [H, W, 3]; mirrored beyond its borders.
        pose: one row of Poses.
        size: height and width of the frame.
        view: shorter side of the view, as a share of the picture's shorter side.
    """
    right, down, zoom, roll = (float(v) for v in pose)
    height, width = size
    unit = view * min(image.shape[:2])  # picture pixels in one shorter side
    scale = unit / min(size) * np.exp(-zoom)  # picture pixels in one frame pixel
    cos, sin = scale * np.cos(roll), scale * np.sin(roll)
    x = image.shape[1] / 2 + right * unit - cos * width / 2 + sin * height / 2
    y = image.shape[0] / 2 + down * unit - sin * width / 2 - cos * height / 2
    where = np.array([[cos, -sin, x], [sin, cos, y]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    border = cv2.BORDER_REFLECT_101
    seen: Frame = cv2.warpAffine(image, where, (width, height), flags=flags, borderMode=border)
    return seen


@dataclass(frozen=True)
class CameraMotion:
    """Clips of camera-motion: clip i has label i mod 10 and a picture of its own.

    Pictures and moves are drawn from (seed, split, epoch, i), so that no picture of one split
    stands in another, and the same index always gives the same clip.
    """

    spec: ClipSpec
    split: str
    settings: DataSettings
    photographs: tuple[Path, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """The ten moves."""
        return LABELS

    def __len__(self) -> int:
        """How many clips."""
        return self.settings.clips or DEFAULT_CLIPS

    def __getitem__(self, index: int) -> tuple[Frame, int]:
        """Render clip uint8 [T, H, W, 3]; return it and its label."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        key = (self.settings.seed, SPLIT_KEYS[self.split], self.settings.epoch, index)
        rng = np.random.default_rng(key)
        label = index % len(LABELS)
        return render_clip(LABELS[label], self._picture(rng), self.spec, rng), label

    def at_epoch(self, epoch: int) -> CameraMotion:
        """Return the same pictures, of which other clips are rendered."""
        return replace(self, settings=replace(self.settings, epoch=epoch))

    def _picture(self, rng: np.random.Generator) -> Frame:
        if not self.photographs:
            return picture(rng)
        return read_picture(self.photographs[rng.integers(len(self.photographs))])


def render_clip(label: str, image: Frame, spec: ClipSpec, rng: np.random.Generator) -> Frame:
    """Render one clip with distractors, uint8 [T, H, W, 3].

    It is rendered at twice the size and averaged down, as a camera's picture is.
    """
    times = spec.spacing_s * np.arange(spec.frames)
    poses = camera_path(label, times, rng)
    start = np.array([*rng.uniform(-0.4, 0.4, 2), rng.normal(0, 0.15), rng.normal(0, 0.3)])
    view = rng.uniform(0.35, 0.6)
    size = (2 * spec.height, 2 * spec.width)
    frames = [look(image, _after(start, pose), size, view) for pose in poses]
    if rng.uniform() < 0.5:
        _objects(frames, times, rng)
    blur = float(rng.uniform(0.3, 1.6)) if rng.uniform() < 0.4 else 0.0
    if blur:
        frames = [cv2.GaussianBlur(frame, (0, 0), blur) for frame in frames]
    small = (spec.width, spec.height)
    frames = [cv2.resize(frame, small, interpolation=cv2.INTER_AREA) for frame in frames]
    return _sensor(np.stack(frames), rng)


def _after(start: Floats, move: Floats) -> Floats:
    """Return the pose after a move in the camera's own axes, from where it started."""
    _, _, zoom, roll = start
    right, down = move[:2] * np.exp(-zoom)
    turned = (
        np.cos(roll) * right - np.sin(roll) * down,
        np.sin(roll) * right + np.cos(roll) * down,
    )
    pose: Floats = start + np.array([*turned, move[2], move[3]])
    return pose


def _objects(frames: list[Frame], times: Floats, rng: np.random.Generator) -> None:
    """Draw one to three textured things that move by themselves, each up to a third as wide."""
    height, width = frames[0].shape[:2]
    for _ in range(int(rng.integers(1, 4))):
        texture = picture(rng, 64, leaves=(5, 30))
        radius = rng.uniform(0.06, 0.17) * min(height, width)
        axes = (int(radius), max(1, int(radius * rng.uniform(0.5, 1.6))))
        texture = cv2.resize(texture, (2 * axes[0] + 1, 2 * axes[1] + 1))
        mask = np.zeros(texture.shape[:2], np.uint8)
        cv2.ellipse(mask, axes, axes, 0, 0, 360, 255, -1)
        start, speed = rng.uniform(0, 1, 2), rng.normal(0, 0.35, 2)
        for frame, t in zip(frames, times, strict=True):
            x, y = (start + speed * t) * (width, height)
            _paste(frame, texture, mask, int(x) - axes[0], int(y) - axes[1])


def _paste(frame: Frame, texture: Frame, mask: NDArray[np.uint8], left: int, top: int) -> None:
    height, width = mask.shape
    x0, y0 = max(left, 0), max(top, 0)
    x1, y1 = min(left + width, frame.shape[1]), min(top + height, frame.shape[0])
    if x0 >= x1 or y0 >= y1:
        return
    inside = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
    np.copyto(frame[y0:y1, x0:x1], texture[inside], where=mask[inside][:, :, None] > 0)


def _sensor(clip: Frame, rng: np.random.Generator) -> Frame:
    """Change the light, add noise, compress: what lies between a scene and a decoded frame."""
    count = len(clip)
    gain = rng.uniform(0.6, 1.3) * np.linspace(1, 1 + rng.normal(0, 0.12), count)
    gain = gain * (1 + rng.normal(0, 0.02, count) * (rng.uniform() < 0.3))
    offset = rng.uniform(-25, 25)
    light = clip * gain[:, None, None, None].astype(np.float32) + np.float32(offset)
    noise = rng.uniform(0, 6) * (rng.uniform() < 0.6)
    light += np.float32(noise) * rng.standard_normal(clip.shape, dtype=np.float32)
    out = np.clip(light, 0, 255).astype(np.uint8)
    if rng.uniform() < 0.5:
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(35, 95))]
        coded = (cv2.imencode(".jpg", frame, quality)[1] for frame in out)
        out = np.stack([_decoded(data) for data in coded])
    return np.ascontiguousarray(out)


def _decoded(data: NDArray[np.uint8]) -> Frame:
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8)


def read_picture(path: Path) -> Frame:
    """Read a photograph, uint8 [H, W, 3] RGB, with a shorter side of at most 512.

    Raises:
        SettingError: it cannot be read, or its name is no UTF-8.
    """
    if not opencv.can_open(path):
        raise SettingError(f"the picture's name {str(path)!a} is no UTF-8: rename it.")
    try:
        found = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)
    except (OSError, cv2.error) as e:  # cv2.error: an empty file, or one of too many pixels
        why = f": {e.strerror}" if isinstance(e, OSError) else ""
        raise SettingError(f"cannot read the picture {path}{why}.") from e
    if found is None:
        raise SettingError(f"cannot read the picture {path}.")
    return as_picture(found)


def as_picture(bgr: Frame) -> Frame:
    """Return a decoded picture or video frame as RGB, with a shorter side of at most 512."""
    scale = PICTURE / min(bgr.shape[:2])
    if scale < 1:
        bgr = cv2.resize(bgr, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    image: Frame = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
    return image


def open_clips(
    where: Path | None, split: str, spec: ClipSpec, settings: DataSettings
) -> CameraMotion:
    """Open camera-motion over procedural pictures, or over the pictures of a folder.

    A picture's split is drawn from its name, so that splits never share one.

    Raises:
        SettingError: the folder holds no picture for this split, or an augmentation is wanted.
    """
    if settings.augment not in (("auto",), ("none",)):
        raise SettingError(
            f"camera-motion takes no --augment {','.join(settings.augment)}: a flip would make "
            "pan-left pan-right, and its clips are rendered anew in every epoch, with light and "
            "noise of their own. Leave it out."
        )
    if where is None:
        return CameraMotion(spec, split, settings)
    if not where.is_dir():
        raise SettingError(f"camera-motion:{where}: {where} is no folder; name one of pictures.")
    pictures = sorted(p for p in where.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    mine = tuple(path for path in pictures if split_of(path.name) == split)
    if not mine:
        raise SettingError(
            f"{where} has {len(pictures)} pictures, none of which falls into the {split} split."
        )
    return CameraMotion(spec, split, settings, mine)
