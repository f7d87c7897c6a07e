"""Many streams through one engine: batched, in order, and none held up by another."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests import bundles, servers, videos
from vmoe import opencv
from vmoe.clips import Clips, ClipSpec
from vmoe.errors import SettingError, SourceError
from vmoe.runtime import Engine, Pipeline, SourceSettings, Stream, StreamSettings, load, threads
from vmoe.runtime.engine import Prediction
from vmoe.runtime.engines import onnxruntime
from vmoe.runtime.frames import Frame, Stop
from vmoe.runtime.lanes import Work
from vmoe.runtime.results import Result
from vmoe.runtime.sources import ENDED, REOPENING, RUNNING
from vmoe.runtime.windows import Window


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, spec: ClipSpec) -> Iterator[Engine]:
    path = bundles.write(tmp_path_factory.mktemp("b") / "b", spec)
    with load(path, all_parts=True) as loaded:
        yield loaded


@pytest.fixture(autouse=True)
def _threads_end() -> Iterator[None]:
    yield
    assert [t.name for t in threading.enumerate() if t.name.startswith("vmoe-")] == []


class Recording:
    """An engine that notes what it was asked."""

    def __init__(self, engine: Engine, seconds: float = 0.0) -> None:
        self.bundle, self.clips = engine.bundle, []
        self._engine, self._seconds = engine, seconds
        self.clips: list[Clips] = []

    def load_parts(self) -> None:
        """All are loaded."""

    def infer(self, clips: Clips) -> Prediction:
        self.clips.append(clips)
        time.sleep(self._seconds)
        return self._engine.infer(clips)


class Coloured:
    """A source of one colour: its red says which expert answers."""

    def __init__(
        self, name: str, red: int, *, count: int = 40, live: bool = False, paced: bool = False,
        error: str | None = None,
    ) -> None:  # fmt: skip
        self.name, self.live, self.fps, self.state = name, live, 20.0, RUNNING
        self._red, self._count, self._paced, self._error = red, count, paced, error

    def frames(self, stop: Stop) -> Generator[Frame, None, None]:
        began = time.monotonic()
        for i in range(self._count):
            while self._paced and time.monotonic() < began + i / 20:
                time.sleep(0.002)
            if stop.asked():
                return
            pixels = np.full((32, 32, 3), (self._red, 100, 0), np.uint8)
            yield Frame(pixels, i / 20, i, 0, time.monotonic(), 0.1)
        if self._error:
            raise SourceError(self._error)


class Silent:
    """A live source that never gives a frame, until it is stopped."""

    name, live, fps, state = "silent", True, 0.0, RUNNING

    def frames(self, stop: Stop) -> Generator[Frame, None, None]:
        while not stop.asked():
            time.sleep(0.01)
        yield from ()


def of(results: list[Result], stream: int) -> list[Result]:
    return [result for result in results if result.stream == stream]


def test_windows_that_are_due_together_are_one_batch_and_each_stream_keeps_its_order(
    engine: Engine,
) -> None:
    recording = Recording(engine)
    sources = [Coloured(f"s{red}", red, paced=True) for red in (0, 128, 255)]
    settings = StreamSettings(hop=0.2, latency_budget=200)
    got = list(Pipeline(recording, sources, settings).results())  # type: ignore[arg-type]
    assert {len(clips) for clips in recording.clips} == {3}
    for stream in range(3):
        mine = of(got, stream)
        assert [r.window for r in mine] == list(range(9))
        assert [r.t_s for r in mine] == pytest.approx([0.3 + 0.2 * i for i in range(9)])
        assert {r.expert for r in mine} == {stream}
        assert {r.source for r in mine} == {f"s{(0, 128, 255)[stream]}"}


def test_a_busy_engine_makes_batches_by_itself_and_no_larger_than_allowed(engine: Engine) -> None:
    recording = Recording(engine, seconds=0.02)
    sources = [Coloured(str(i), 0) for i in range(5)]
    pipeline = Pipeline(recording, sources, StreamSettings(max_batch=4))  # type: ignore[arg-type]
    got = list(pipeline.results())
    assert max(len(clips) for clips in recording.clips) == 4
    assert len(got) == 5 * 9
    assert pipeline.tally.windows == 45


def test_one_stream_is_never_batched_with_itself(engine: Engine) -> None:
    recording = Recording(engine, seconds=0.005)
    list(Pipeline(recording, [Coloured("x", 0)]).results())  # type: ignore[arg-type]
    assert {len(clips) for clips in recording.clips} == {1}


def test_silent_and_lost_streams_delay_nobody(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    sources = [Silent(), Coloured("lost", 0, count=10, error="lost: gone"), Coloured("good", 255)]
    stop = Stop()
    pipeline = Pipeline(engine, sources, stop=stop)
    began, got = time.monotonic(), []
    for result in pipeline.results():
        got.append(result)
        if len(of(got, 2)) == 9 and len(of(got, 1)) == 1:
            stop.ask()
    assert time.monotonic() - began < 10
    assert len(got) == 10
    assert "lost: gone" in caplog.text  # told at once; who ends the rest on purpose knows it


def test_lost_streams_are_an_error_when_all_have_ended(engine: Engine) -> None:
    sources = [Coloured("lost", 0, count=10, error="lost: gone"), Coloured("good", 255)]
    with pytest.raises(SourceError, match="1 of 2 sources were lost: lost: gone"):
        list(Pipeline(engine, sources).results())


def test_a_batch_waits_for_streams_that_run_alone(engine: Engine) -> None:
    dead, good = Silent(), Coloured("good", 255)
    pipeline = Pipeline(engine, [dead, good], StreamSettings(latency_budget=1e6))
    window = Window(0, np.zeros((1,), np.uint8), 0, 0, 0, 0, 0, time.monotonic(), False, 0, {})
    pipeline.lanes[1].work.put(Work(None, window))
    assert pipeline._batches._worth_waiting_s() > 0
    dead.state = REOPENING
    assert pipeline._batches._worth_waiting_s() == 0


def test_windows_that_are_too_old_are_not_labelled(engine: Engine) -> None:
    recording = Recording(engine, seconds=0.25)
    source = Coloured("x", 0, count=30, live=True, paced=True)
    pipeline = Pipeline(
        recording,
        [source],
        StreamSettings(hop=0.1, max_staleness=0.2),  # type: ignore[arg-type]
    )
    got = list(pipeline.results())
    assert 2 <= len(got) < 10
    assert pipeline.tally.windows_dropped > 5
    assert all(r.stage_ms["wait_ms"] < 250 for r in got)


def test_frames_given_twice_are_counted_and_are_in_no_window(engine: Engine) -> None:
    class Twice(Coloured):
        def frames(self, stop: Stop) -> Generator[Frame, None, None]:
            for frame in super().frames(stop):
                yield frame
                yield frame

    pipeline = Pipeline(engine, [Twice("x", 0)])
    assert len(list(pipeline.results())) == 9
    tally = pipeline.tally
    assert (tally.frames, tally.frames_duplicated) == (80, 40)
    assert "duplicated: 40" in "\n".join(tally.lines())


def test_late_frames_of_a_live_source_are_counted(engine: Engine) -> None:
    class Late(Coloured):
        def frames(self, stop: Stop) -> Generator[Frame, None, None]:
            for frame in super().frames(stop):
                late_s = 0.08 if frame.sequence % 10 == 9 else 0.0
                yield Frame(frame.pixels, frame.t_s, frame.sequence, 0, frame.t_s + late_s, 0.1)

    pipeline = Pipeline(engine, [Late("x", 0, live=True, paced=True, count=30)])
    list(pipeline.results())
    assert pipeline.tally.frames_late == 3


def test_a_stream_of_a_programs_own_frames(engine: Engine) -> None:
    given = (np.full((32, 32, 3), (255, 100, 0), np.uint8) for _ in range(12))
    with Stream(engine, given) as stream:
        got = list(stream)
        assert stream.states == {"api": ENDED}
    assert [r.t_s for r in got] == pytest.approx([0.3, 0.5, 0.7, 0.9, 1.1])
    assert {r.expert for r in got} == {2}
    assert stream.tally.windows == len(got)


def test_what_a_stream_takes(engine: Engine, tmp_path: Path) -> None:
    path = videos.write(tmp_path / "a.avi", 20)
    with Stream(engine, path, str(path), Coloured("c", 0)) as stream:
        assert {result.stream for result in stream} == {0, 1, 2}
    assert set(stream.states) == {str(path), "c"}
    with pytest.raises(SourceError, match="camera 77"):
        Stream(engine, 77)
    with pytest.raises(SettingError, match="no source is given"):
        Stream(engine)


def test_a_stream_can_be_left_and_stopped(engine: Engine) -> None:
    with Stream(engine, Coloured("a", 0, count=5000), Coloured("b", 0, count=5000)) as stream:
        for number, _ in enumerate(stream):
            if number == 3:
                break
    with Stream(engine, Coloured("a", 0, count=5000, paced=True)) as stream:
        for _ in stream:
            stream.stop()
    assert stream.tally.windows >= 1


def test_no_window_mixes_what_came_before_and_after_a_reconnect(tmp_path: Path) -> None:
    """An RTSP server that is killed twice; the frames of each window are read from its pixels."""
    spec = ClipSpec(frames=4, spacing_s=0.1, height=videos.SIZE[0], width=videos.SIZE[1])
    video = videos.write(tmp_path / "a.ts", 60, servers.FPS)
    server = servers.Rtsp(video, 60)
    with load(bundles.write(tmp_path / "b", spec), all_parts=True) as engine:
        recording = Recording(engine)
        how = SourceSettings(read_timeout_s=1.0)
        settings = StreamSettings(hop=0.1)
        got: list[Result] = []
        with Stream(recording, server.url, how=how, settings=settings) as stream:  # type: ignore[arg-type]
            for result in stream:
                got.append(result)
                if len(of_epoch(got)) == 6 and result.epoch < 2:
                    server.kill()
                    time.sleep(0.1)
                    server = servers.Rtsp(video, 60, server.port)
                elif result.epoch == 2 and len(of_epoch(got)) == 3:
                    stream.stop()
        server.kill()
    assert [r.gap for r in got if r.gap] == [True, True]
    assert len({r.epoch for r in got}) == 3
    for clips in recording.clips:
        numbers = [videos.number_of(frame) for frame in clips[0]]
        assert set(np.diff(numbers)) == {2}, numbers  # 20 frames a second, 100 ms apart
    assert all("sesame" not in str(r.to_json()) for r in got)


def of_epoch(results: list[Result]) -> list[Result]:
    return [result for result in results if result.epoch == results[-1].epoch]


def test_cores_are_shared_out() -> None:
    assert threads.of_engine(1, cores=2) == 1
    assert threads.of_engine(1, cores=8) == 7
    assert threads.of_engine(16, cores=8) == threads.of_engine(64, cores=8) == 4
    assert threads.of_engine(1, asked=3, cores=8) == 3
    assert threads.of_engine(1) >= 1


def test_a_streams_threads_are_shared_out_through_the_api_too(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    cv2 = opencv.quiet()
    before = cv2.getNumThreads()
    with Stream(engine, Coloured("x", 0)) as stream:
        assert [cv2.getNumThreads() for _ in stream] == [1] * 9  # OpenCV's own pool is off
    assert cv2.getNumThreads() == before
    asked: list[int | None] = []
    monkeypatch.setattr(onnxruntime, "open", lambda settings: asked.append(settings.threads))
    for streams in (0, 3):
        with pytest.raises(AttributeError):  # None is no backend
            load(engine.bundle.path, "onnxruntime", streams=streams)
    assert asked == [None, threads.of_engine(3)]
