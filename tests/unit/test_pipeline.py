"""The pipeline: order, pace, drops, errors, and that its threads always end."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests import bundles, videos
from tests.contract.test_sinks import result
from vmoe.clips import ClipSpec
from vmoe.errors import OutputError, SettingError, SourceError
from vmoe.runtime import Engine, Pipeline, StreamSettings, load, watch
from vmoe.runtime.frames import BLOCK, LATEST, OLDEST, Frame, Handover, Stop
from vmoe.runtime.sinks import Step
from vmoe.runtime.sources import RUNNING
from vmoe.runtime.tally import Tally


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, spec: ClipSpec) -> Iterator[Engine]:
    path = bundles.write(tmp_path_factory.mktemp("b") / "b", spec)
    with load(path, all_parts=True) as loaded:
        yield loaded


@pytest.fixture(autouse=True)
def _threads_end() -> Iterator[None]:
    """Whatever happens in a test, no thread of a pipeline is left behind."""
    yield
    assert [t.name for t in threading.enumerate() if t.name.startswith("vmoe-")] == []


class Given:
    """A source of given frames: red goes from 0 to 255, so that the route changes."""

    def __init__(self, count: int, *, live: bool = False, error: Exception | None = None) -> None:
        self.name, self.live, self.fps, self.state = "given", live, 20.0, RUNNING
        self.released_in = ""
        self._count, self._error = count, error

    def frames(self, stop: Stop) -> Generator[Frame, None, None]:
        try:
            for i in range(self._count):
                if stop.asked():
                    return
                pixels = np.zeros((48, 64, 3), np.uint8)
                pixels[..., 0], pixels[..., 1] = 255 * i // max(1, self._count - 1), 100
                yield Frame(pixels, i / 20, i, 0, time.monotonic(), 0.1)
            if self._error is not None:
                raise self._error
        finally:
            self.released_in = threading.current_thread().name


class Slow:
    """A sink that takes its time."""

    name, wants_frames = "slow", True

    def __init__(self, seconds: float = 0.0, error: Exception | None = None) -> None:
        self.seen: list[Step] = []
        self.left_with: object = "never"
        self._seconds, self._error = seconds, error

    def take(self, step: Step) -> None:
        time.sleep(self._seconds)
        self.seen.append(step)
        if self._error is not None and step.result is not None:
            raise self._error

    def __enter__(self) -> Slow:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.left_with = kind


def test_every_window_of_a_file_with_its_true_times(engine: Engine, tmp_path: Path) -> None:
    path = videos.write(tmp_path / "a.mp4", 60, 20.0)
    got = list(watch(engine, path, hop_s=0.5, top=2))
    assert [r.window for r in got] == list(range(6))
    assert [round(r.t_s, 3) for r in got] == [0.3, 0.8, 1.3, 1.8, 2.3, 2.8]
    assert [round(r.t_s - r.t_first_s, 3) for r in got] == [0.3] * 6
    assert [(r.frame_first, r.frame_last) for r in got][:2] == [(0, 6), (10, 16)]
    assert all(r.label == r.top[0][0] and len(r.top) == 2 and r.age_ms > 0 for r in got)
    assert all(set(r.stage_ms) == {"decode_ms", "prepare_ms", "wait_ms", "infer_ms"} for r in got)


def test_results_say_what_the_engine_said(engine: Engine) -> None:
    got = list(watch(engine, Given(60), hop_s=0.1))
    assert [r.expert for r in got] == sorted(r.expert for r in got)
    assert {r.expert for r in got} == {0, 1, 2}
    for r in got:
        assert sum(r.weights) == pytest.approx(1)
        ordered = sorted(r.weights)
        assert r.route_margin == pytest.approx(ordered[-1] - ordered[-2])
        assert r.route_entropy == pytest.approx(-sum(w * np.log(w) for w in r.weights))
        assert r.expert == int(np.argmax(r.weights))


def test_of_a_file_nothing_is_dropped_however_slow_the_sink(engine: Engine) -> None:
    sink = Slow(0.003)
    pipeline = Pipeline(engine, [Given(100)], StreamSettings(hop=0.05))
    got = list(pipeline.results([sink]))
    assert len(got) == pipeline.tally.windows == 94
    assert [s.frame.sequence for s in sink.seen if s.frame] == list(range(100))
    assert (pipeline.tally.frames, pipeline.tally.frames_dropped) == (100, 0)


def test_a_slow_sink_never_blocks_a_live_source_and_every_drop_is_counted(engine: Engine) -> None:
    source = Given(3000, live=True)
    sink = Slow(0.02)
    pipeline = Pipeline(engine, [source], StreamSettings(hop=0.05))
    list(pipeline.results([sink]))
    tally = pipeline.tally
    assert source.released_in == "vmoe-capture-0"
    assert tally.frames + tally.frames_dropped >= 2900  # the last may wait when it ends
    assert tally.frames_dropped + tally.frames_unseen > 1000
    assert tally.frames == len(sink.seen) + tally.frames_unseen


def test_what_came_before_an_error_is_served(engine: Engine) -> None:
    got = []
    sink = Slow()
    results = watch(engine, Given(30, error=SourceError("gone")), hop_s=0.1, sinks=[sink])
    with pytest.raises(SourceError, match="gone"):  # noqa: PT012
        for result in results:
            got.append(result)
    assert got[-1].frame_last >= 28
    assert len(sink.seen) == 30
    assert sink.left_with is SourceError


def test_a_sink_that_fails_never_stops_the_stream(engine: Engine) -> None:
    got, good = [], Slow()
    sinks = [Slow(error=OutputError("full")), good]
    with pytest.raises(OutputError, match=r"not written: slow \d+\. full"):  # noqa: PT012
        for result in watch(engine, Given(200), sinks=sinks):
            got.append(result)
    assert len(got) == len([step for step in good.seen if step.result is not None])
    assert len(got) == 49
    assert good.left_with is None


def test_an_engine_that_fails_stops_everything(engine: Engine) -> None:
    class Broken:
        bundle = engine.bundle

        def infer(self, clips: object) -> object:
            raise ZeroDivisionError("inside")

    source = Given(5000)
    with pytest.raises(ZeroDivisionError, match="inside"):
        list(watch(Broken(), source))  # type: ignore[arg-type]
    assert source.released_in == "vmoe-capture-0"


def test_leaving_the_loop_early_ends_the_threads(engine: Engine) -> None:
    source, sink = Given(5000), Slow()
    results = watch(engine, source, sinks=[sink])
    next(results)
    results.close()
    assert source.released_in == "vmoe-capture-0"
    assert sink.left_with is GeneratorExit


def test_a_duration_ends_the_stream(engine: Engine) -> None:
    pipeline = Pipeline(engine, [Given(5000)], StreamSettings(duration=2.0))
    got = list(pipeline.results())
    assert got[-1].t_s < 2.0
    assert pipeline.tally.frames == 40


def test_stop_ends_it_in_order(engine: Engine) -> None:
    stop, sink = Stop(), Slow()
    for number, _ in enumerate(watch(engine, "test", stop=stop, sinks=[sink])):
        if number == 1:
            stop.ask()
    assert sink.left_with is None


def test_a_slow_file_is_refused_or_resampled(engine: Engine, tmp_path: Path) -> None:
    path = videos.write(tmp_path / "a.avi", 20, 4.0)
    with pytest.raises(SourceError, match="every 250 ms"):
        list(watch(engine, path))
    assert len(list(watch(engine, path, sampling="nearest"))) > 10


def test_bad_arguments(engine: Engine) -> None:
    with pytest.raises(SettingError, match="--top is 0"):
        watch(engine, "test", top=0)


def test_the_tally_says_what_was_counted(engine: Engine) -> None:
    pipeline = Pipeline(engine, [Given(60)], StreamSettings(hop=0.1))
    list(pipeline.results())
    said = pipeline.tally.to_json()
    assert (said["frames"], said["windows"], said["epochs"]) == (60, 27, 1)
    assert sum(said["expert_share"].values()) == pytest.approx(1, abs=1e-3)
    assert said["age_ms"]["p50"] <= said["age_ms"]["p95"] <= said["age_ms"]["p99"]
    assert "27 labelled" in "\n".join(pipeline.tally.lines())
    assert Pipeline(engine, [Given(1)]).tally.to_json()["age_ms"] is None
    replayed = Tally()
    replayed.add(result())  # its t_capture is a file's own time
    assert 0.0125 <= (replayed.label_age_s() or 0) < 600


def test_a_full_handover_does_as_its_policy_says() -> None:
    for policy, kept, lost in ((LATEST, [1, 2], [0]), (OLDEST, [0, 1], [2])):
        dropped: list[int] = []
        queue = Handover[int](2, policy=lambda p=policy: p, on_drop=dropped.append)  # type: ignore[misc]
        assert all(queue.put(i) for i in range(3))
        queue.end()
        assert (list(queue), dropped) == (kept, lost)
    waits = Handover[int](1, policy=lambda: BLOCK)
    assert (waits.room(), waits.put(0), waits.room()) == (1, True, 0)
    threading.Timer(0.05, waits.take).start()
    assert waits.put(1)
    assert waits.take() == 1


def test_a_handover_keeps_what_is_precious_and_tells_what_it_drops() -> None:
    dropped: list[int] = []
    queue = Handover[int](
        3, policy=lambda: LATEST, precious=lambda i: i % 10 == 0, on_drop=dropped.append
    )
    for i in (10, 11, 12, 13, 20, 30, 40):
        assert queue.put(i)
    queue.end(ValueError("after"))
    got = []
    with pytest.raises(ValueError, match="after"):  # noqa: PT012
        for item in queue:
            got.append(item)
    assert (got, dropped) == ([20, 30, 40], [11, 12, 13, 10])
    queue.abandon()
    assert not queue.put(1)
