"""Procedural pictures with natural statistics: leaves that fall on each other, and 1/f noise."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from vmoe.clips import Frame

Floats = NDArray[np.float32]


def picture(rng: np.random.Generator, size: int = 256) -> Frame:
    """Draw one picture, uint8 [size, size, 3].

    Dead leaves: opaque shapes whose radii follow a power law, so that edges, occlusion and
    contrast occur on all scales as in photographs (Lee, Mumford, Huang, IJCV 2001); each leaf
    and the ground carry 1/f noise (Field, JOSA A 1987).
    """
    chroma = rng.uniform(5, 45)  # photographs are mostly grey with a little colour
    canvas = np.full((size, size, 3), _colour(rng, chroma), np.uint8)
    for radius in _radii(rng, size):
        _leaf(canvas, rng, radius, _colour(rng, chroma))
    grain = one_over_f(rng, size) * rng.uniform(8, 45) + one_over_f(rng, size, 2) * 20
    return np.clip(canvas + grain[:, :, None], 0, 255).astype(np.uint8)


def _colour(rng: np.random.Generator, chroma: float) -> tuple[float, ...]:
    grey = rng.uniform(10, 245)
    return tuple(float(c) for c in np.clip(grey + rng.normal(0, chroma, 3), 0, 255))


def _radii(rng: np.random.Generator, size: int) -> Floats:
    """Draw radii with density r^-3 between 2 % and 40 % of the size, the largest first."""
    low, high = 0.02 * size, 0.4 * size
    count = int(rng.integers(60, 300))
    share = rng.uniform(0, 1, count)
    radii = (low**-2 - share * (low**-2 - high**-2)) ** -0.5
    return np.sort(radii)[::-1].astype(np.float32)


def _leaf(
    canvas: Frame, rng: np.random.Generator, radius: float, colour: tuple[float, ...]
) -> None:
    size = canvas.shape[0]
    x, y = (int(v) for v in rng.integers(-size // 8, size + size // 8, 2))
    kind = rng.integers(3)
    axes = (max(1, int(radius)), max(1, int(radius * rng.uniform(0.3, 1))))
    angle = float(rng.uniform(0, 180))
    if kind == 0:
        cv2.ellipse(canvas, (x, y), axes, angle, 0, 360, colour, -1, cv2.LINE_AA)
    elif kind == 1:
        corners = cv2.boxPoints(((x, y), (2.0 * axes[0], 2.0 * axes[1]), angle))
        cv2.fillConvexPoly(canvas, corners.astype(np.int32), colour, cv2.LINE_AA)
    else:
        turns = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 8))))
        points = np.stack([x + axes[0] * np.cos(turns), y + axes[0] * np.sin(turns)], axis=1)
        cv2.fillPoly(canvas, [points.astype(np.int32)], colour, cv2.LINE_AA)


def one_over_f(rng: np.random.Generator, size: int, octaves: int = 6) -> Floats:
    """Return smooth noise, float32 [size, size], about in [-1, 1]: octaves of falling weight."""
    total = np.zeros((size, size), np.float32)
    for octave in range(octaves):
        cells = min(size, 3 * 2**octave)
        grid = rng.standard_normal((cells, cells), dtype=np.float32)
        total += cv2.resize(grid, (size, size), interpolation=cv2.INTER_LINEAR) / 2**octave
    return total / 2
