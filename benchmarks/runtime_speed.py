"""The figures of time in benchmarks/runtime.py: the pipeline and its engine take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from figures import Figure

from vmoe import checkpoint, clips, latest, output
from vmoe.bundle import Bundle
from vmoe.clips import ClipSpec, Frame
from vmoe.export import ExportSettings, onnx, pipeline
from vmoe.models import ModelSettings, build
from vmoe.runtime import Engine, Pipeline, StreamSettings, load
from vmoe.runtime.sources._iterator import IteratorSource
from vmoe.runtime.windows import default_hop_s

FPS, SIZE = 25.0, (480, 640)
STREAMS = 8
OVERHEAD, SHARE, SLACK_MS = 0.05, 0.95, 30.0  # what is to be reached
SCENE = 40  # different frames, so that no cache holds them all


class Turn(NamedTuple):
    """CPU seconds per window of each form, in each round."""

    engine: list[float]
    pipeline: list[float]
    fitting: list[float]


def measure(folder: Path, *, quick: bool) -> list[Figure]:
    """Return the figures of time, of a full-size model and of the one that ships."""
    rounds, windows = (3, 6) if quick else (15, 20)
    found = []
    with load(full_size(folder / "full"), threads=1) as engine:
        found.append(_overhead("stream_overhead", engine, rounds, windows))
        found.append(_many(engine, max(3, rounds // 2), max(3, windows // 4)))
        found.append(_latency(engine, 5.0 if quick else 30.0))
    with load(latest.shipped(), threads=1) as engine:
        found.append(_overhead("shipped_stream_overhead", engine, rounds, 5 * windows))
    return found


def full_size(path: Path) -> Path:
    """Write the bundle of an untrained r3d18 of full size, lowering split; return its folder."""
    twin = build(ModelSettings(), ClipSpec()).eval()
    held = checkpoint.Checkpoint(twin, tuple(f"label {k}" for k in range(twin.settings.classes)))
    parts = onnx.from_twin(twin, ExportSettings().opset)
    with output.whole_folder(path) as folder:
        pipeline.write(pipeline.Plan(held, None, path.name, ExportSettings()), parts, folder)
    return path


@cache
def _scene(size: tuple[int, int]) -> Frame:
    return np.random.default_rng(0).integers(0, 256, (SCENE, *size, 3), dtype=np.uint8)


def _frames(count: int, seed: int = 0, size: tuple[int, int] = SIZE) -> Iterator[Frame]:
    return (_scene(size)[(i + seed) % SCENE] for i in range(count))


def _sized(engine: Engine, fitting: bool) -> tuple[int, int]:
    spec = engine.bundle.spec
    return (spec.height, spec.width) if fitting else SIZE


def _needed(engine: Engine, windows: int) -> int:
    """Return how many frames so many windows take."""
    spec = engine.bundle.spec
    return round((spec.window_s + (windows - 1) * default_hop_s(spec)) * FPS) + 2


def _turns(alone: Callable[[], int], served: Callable[[bool], int], rounds: int) -> Turn:
    """Run the engine, the pipeline, and it on frames that need no resizing, in turn.

    Each returns how many windows it labelled.
    """
    found = Turn([], [], [])
    forms = (alone, lambda: served(False), lambda: served(True))
    for number in range(rounds + 1):
        for form, kept in zip(forms, found, strict=True):
            began = time.process_time()
            windows = form()
            if number:  # the first round is not counted
                kept.append((time.process_time() - began) / windows)
    return found


def _clips(bundle: Bundle, count: int) -> clips.Clips:
    return np.stack(
        [np.stack([clips.prepare(f, bundle.spec) for f in _frames(bundle.spec.frames, seed)])
         for seed in range(count)]
    )  # fmt: skip


def _overhead(name: str, engine: Engine, rounds: int, windows: int) -> Figure:
    """Compare the pipeline with the engine alone, one window at a time."""
    given = _clips(engine.bundle, 4)

    def alone() -> int:
        for i in range(windows):
            engine.infer(given[i % 4 : i % 4 + 1])
        return windows

    def served(fitting: bool) -> int:
        frames = _frames(_needed(engine, windows), 0, _sized(engine, fitting))
        source = IteratorSource(frames, fps=FPS, copy=False)  # as a file's: each its own
        return sum(1 for _ in Pipeline(engine, [source]).results())

    turn = _turns(alone, served, rounds)
    return _ratio(name, turn, OVERHEAD, lambda engine, whole: whole / engine - 1, "lower")


def _many(engine: Engine, rounds: int, windows: int) -> Figure:
    """Compare N streams with the engine alone at a batch of N."""
    given = _clips(engine.bundle, STREAMS)

    def alone() -> int:
        for _ in range(windows):
            engine.infer(given)
        return windows * STREAMS

    def served(fitting: bool) -> int:
        count, size = _needed(engine, windows), _sized(engine, fitting)
        sources = [
            IteratorSource(_frames(count, seed, size), fps=FPS, name=str(seed), copy=False)
            for seed in range(STREAMS)
        ]
        how = StreamSettings(latency_budget=1000, max_batch=STREAMS)
        return sum(1 for _ in Pipeline(engine, sources, how).results())

    turn = _turns(alone, served, rounds)
    return _ratio("many_streams", turn, SHARE, lambda engine, whole: engine / whole, "higher")


def _ratio(
    name: str, turn: Turn, reach: float, of: Callable[[float, float], float], better: str
) -> Figure:
    value = of(statistics.median(turn.engine), statistics.median(turn.pipeline))
    each = [of(*pair) for pair in zip(turn.engine, turn.pipeline, strict=True)]
    more = {
        "without_resizing": of(statistics.median(turn.engine), statistics.median(turn.fitting)),
        "minima": of(min(turn.engine), min(turn.pipeline)),
        "engine_ms": 1000 * statistics.median(turn.engine),
        "pipeline_ms": 1000 * statistics.median(turn.pipeline),
    }
    spread = float(np.subtract(*np.percentile(each, [75, 25])) / 2)
    return Figure(name, value, "ratio", reach, better, len(each), spread, more=more)


def _latency(engine: Engine, seconds: float) -> Figure:
    """Measure capture to label of a live source that keeps to the clock."""

    def paced() -> Iterator[Frame]:
        began = time.monotonic()
        for i, frame in enumerate(_frames(round(seconds * FPS))):
            time.sleep(max(0.0, began + i / FPS - time.monotonic()))
            yield frame

    run = Pipeline(engine, [IteratorSource(paced(), fps=FPS, live=True)])
    count = sum(1 for _ in run.results())
    age, infer = run.tally.percentiles("age_ms"), run.tally.percentiles("infer_ms")
    assert age is not None
    assert infer is not None
    reach = run.hop_s * 1000 + infer["p50"] + SLACK_MS
    more = {"p95": age["p95"], "p99": age["p99"], "engine_ms": infer["p50"],
            "hop_ms": run.hop_s * 1000}  # fmt: skip
    return Figure("capture_to_label_p50", age["p50"], "ms", reach, "lower", count, more=more)
