"""Natural corruptions of clips: what a camera, a lens and a wire do to them without an enemy.

Each is one severity, in the range of the third of five of Hendrycks and Dietterich (ICLR 2019), for
pictures of 64x64; `frame-drop` is of video: frames are lost, and the one before stands still.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from vmoe.clips import Clips, Frame

SIGMA_BLUR = 1.0  # pixels
SIGMA_NOISE = 20.0  # of 255
QUALITY = 15  # of JPEG
DIMMED = 0.5
DROPPED = 0.25  # of the frames but the first


def _each(change: Callable[[Frame], Frame]) -> Callable[[Clips], Clips]:
    def of(clips: Clips) -> Clips:
        return np.stack([np.stack([change(frame) for frame in clip]) for clip in clips])

    return of


def _coded(frame: Frame) -> Frame:
    data = cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])[1]
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8)


def _noise(clips: Clips) -> Clips:
    noise = np.random.default_rng(0).normal(0, SIGMA_NOISE, clips.shape)
    return np.clip(clips + noise, 0, 255).astype(np.uint8)


def _dropped(clips: Clips) -> Clips:
    rng, out = np.random.default_rng(0), clips.copy()
    for clip in out:
        for t in range(1, len(clip)):
            if rng.uniform() < DROPPED:
                clip[t] = clip[t - 1]
    return out


CORRUPTIONS: dict[str, Callable[[Clips], Clips]] = {
    "blur": _each(lambda frame: np.asarray(cv2.GaussianBlur(frame, (0, 0), SIGMA_BLUR), np.uint8)),
    "noise": _noise,
    "compression": _each(_coded),
    "brightness": lambda clips: (clips * DIMMED).astype(np.uint8),
    "frame-drop": _dropped,
}
