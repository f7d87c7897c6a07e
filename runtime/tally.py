"""What a run counts, and what it says of it at its end."""

from __future__ import annotations

import time
from collections import Counter, deque
from typing import Any

import numpy as np

from .results import Result

REMEMBERED = 65536  # newest windows whose latencies are kept


class Tally:
    """Counts of one pipeline; each field is written by one thread only.

    Attributes:
        frames: taken from the source.
        frames_dropped: lost by the source, or because what follows was too slow.
        frames_unseen: too late for the sinks (a saved video repeats the frame before).
        windows: labelled.
        windows_incomplete: due, but their times could not be honoured.
        windows_dropped: made, but the engine was too slow for them.
        results_dropped: labelled, but the sinks were too slow for them.
        frames_run: frames that experts ran, where they follow the stream frame by frame.
        warm_ups: how often one of them ran a whole clip first.
        stream_s: from the first frame to the last on the source's clock, in seconds.
        epochs: connections or rounds of the source, and breaks in its times.
    """

    def __init__(self) -> None:
        """Start at zero."""
        self.frames = self.frames_dropped = self.frames_unseen = 0
        self.windows = self.windows_incomplete = 0
        self.windows_dropped = self.results_dropped = 0
        self.frames_run = self.warm_ups = 0
        self.stream_s, self.epochs = 0.0, 0
        self.experts: Counter[int] = Counter()
        self._age_ms: deque[float] = deque(maxlen=REMEMBERED)
        self._infer_ms: deque[float] = deque(maxlen=REMEMBERED)
        self._began_s = time.monotonic()

    def add(self, result: Result) -> None:
        """Count one result."""
        self.windows += 1
        self.experts[result.expert] += 1
        self._age_ms.append(result.age_ms)
        self._infer_ms.append(result.stage_ms["infer_ms"])

    def to_json(self) -> dict[str, Any]:
        """Return everything, with rates and percentiles."""
        elapsed_s = max(time.monotonic() - self._began_s, 1e-9)
        return {
            "frames": self.frames,
            "frames_dropped": self.frames_dropped,
            "frames_unseen": self.frames_unseen,
            "windows": self.windows,
            "windows_incomplete": self.windows_incomplete,
            "windows_dropped": self.windows_dropped,
            "results_dropped": self.results_dropped,
            "frames_run": self.frames_run,
            "warm_ups": self.warm_ups,
            "epochs": self.epochs,
            "stream_s": round(self.stream_s, 3),
            "elapsed_s": round(elapsed_s, 3),
            "fps_in": round((self.frames + self.frames_dropped) / elapsed_s, 2),
            "fps_processed": round(self.frames / elapsed_s, 2),
            "fps_dropped": round(self.frames_dropped / elapsed_s, 2),
            "age_ms": _percentiles(self._age_ms),
            "infer_ms": _percentiles(self._infer_ms),
            "expert_share": {
                str(expert): round(count / self.windows, 4)
                for expert, count in sorted(self.experts.items())
            },
        }

    def lines(self) -> list[str]:
        """Return it as lines to read."""
        said = self.to_json()
        lines = [
            f"frames: {self.frames} in {said['stream_s']} s of stream, "
            f"{self.frames_dropped} dropped; per second {said['fps_in']} in, "
            f"{said['fps_processed']} processed, {said['fps_dropped']} dropped",
            f"windows: {self.windows} labelled, {self.windows_incomplete} incomplete, "
            f"{self.windows_dropped} dropped before the engine, "
            f"{self.results_dropped} after it; epochs: {self.epochs}",
        ]
        if self.frames_unseen:
            lines.append(f"frames not shown or saved, for sinks too slow: {self.frames_unseen}")
        if self.frames_run:
            lines.append(
                f"frame by frame: {self.frames_run} frames run for {self.windows} windows, "
                f"{self.warm_ups} whole clips among them"
            )
        if self.windows:
            lines += [
                f"latency ms p50/p95/p99: frame to label {_slashed(said['age_ms'])}, "
                f"engine {_slashed(said['infer_ms'])}",
                "experts: "
                + ", ".join(f"{e} {share:.0%}" for e, share in said["expert_share"].items()),
            ]
        return lines


def _percentiles(values: deque[float]) -> dict[str, float] | None:
    if not values:
        return None
    found = np.percentile(np.array(values), (50, 95, 99))
    return {f"p{p}": round(float(v), 3) for p, v in zip((50, 95, 99), found, strict=True)}


def _slashed(percentiles: dict[str, float]) -> str:
    return "/".join(f"{value:.1f}" for value in percentiles.values())
