"""What the guard looks at, window by window: plain numpy; higher is stranger.

route_entropy   H(w) / ln M, of the router's weights w
route_margin    1 - (w_1 - w_2), the best two weights
label_entropy   H(s) / ln K, of the shares s
label_change    1/2 sum |s - s'|, against the window before where the two overlap
route_change    1/2 sum |w - w'|, likewise
route_drift     1/2 sum |h - h0|, routes of the newest windows against clean ones
filter_change   1/2 sum |s - s_f|, against the same expert's shares of a filtered clip
label_age       capture to label, in lengths of the window, beyond one: a label that is late
"""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from vmoe.clips import Clips

Floats = NDArray[np.float64]

NAMES = (
    "route_entropy", "route_margin", "label_entropy", "label_change", "route_change",
    "route_drift", "filter_change",
)  # fmt: skip
AGE = "label_age"  # how old a label is depends on the machine, not on clean video
NEWEST, ENOUGH = 32, 16  # windows whose routes are compared with clean ones; at least so many
FILTERS = ("off", "median", "jpeg", "bilateral")
JPEG_QUALITY = 60
# Of the bilateral filter: pixels across, and its deviations in colour (of 255, the sum of three
# channels) and in place (pixels). It keeps edges, and takes most of what is below a few levels.
BILATERAL = (5, 30.0, 3.0)
TINY = 1e-30


def entropy(shares: Floats) -> float:
    """Return the entropy of shares that sum to 1, over its maximum; 0 of a single one."""
    if len(shares) < 2:
        return 0.0
    return float(-(shares * np.log(np.maximum(shares, TINY))).sum() / np.log(len(shares)))


def closeness(shares: Floats) -> float:
    """Return 1 - the lead of the largest share over the second; 0 of a single one."""
    if len(shares) < 2:
        return 0.0
    second, first = np.sort(shares)[-2:]
    return float(1 - (first - second))


def change(one: Floats, other: Floats) -> float:
    """Return the total variation between two sets of shares, in [0, 1]."""
    return float(np.abs(one - other).sum() / 2)


def median(clips: Clips) -> Clips:
    """Return clips, uint8 [N, T, H, W, 3], each frame the median of itself and its neighbours."""
    padded = np.concatenate([clips[:, :1], clips, clips[:, -1:]], axis=1)
    before, here, after = padded[:, :-2], padded[:, 1:-1], padded[:, 2:]
    low, high = np.minimum(before, here), np.maximum(before, here)
    filtered: Clips = np.maximum(low, np.minimum(high, after))
    return filtered


def jpeg(clips: Clips) -> Clips:
    """Return clips, uint8 [N, T, H, W, 3], each frame through JPEG."""
    import cv2

    quality = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    filtered = np.empty_like(clips)
    for place in np.ndindex(clips.shape[:2]):
        coded = cv2.imencode(".jpg", clips[place], quality)[1]
        filtered[place] = np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR), np.uint8)
    return filtered


def bilateral(clips: Clips) -> Clips:
    """Return clips, uint8 [N, T, H, W, 3], each frame smoothed but for its edges."""
    import cv2

    filtered = np.empty_like(clips)
    for place in np.ndindex(clips.shape[:2]):
        filtered[place] = np.asarray(cv2.bilateralFilter(clips[place], *BILATERAL), np.uint8)
    return filtered


def filtered(clips: Clips, name: str) -> Clips:
    """Return clips through one of FILTERS other than off."""
    return {"median": median, "jpeg": jpeg, "bilateral": bilateral}[name](clips)


class Terms:
    """The terms of one stream's windows, in order."""

    def __init__(self, experts: int, clean: Floats | None) -> None:
        """Take how many experts there are, and the shares of routes on clean video, [M]."""
        self._clean = clean
        self._experts = experts
        self._routes: deque[int] = deque(maxlen=NEWEST)
        self._last: tuple[Floats, Floats, int, float] | None = None

    def of(
        self, shares: Floats, weights: Floats, route: int, *, epoch: int, t_first_s: float,
        t_s: float, age_s: float, filtered: Floats | None = None,
    ) -> dict[str, float]:  # fmt: skip
        """Return the terms of the next window; `Guard.judge` says what it takes."""
        terms = {"label_entropy": entropy(shares)}
        if self._experts > 1:
            terms |= {"route_entropy": entropy(weights), "route_margin": closeness(weights)}
        if self._last is not None and self._last[2] == epoch and t_first_s <= self._last[3]:
            terms["label_change"] = change(shares, self._last[0])
            if self._experts > 1:
                terms["route_change"] = change(weights, self._last[1])
        if filtered is not None:
            terms["filter_change"] = change(shares, filtered)
        self._routes.append(route)
        if self._clean is not None and len(self._routes) >= ENOUGH and self._experts > 1:
            terms["route_drift"] = change(histogram(self._routes, self._experts), self._clean)
        window_s = max(t_s - t_first_s, 1e-3)
        if age_s > window_s:
            terms[AGE] = age_s / window_s - 1
        self._last = (shares, weights, epoch, t_s)
        return terms


def histogram(routes: deque[int] | list[int], experts: int) -> Floats:
    """Return the share of each expert among routes, [M]."""
    return np.bincount(np.asarray(routes, np.int64), minlength=experts) / max(1, len(routes))
