"""How a training clip varies: crop, flip and jitter, the same in all of its frames; uint8 stays.

crop     a box between 3/4 and all of the frame's height and width, at any place. Frames are
         prepared 8/7 as large for it, so that most boxes are scaled down, as all frames were.
flip     left and right change places in half of the clips.
jitter   brightness, contrast and saturation each by up to a fifth.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import replace

import cv2
import numpy as np

from vmoe.clips import ClipSpec, Frame
from vmoe.data import AUGMENTATIONS, DataSettings
from vmoe.errors import SettingError

log = logging.getLogger("vmoe")

LARGER = 8 / 7  # frames that are cropped, in height and width
SMALLEST = 0.75  # box, as a share of the frame's height and width
JITTER = 0.2
GREY = np.array([0.299, 0.587, 0.114])  # luma of RGB (ITU-R BT.601)
SIDED = re.compile(
    r"(?i:(?<![a-z])(left|right)(wards?)?(?![a-z]))|(Left|Right)(?![a-z])|(?i:clockwise)"
)


def kinds(settings: DataSettings, split: str, labels: Sequence[str]) -> tuple[str, ...]:
    """Return which augmentations a split of video files gets: none but in `train`.

    Raises:
        SettingError: a flip that would make a label wrong.
    """
    if split != "train" or settings.augment == ("none",):
        return ()
    sided = [label for label in labels if SIDED.search(label)]
    if settings.augment == ("auto",):
        if sided:
            log.info("training clips are not flipped: it would make class %r wrong", sided[0])
        return tuple(kind for kind in AUGMENTATIONS if kind != "flip" or not sided)
    if "flip" in settings.augment and sided:
        rest = [kind for kind in settings.augment if kind != "flip"]
        raise SettingError(
            f"--augment flip would make clips of class {sided[0]!r} wrong: it swaps left and "
            f"right. Give --augment {','.join(rest) or 'none'}."
        )
    return tuple(kind for kind in AUGMENTATIONS if kind in settings.augment)


def prepared(spec: ClipSpec, chosen: Sequence[str]) -> ClipSpec:
    """Return the spec by which frames are prepared: larger where they are cropped."""
    if "crop" not in chosen:
        return spec
    return replace(spec, height=round(spec.height * LARGER), width=round(spec.width * LARGER))


def augment(clip: Frame, chosen: Sequence[str], spec: ClipSpec, rng: np.random.Generator) -> Frame:
    """Vary one clip.

    Args:
        clip: uint8 [T, H', W', 3], as `prepared` has it.
        chosen: some of AUGMENTATIONS.
        spec: the clip wanted.
        rng: draws how.

    Returns:
        uint8 [T, H, W, 3].
    """
    if "crop" in chosen:
        clip = _crop(clip, spec, rng)
    if "flip" in chosen and rng.uniform() < 0.5:
        clip = clip[:, :, ::-1]
    if "jitter" in chosen:
        clip = _jitter(clip, rng)
    return np.ascontiguousarray(clip)


def _crop(clip: Frame, spec: ClipSpec, rng: np.random.Generator) -> Frame:
    share = rng.uniform(SMALLEST, 1)
    height, width = (round(share * side) for side in clip.shape[1:3])
    top = int(rng.integers(clip.shape[1] - height + 1))
    left = int(rng.integers(clip.shape[2] - width + 1))
    box = clip[:, top : top + height, left : left + width]
    smaller = height > spec.height or width > spec.width
    how = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
    return np.stack([cv2.resize(f, (spec.width, spec.height), interpolation=how) for f in box])


def _jitter(clip: Frame, rng: np.random.Generator) -> Frame:
    """Change the colours of a clip by one affine map: saturation, then contrast, then brightness.

    x -> b (c (s x + (1 - s) grey(x) - 128) + 128), each of b, c, s in [0.8, 1.2]
    """
    brightness, contrast, saturation = rng.uniform(1 - JITTER, 1 + JITTER, 3)
    mix = saturation * np.eye(3) + (1 - saturation) * np.tile(GREY, (3, 1))
    offset = np.full((3, 1), brightness * 128 * (1 - contrast))
    change = np.hstack([brightness * contrast * mix, offset])
    frames, height, width, _ = clip.shape
    tall = np.ascontiguousarray(clip).reshape(frames * height, width, 3)
    changed: Frame = cv2.transform(tall, change).reshape(clip.shape)
    return changed
