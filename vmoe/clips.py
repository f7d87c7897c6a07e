"""The clip spec: what a model wants to see, and how frames and times are made into it.

Training data, export checks and the live runtime all prepare frames and choose them by true
timestamps with the functions of this file, so that a model sees live what it saw in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vmoe.errors import SettingError
from vmoe.settings import Settings, opt

Frame = NDArray[np.uint8]  # [H, W, 3], RGB
Clips = NDArray[np.uint8]  # [N, T, H, W, 3], RGB
HALVED = 3  # a frame so many times too large is halved first
TIE_S = 1e-6  # timestamps are floats: two frames that are equally near, up to this


@dataclass(frozen=True)
class ClipSpec(Settings):
    """What one clip is: how many frames, how far apart in time, and their size.

    A frame is cropped at the centre to the shape of height x width, and scaled. Pixels stay uint8
    until the model, which scales them to [0, 1] and normalises.
    """

    frames: int = opt(8, "frames of a clip (T)", at_least=1)
    spacing_s: float = opt(0.1, "time between two frames of a clip, in seconds", above=0)
    height: int = opt(64, "height of a clip, in pixels", at_least=8)
    width: int = opt(64, "width of a clip, in pixels", at_least=8)
    resize: str = opt("cover", "how a frame is fitted: cover crops the centre; or stretch",
                      choices=("cover", "stretch"))  # fmt: skip
    interpolation: str = opt("area", "how a frame is scaled", choices=("area", "linear"))
    mean: tuple[float, ...] = opt((0.45, 0.45, 0.45), "mean per channel (RGB), pixels in [0, 1]")
    std: tuple[float, ...] = opt((0.225, 0.225, 0.225), "deviation per channel (RGB)", above=0)

    def __post_init__(self) -> None:
        """Check every value; mean and deviation are of three channels."""
        super().__post_init__()
        for name in ("mean", "std"):
            if len(getattr(self, name)) != 3:
                raise SettingError(f"{name} is {getattr(self, name)}; it must be 3 numbers (RGB).")

    @property
    def window_s(self) -> float:
        """Time from the first frame of a clip to its last, in seconds."""
        return (self.frames - 1) * self.spacing_s

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of one clip at an engine's door, [T, H, W, 3]."""
        return (self.frames, self.height, self.width, 3)


def prepare(frame: Frame, spec: ClipSpec) -> Frame:
    """Fit one frame of any size to the spec: crop the centre, then scale.

    `area` takes the mean of the pixels that fall into one. Of large frames it does so by halves
    first, which OpenCV has vector code for: 640x480 to 64x64 takes a sixth of the time, for pixels
    that differ by 0.7 of 255 in the mean.

    Args:
        frame: uint8 [H, W, 3]; float32 is not rounded.
        spec: the size wanted.

    Returns:
        of that type, [spec.height, spec.width, 3], contiguous; channels in the order given.
    """
    import cv2

    if frame.shape[:2] == (spec.height, spec.width):
        return np.ascontiguousarray(frame)
    if spec.resize == "cover":
        frame = _centre(frame, spec)
    height, width = frame.shape[:2]
    smaller = spec.height < height or spec.width < width
    area = spec.interpolation == "area" and smaller  # INTER_AREA enlarges by repeating pixels
    how = cv2.INTER_AREA if area else cv2.INTER_LINEAR
    while area and height >= HALVED * spec.height and width >= HALVED * spec.width:
        height, width = height // 2, width // 2
        even = frame[: 2 * height, : 2 * width]
        frame = np.asarray(cv2.resize(even, (width, height), interpolation=how), frame.dtype)
    fitted = cv2.resize(frame, (spec.width, spec.height), interpolation=how)
    return np.asarray(fitted, frame.dtype)


def _centre(frame: Frame, spec: ClipSpec) -> Frame:
    """Return the largest part of a frame, around its centre, that has the spec's shape."""
    height, width = frame.shape[:2]
    scale = max(spec.height / height, spec.width / width)
    rows = min(height, max(1, round(spec.height / scale)))
    columns = min(width, max(1, round(spec.width / scale)))
    top, left = (height - rows) // 2, (width - columns) // 2
    return frame[top : top + rows, left : left + columns]


def choose(
    times_s: Sequence[float] | NDArray[np.float64],
    end_s: float,
    spec: ClipSpec,
    *,
    nearest: bool = False,
) -> list[int] | None:
    """Choose the frames of the clip that ends at a time, by their true timestamps.

    The frame for each wanted time is the nearest one, of two the earlier; it must lie within half
    a spacing, and (so that no frame stands twice in a clip) each wanted time must find a frame of
    its own.

    Args:
        times_s: timestamps of the frames at hand, rising, in seconds.
        end_s: the time of the clip's last frame, in seconds.
        spec: frames and spacing.
        nearest: take the nearest frame however far away, also twice (`--sampling nearest`).

    Returns:
        T indices into `times_s`, or None where the times cannot be honoured.
    """
    if not len(times_s):
        return None
    index, honoured = _nearest(times_s, np.array([end_s]), spec)
    return [int(i) for i in index[0]] if nearest or honoured[0] else None


def every_clip(times_s: NDArray[np.float64], spec: ClipSpec) -> NDArray[np.int64]:
    """Return all clips that `choose` finds in a video, one for each frame that can be its last.

    Args:
        times_s: timestamps of the video's frames, rising, in seconds, [F].
        spec: frames and spacing.

    Returns:
        Indices into `times_s`, [N, T].
    """
    if not len(times_s):
        return np.empty((0, spec.frames), np.int64)
    index, honoured = _nearest(times_s, times_s, spec)
    return index[honoured]


def _nearest(
    times_s: Sequence[float] | NDArray[np.float64], ends_s: NDArray[np.float64], spec: ClipSpec
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the nearest frames of clips with these ends, [N, T], and which honour the times."""
    times = np.asarray(times_s, dtype=np.float64)
    wanted = ends_s[:, None] - spec.spacing_s * np.arange(spec.frames - 1, -1, -1)
    right = np.clip(np.searchsorted(times, wanted), 1, max(len(times) - 1, 1))
    left = right - 1
    right = np.minimum(right, len(times) - 1)
    index = np.where(wanted - times[left] <= times[right] - wanted + TIE_S, left, right)
    far = np.abs(times[index] - wanted) > spec.spacing_s / 2 + TIE_S
    taken_twice = np.diff(index, axis=1) < 1
    return index, np.asarray(~(far.any(axis=1) | taken_twice.any(axis=1)), np.bool_)


def too_slow(frame_s: float, spec: ClipSpec) -> bool:
    """Return whether frames this far apart, in seconds, cannot fill a clip of the spec."""
    return frame_s > spec.spacing_s * 1.02  # a camera's clock may differ by some per cent


def check_clips(clips: Clips, spec: ClipSpec) -> None:
    """Raise SettingError unless clips are uint8 [N, T, H, W, 3] as the spec has them."""
    if clips.dtype != np.uint8 or clips.ndim != 5 or clips.shape[1:] != spec.shape:
        t, h, w, c = spec.shape
        raise SettingError(
            f"clips are {clips.dtype} {list(clips.shape)}; this model takes uint8 "
            f"[N, {t}, {h}, {w}, {c}]: {t} frames of {h}x{w}, RGB. Use vmoe.clips.prepare."
        )
