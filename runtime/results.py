"""What one window came to: label, expert, times; as a line of JSON."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .engine import Prediction
from .guard import Verdict
from .windows import Window

ABSTAINED = "(abstained)"  # the label where the guard lets none stand


@dataclass(frozen=True)
class Result:
    """The label of one window, and how it came about.

    Attributes:
        window: its number, from 0.
        stream: the number of its stream, from 0.
        source: the source's name.
        epoch: of its frames; changes at every reconnect, loop and break in the timestamps.
        t_first_s: timestamp of its first frame, on the source's own clock, in seconds.
        t_s: timestamp of its last frame.
        t_capture: when its last frame was there, in seconds since 1970.
        t_label: when its label was there, in seconds since 1970.
        age_ms: t_label - t_capture, in milliseconds.
        frame_first: sequence of its first frame.
        frame_last: sequence of its last frame.
        gap: whether the stream was broken between the window before and this one.
        dropped: frames of the source that were lost since the window before.
        label: the most likely label; ABSTAINED where the guard lets none stand.
        score: its share of the softmax over the logits, in [0, 1].
        top: the most likely labels with their shares, best first.
        expert: the expert that answered (the route).
        weights: softmax of the router's scores, one for each expert.
        route_margin: weight of the best expert less that of the second, in [0, 1].
        route_entropy: of the weights, in nats; 0 is sure, log M is no idea.
        stage_ms: `decode_ms` (of its last frame), `prepare_ms` (of all frames since the
            window before; some perhaps while it was not yet due), `wait_ms` (until the engine was
            free), `infer_ms` (of the batch that it was in).
        smooth_label: the label with the highest share, averaged over time.
        smooth_score: that share.
        event: the id of the event that goes on (runtime/smoothing.py); None where none does.
        guard: what the guard says of it; None where it is off.
    """

    window: int
    stream: int
    source: str
    epoch: int
    t_first_s: float
    t_s: float
    t_capture: float
    t_label: float
    age_ms: float
    frame_first: int
    frame_last: int
    gap: bool
    dropped: int
    label: str
    score: float
    top: tuple[tuple[str, float], ...]
    expert: int
    weights: tuple[float, ...]
    route_margin: float
    route_entropy: float
    stage_ms: dict[str, float]
    smooth_label: str = ""
    smooth_score: float = 0.0
    event: int | None = None
    guard: Verdict | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON can hold it; numbers are rounded to what they mean."""
        return {
            "window": self.window,
            "stream": self.stream,
            "source": self.source,
            "epoch": self.epoch,
            "t_first_s": round(self.t_first_s, 6),
            "t_s": round(self.t_s, 6),
            "t_capture": round(self.t_capture, 6),
            "t_label": round(self.t_label, 6),
            "age_ms": round(self.age_ms, 3),
            "frame_first": self.frame_first,
            "frame_last": self.frame_last,
            "gap": self.gap,
            "dropped": self.dropped,
            "label": self.label,
            "score": round(self.score, 6),
            "top": [{"label": label, "score": round(score, 6)} for label, score in self.top],
            "expert": self.expert,
            "weights": [round(weight, 6) for weight in self.weights],
            "route_margin": round(self.route_margin, 6),
            "route_entropy": round(self.route_entropy, 6),
            "smooth_label": self.smooth_label,
            "smooth_score": round(self.smooth_score, 6),
            "event": self.event,
            "guard": None if self.guard is None else self.guard.to_json(),
            "stage_ms": {stage: round(ms, 3) for stage, ms in self.stage_ms.items()},
        }


def make(
    window: Window,
    prediction: Prediction,
    labels: tuple[str, ...],
    source: str,
    *,
    top: int,
    stream: int = 0,
    began_s: float,
    ended_s: float,
    virtual: bool = False,
) -> Result:
    """Make the result of one window.

    Args:
        window: the window.
        prediction: of its clip alone (N = 1).
        labels: K names.
        source: the source's name.
        top: how many labels to list.
        stream: the number of its stream.
        began_s: when the engine began, on `time.monotonic`'s clock.
        ended_s: when the label was there.
        virtual: the source's own times are the clock (--replay): t_capture is t_s.
    """
    shares, weights = softmax(prediction.logits[0]), softmax(prediction.scores[0])
    best = listed(shares, labels, top)
    ordered = np.sort(weights)[::-1]
    to_wall_s = time.time() - time.monotonic()
    to_wall_s = window.t_s - window.arrived_s if virtual else to_wall_s
    waited_s = max(0.0, began_s - window.arrived_s - window.took_s)
    stages = {"wait_ms": waited_s * 1000, "infer_ms": (ended_s - began_s) * 1000}
    return Result(
        window=window.number,
        stream=stream,
        source=source,
        epoch=window.epoch,
        t_first_s=window.t_first_s,
        t_s=window.t_s,
        t_capture=window.arrived_s + to_wall_s,
        t_label=ended_s + to_wall_s,
        age_ms=(ended_s - window.arrived_s) * 1000,
        frame_first=window.frame_first,
        frame_last=window.frame_last,
        gap=window.gap,
        dropped=window.dropped,
        label=best[0][0],
        score=best[0][1],
        top=best,
        expert=int(prediction.route[0]),
        weights=tuple(float(weight) for weight in weights),
        route_margin=float(ordered[0] - ordered[1]) if len(ordered) > 1 else 1.0,
        route_entropy=max(0.0, float(-(weights * np.log(np.maximum(weights, 1e-30))).sum())),
        stage_ms={**window.stage_ms, **stages},
    )


def later(result: Result, seconds: float) -> Result:
    """Return a result whose label was there so much later: the engine ran once more for it."""
    ms = seconds * 1000
    return replace(
        result,
        t_label=result.t_label + seconds,
        age_ms=result.age_ms + ms,
        stage_ms={**result.stage_ms, "infer_ms": result.stage_ms["infer_ms"] + ms},
    )


def listed(
    shares: NDArray[np.float64], labels: tuple[str, ...], top: int
) -> tuple[tuple[str, float], ...]:
    """Return the most likely labels with their shares, best first."""
    best = np.argsort(-shares, kind="stable")[:top]
    return tuple((labels[i], float(shares[i])) for i in best)


def softmax(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the softmax of one row."""
    raised = np.exp(values.astype(np.float64) - float(values.max()))
    share: NDArray[np.float64] = raised / raised.sum()
    return share
