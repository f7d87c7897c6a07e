"""stream: the runtime's own pipeline over cameras' own time: from capture to label, and drops.

Each stream is the `test` source, 30 frames a second that do not wait, and is served as vmoe-run
serves it: the same threads, queues, windows and batches (runtime/stream.py). The pattern is
rendered in the place of decoding. Where the engine is too slow, windows are dropped and counted.
"""

from __future__ import annotations

import contextlib
import time

import numpy as np

from vmoe.runtime import threads as shares
from vmoe.runtime.bench import forms, record
from vmoe.runtime.bench.forms import Form
from vmoe.runtime.bench.record import Row, Streamed
from vmoe.runtime.bench.settings import BenchSettings
from vmoe.runtime.bench.subjects import Subject
from vmoe.runtime.bench.watch import Watch
from vmoe.runtime.settings import StreamSettings
from vmoe.runtime.sources.test import TestSource
from vmoe.runtime.stream import Stream

from . import STREAM

COUNTS = ("windows_dropped", "results_dropped", "windows_incomplete", "frames", "frames_dropped")


def form(subject: Subject, streams: int) -> Form:
    """Return what a row of streams is of: the engine has the threads that decoding leaves."""
    threads = shares.of_engine(streams, subject.threads)
    return Form(subject.name, forms.FREE, lambda _: None, STREAM, 1, streams, threads,
                subject.engine.backend_name)  # fmt: skip


def run(
    subject: Subject, made: Form, settings: BenchSettings, watch: Watch
) -> tuple[Row | None, bool]:
    """Serve some streams for --duration after the first window and --warmup.

    Args:
        subject: the bundle.
        made: what `form` gave.
        settings: how long.
        watch: looks at the machine whenever a label was there.

    Returns:
        The row, None where nothing was counted before it was interrupted; and whether it was
        served to its end.

    Raises:
        VmoeError: what the pipeline raises.
    """
    window_s = subject.bundle.spec.window_s
    warm_s = window_s + settings.warmup / 1000
    how = StreamSettings(duration=warm_s + settings.duration + window_s)
    sources = [TestSource(settings.seed + number) for number in range(made.streams)]
    ages: list[float] = []
    whole = True
    with contextlib.ExitStack() as stack:
        engine = subject.engine
        if subject.threads is None and subject.reopen is not None:
            engine = stack.enter_context(subject.reopen(made.threads or 1))
        stream = stack.enter_context(Stream(engine, *sources, settings=how))
        began = now = time.monotonic()
        before = _counts(stream)
        try:
            for result in stream:
                now = time.monotonic()
                watch.look()
                if result.t_s <= warm_s and not ages:
                    began, before = now, _counts(stream)
                    continue
                ages.append(result.age_ms)
                if now - began >= settings.duration and len(ages) % made.streams == 0:
                    break  # a last hop of some streams alone would be too few windows for its time
        except KeyboardInterrupt:
            whole = False
        after = _counts(stream)
        hop_s = stream.hop_s
    if not ages:
        why = f"no window was labelled in {how.duration:.1f} s of {made.streams} streams"
        return (record.failure(made, why) if whole else None), whole
    since = {name: after[name] - before[name] for name in COUNTS}
    counts = _streamed(since, len(ages), max(now - began, 1e-9), hop_s)
    return record.stream_row(made, np.array(ages), counts, settings.percentile), whole


def _streamed(since: dict[str, int], windows: int, seconds: float, hop_s: float) -> Streamed:
    """Return what was counted since the warm-up; a result that was dropped is a window lost."""
    return Streamed(
        seconds=seconds,
        hop_s=hop_s,
        windows=windows,
        windows_dropped=since["windows_dropped"] + since["results_dropped"],
        windows_incomplete=since["windows_incomplete"],
        frames=since["frames"],
        frames_dropped=since["frames_dropped"],
    )


def _counts(stream: Stream) -> dict[str, int]:
    return {name: getattr(stream.tally, name) for name in COUNTS}
