"""What a run counts, and what it says of it at its end.

Times, in milliseconds: `age_ms` from a window's last frame being there to its label (capture to
label); its stages `decode_ms`, `prepare_ms`, `wait_ms`, `infer_ms`; `label_age_ms`, how old the
label that stood was when the next one replaced it; `first_label_ms`, from the first frame to the
first label.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from .results import Result

REMEMBERED = 2048  # newest windows of a stream whose latencies are kept: less than 0.5 MiB
STAGES = ("decode_ms", "prepare_ms", "wait_ms", "infer_ms")
COUNTS = (
    "frames", "frames_dropped", "frames_duplicated", "frames_late", "frames_unseen", "windows",
    "windows_incomplete", "windows_dropped", "results_dropped", "frames_run", "warm_ups", "epochs",
    "alarms",
)  # fmt: skip


class Tally:
    """Counts of one stream; each field is written by one thread only.

    Attributes:
        frames: taken from the source.
        frames_dropped: lost by the source, or because what follows was too slow.
        frames_duplicated: given twice by the source; in no window.
        frames_late: of a live source, that came more than half a spacing late.
        frames_unseen: too late for the sinks (a saved video repeats the frame before).
        windows: labelled.
        windows_incomplete: due, but their times could not be honoured.
        windows_dropped: made, but the engine was too slow for them.
        results_dropped: labelled, but the sinks were too slow for them.
        frames_run: frames that experts ran, where they follow the stream frame by frame.
        warm_ups: how often one of them ran a whole clip first.
        epochs: connections or rounds of the source, and breaks in its times.
        alarms: windows for which the guard raised its alarm.
        stream_s: from the first frame to the last on the source's clock, in seconds.
        first_label_ms: from the first frame to the first label; None before that.
    """

    def __init__(self) -> None:
        """Start at zero."""
        self.frames = self.frames_dropped = self.frames_duplicated = self.frames_late = 0
        self.frames_unseen = self.windows = self.windows_incomplete = 0
        self.windows_dropped = self.results_dropped = 0
        self.frames_run = self.warm_ups = self.epochs = self.alarms = 0
        self.stream_s = 0.0
        self.first_label_ms: float | None = None
        self.experts: Counter[int] = Counter()
        self.times_ms = {
            name: deque[float](maxlen=REMEMBERED) for name in ("age_ms", "label_age_ms", *STAGES)
        }
        self._began_s = time.monotonic()
        self._first_frame_s: float | None = None
        self._last: Result | None = None
        self._captured_s = 0.0  # when its frame was there; t_capture may be a file's own clock

    def begin(self, arrived_s: float) -> None:
        """Note when the first frame was there, on `time.monotonic`'s clock."""
        self._first_frame_s = arrived_s

    def add(self, result: Result) -> None:
        """Count one result."""
        self.windows += 1
        self.experts[result.expert] += 1
        self.times_ms["age_ms"].append(result.age_ms)
        for stage in STAGES:
            self.times_ms[stage].append(result.stage_ms[stage])
        if self._last is None and self._first_frame_s is not None:
            self.first_label_ms = (time.monotonic() - self._first_frame_s) * 1000
        if self._last is not None:
            label_age_ms = (result.t_label - self._last.t_capture) * 1000
            self.times_ms["label_age_ms"].append(label_age_ms)
        self._last = result
        self._captured_s = time.monotonic() - result.age_ms / 1000

    def label_age_s(self) -> float | None:
        """Return how old the label that stands is now, in seconds; None before the first."""
        return None if self._last is None else time.monotonic() - self._captured_s

    @staticmethod
    def total(tallies: Sequence[Tally]) -> Tally:
        """Return the counts of several streams together."""
        if len(tallies) == 1:
            return tallies[0]
        total = Tally()
        for tally in tallies:
            for name in COUNTS:
                setattr(total, name, getattr(total, name) + getattr(tally, name))
            total.experts += tally.experts
            for name, values in tally.times_ms.items():
                total.times_ms[name].extend(list(values))
            total.stream_s = max(total.stream_s, tally.stream_s)
        firsts = [t.first_label_ms for t in tallies if t.first_label_ms is not None]
        total.first_label_ms = max(firsts, default=None)
        total._began_s = min(tally._began_s for tally in tallies)
        return total

    def percentiles(self, name: str) -> dict[str, float] | None:
        """Return p50, p95 and p99 of one of `times_ms`; None where there are none."""
        values = list(self.times_ms[name])
        if not values:
            return None
        found = np.percentile(np.array(values), (50, 95, 99))
        return {f"p{p}": round(float(v), 3) for p, v in zip((50, 95, 99), found, strict=True)}

    def to_json(self) -> dict[str, Any]:
        """Return everything, with rates and percentiles."""
        elapsed_s = max(time.monotonic() - self._began_s, 1e-9)
        first_ms = self.first_label_ms
        return {
            **{name: getattr(self, name) for name in COUNTS},
            "stream_s": round(self.stream_s, 3),
            "elapsed_s": round(elapsed_s, 3),
            "fps_in": round((self.frames + self.frames_dropped) / elapsed_s, 2),
            "fps_processed": round(self.frames / elapsed_s, 2),
            "fps_dropped": round(self.frames_dropped / elapsed_s, 2),
            "first_label_ms": None if first_ms is None else round(first_ms, 3),
            **{name: self.percentiles(name) for name in self.times_ms},
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
        if self.frames_duplicated or self.frames_late:
            lines.append(f"frames duplicated: {self.frames_duplicated}, late: {self.frames_late}")
        if self.frames_unseen:
            lines.append(f"frames not shown or saved, for sinks too slow: {self.frames_unseen}")
        if self.frames_run:
            lines.append(
                f"frame by frame: {self.frames_run} frames run for {self.windows} windows, "
                f"{self.warm_ups} whole clips among them"
            )
        return lines + (self._latencies(said) if self.windows else [])

    def _latencies(self, said: dict[str, Any]) -> list[str]:
        stages = ", ".join(f"{name[:-3]} {_slashed(said[name])}" for name in STAGES)
        first_ms = said["first_label_ms"]
        lines = [
            f"latency ms p50/p95/p99: frame to label {_slashed(said['age_ms'])}, engine "
            f"{_slashed(said['infer_ms'])}; stages: {stages}",
            "experts: "
            + ", ".join(f"{e} {share:.0%}" for e, share in said["expert_share"].items()),
        ]
        if first_ms is not None and said["label_age_ms"] is not None:
            lines.insert(
                1,
                f"first label {first_ms:.0f} ms after the first frame; a label was "
                f"{_slashed(said['label_age_ms'])} ms old when the next one came",
            )
        return lines


def _slashed(percentiles: dict[str, float]) -> str:
    return "/".join(f"{value:.1f}" for value in percentiles.values())
