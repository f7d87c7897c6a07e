"""Procedural pictures with natural statistics: leaves that fall on each other, and 1/f noise."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from vmoe.clips import Frame

Floats = NDArray[np.floating]


def picture(
    rng: np.random.Generator, size: int = 256, leaves: tuple[int, int] = (60, 200)
) -> Frame:
    """Draw one picture, uint8 [size, size, 3].

    Dead leaves: opaque shapes whose radii follow a power law, so that edges, occlusion and
    contrast occur on all scales as in photographs (Lee, Mumford, Huang, IJCV 2001); leaves and
    ground carry 1/f noise (Field, JOSA A 1987).

    Args:
        rng: draws everything.
        size: height and width, in pixels.
        leaves: how many there are, at least and below.
    """
    count = int(rng.integers(*leaves))
    radii = _radii(rng, count, size)
    sides = np.maximum(1, np.stack([radii, radii * rng.uniform(0.3, 1, count)], axis=1))
    centres = rng.integers(-size // 8, size + size // 8, (count, 2))
    chroma = rng.uniform(5, 45)  # photographs are mostly grey with a little colour
    greys = rng.uniform(10, 245, (count + 1, 1)) + rng.normal(0, chroma, (count + 1, 3))
    colours = np.clip(greys, 0, 255).tolist()
    kinds, angles = rng.integers(0, 3, count).tolist(), rng.uniform(0, 180, count).tolist()
    turns = np.sort(rng.uniform(0, 2 * np.pi, (count, 6)), axis=1)
    canvas = np.full((size, size, 3), colours[-1], np.uint8)
    for i, kind in enumerate(kinds):
        points = _outline(kind, centres[i], sides[i], angles[i], turns[i])
        cv2.fillPoly(canvas, [points], colours[i], cv2.LINE_AA)
    grain = one_over_f(rng, size) * rng.uniform(8, 45) + one_over_f(rng, size, 2) * 20
    return np.clip(canvas + grain[:, :, None], 0, 255).astype(np.uint8)


def _radii(rng: np.random.Generator, count: int, size: int) -> Floats:
    """Draw radii with density r^-3 between 2 % and 40 % of the size, the largest first."""
    low, high = 0.02 * size, 0.4 * size
    share = rng.uniform(0, 1, count)
    radii = (low**-2 - share * (low**-2 - high**-2)) ** -0.5
    return np.sort(radii)[::-1].astype(np.float32)


def _outline(
    kind: int, centre: NDArray[np.int64], sides: Floats, angle: float, turns: Floats
) -> NDArray[np.int32]:
    """Return the corners of a leaf, int32 [P, 2]: an ellipse, a rectangle or a polygon."""
    x, y = (int(v) for v in centre)
    if kind == 0:
        corners = cv2.ellipse2Poly((x, y), (int(sides[0]), int(sides[1])), int(angle), 0, 360, 12)
    elif kind == 1:
        corners = cv2.boxPoints(((x, y), (2 * float(sides[0]), 2 * float(sides[1])), angle))
    else:
        corners = centre + sides[0] * np.stack([np.cos(turns), np.sin(turns)], axis=1)
    return np.asarray(corners, np.int32)


def one_over_f(rng: np.random.Generator, size: int, octaves: int = 6) -> Floats:
    """Return smooth noise, float32 [size, size], about in [-1, 1]: octaves of falling weight."""
    total = np.zeros((size, size), np.float32)
    for octave in range(octaves):
        cells = min(size, 3 * 2**octave)
        grid = rng.standard_normal((cells, cells), dtype=np.float32)
        total += cv2.resize(grid, (size, size), interpolation=cv2.INTER_LINEAR) / 2**octave
    result: Floats = total / 2
    return result
