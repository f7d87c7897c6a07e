"""What is drawn onto a frame: label, shares, expert, latency; readable at any size."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from vmoe import clips
from vmoe.runtime.results import Result

READABLE = 360  # frames lower than this are enlarged by a whole factor, for the text's sake
WHITE, GREY, ACCENT = (255, 255, 255), (190, 190, 190), (64, 200, 255)  # RGB
LONGEST = 14  # characters of a label beside its bar
FONT = cv2.FONT_HERSHEY_SIMPLEX


def enlarged(pixels: clips.Frame) -> clips.Frame:
    """Return a copy of a frame, uint8 [H, W, 3], enlarged where text would not be readable."""
    factor = -(-READABLE // pixels.shape[0]) if pixels.shape[0] < READABLE else 1
    if factor == 1:
        return pixels.copy()
    return _as_frame(cv2.resize(pixels, None, fx=factor, fy=factor))


def annotate(pixels: clips.Frame, result: Result | None, t_s: float) -> clips.Frame:
    """Draw the newest result onto a frame.

    Args:
        pixels: uint8 [H, W, 3], RGB.
        result: of the newest window; None before the first.
        t_s: the frame's time, in seconds.

    Returns:
        uint8 [H', W', 3], RGB: the frame itself, enlarged where it is small.
    """
    frame = enlarged(pixels)
    unit = max(frame.shape[0], READABLE) / 480  # everything scales with the frame's height
    if result is None:
        _panel(frame, unit, rows=1)
        _text(frame, unit, 0, f"waiting for the first window   {t_s:.2f} s", GREY)
        return frame
    _panel(frame, unit, rows=2 + len(result.top))
    _text(frame, unit, 0, f"{result.label} {result.score:.0%}", WHITE, large=True)
    weight = result.weights[result.expert]
    said = f"expert {result.expert} ({weight:.0%})   {result.age_ms:.0f} ms   {t_s:.2f} s"
    _text(frame, unit, 1, said, GREY)
    for row, (label, share) in enumerate(result.top):
        _bar(frame, unit, 2 + row, label, share)
    return frame


def _row_y(unit: float, row: int) -> int:
    """Return the base line of a row, in pixels; the first row is higher than the others."""
    return round(unit * (34 + 24 * row))


def _panel(frame: clips.Frame, unit: float, rows: int) -> None:
    """Darken the corner that text stands on."""
    height, width = _row_y(unit, rows - 1) + round(12 * unit), round(340 * unit)
    corner = frame[:height, :width]
    np.copyto(corner, (corner * np.float32(0.35)).astype(np.uint8))


def _text(
    frame: clips.Frame, unit: float, row: int, text: str, colour: Any, *, large: bool = False
) -> None:
    place = (round(10 * unit), _row_y(unit, row))
    size, weight = (0.8, 2) if large else (0.48, 1)
    thick = max(1, round(weight * unit))
    cv2.putText(frame, text, place, FONT, size * unit, colour, thick, cv2.LINE_AA)


def _bar(frame: clips.Frame, unit: float, row: int, label: str, share: float) -> None:
    """Draw one label's share as a bar, with its name and number."""
    shown = label if len(label) <= LONGEST else label[: LONGEST - 1] + "."
    _text(frame, unit, row, shown, WHITE)
    base = _row_y(unit, row)
    left, right = round(130 * unit), round(280 * unit)
    top, bottom = base - round(11 * unit), base + round(1 * unit)
    cv2.rectangle(frame, (left, top), (right, bottom), (90, 90, 90), -1)
    filled = left + round((right - left) * share)
    cv2.rectangle(frame, (left, top), (filled, bottom), ACCENT, -1)
    place = (right + round(6 * unit), base)
    cv2.putText(frame, f"{share:.0%}", place, FONT, 0.48 * unit, WHITE, 1, cv2.LINE_AA)


def _as_frame(array: Any) -> clips.Frame:
    frame: clips.Frame = array
    return frame
