"""The figures of faults in benchmarks/runtime.py: real servers; frames are known by pixels."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import numpy as np
from figures import Figure

from tests import bundles, servers, videos
from vmoe.clips import Clips, ClipSpec
from vmoe.runtime import Engine, Pipeline, SourceSettings, StreamSettings, load
from vmoe.runtime.engine import Prediction
from vmoe.runtime.frames import Stop
from vmoe.runtime.sources import REOPENING, file, rtsp

FRAMES = 200
SPEC = ClipSpec(frames=4, spacing_s=0.1, height=videos.SIZE[0], width=videos.SIZE[1])
BACK_S, FROZEN, GROWTH = 2.0, 2.0, 0.02  # what is to be reached
STREAMS, TIMEOUT_S = 16, 1.0


class Recording:
    """An engine that reads the frames' numbers off the clips that it answers."""

    def __init__(self, engine: Engine) -> None:
        self.bundle, self.numbers = engine.bundle, []
        self._engine = engine
        self.numbers: list[list[int]] = []

    def load_parts(self) -> None:
        """All are loaded."""

    def infer(self, clips: Clips) -> Prediction:
        """Note the numbers; answer."""
        self.numbers += [[videos.number_of(frame) for frame in clip] for clip in clips]
        return self._engine.infer(clips)

    def mixed(self) -> int:
        """Return how many clips hold other frames than one connection's, 100 ms apart."""
        return sum(1 for seen in self.numbers if set(np.diff(seen)) != {2})


def measure(folder: Path, *, quick: bool, minutes: float) -> list[Figure]:
    """Return the figures of faults."""
    video = videos.write(folder / "numbers.ts", FRAMES, servers.FPS)
    path = bundles.write(folder / "tiny", SPEC)
    with load(path, all_parts=True) as engine:
        found = _killed(engine, video, 3 if quick else 20)
        found += [_frozen(video, 1 if quick else 5)]
        found += _many(engine, folder, 6.0 if quick else minutes * 60)
    return found


def _killed(engine: Engine, video: Path, times: int) -> list[Figure]:
    """Kill an RTSP server and start it again; look when frames come back, and which."""
    server = servers.Rtsp(video, FRAMES)
    recording, stop, back_s = Recording(engine), Stop(), []
    how = SourceSettings(read_timeout_s=TIMEOUT_S)
    source = rtsp.open(server.url, how)
    run = Pipeline(recording, [source], StreamSettings(hop=0.1), stop=stop)  # type: ignore[arg-type]
    results = run.results()
    memory = []
    for number in range(times + 1):
        began = time.monotonic()
        for first, result in enumerate(results):
            if result.epoch < number:
                continue
            if not first or len(back_s) < number:
                window_s = result.t_s - result.t_first_s
                back_s.append(time.monotonic() - began - window_s)
            if result.t_s - result.t_first_s and first > 8:
                break
        memory.append(_memory_bytes())
        if number < times:
            server.kill()
            time.sleep(0.5 + 0.1 * (number % 7))  # met at any point of the back-off
            server = servers.Rtsp(video, FRAMES, server.port)
    stop.ask()
    results.close()
    server.kill()
    grown = memory[-1] / memory[len(memory) // 5] - 1
    worst = max(back_s)
    return [
        Figure("reconnect_s", worst, "s", BACK_S, n=times,
               more={"median": float(np.median(back_s)), "memory_growth": grown}),
        Figure("mixed_windows", recording.mixed(), "count", 0, n=len(recording.numbers)),
    ]  # fmt: skip


def _frozen(video: Path, times: int) -> Figure:
    """Freeze an RTSP server; look how long it takes until that is known."""
    took = []
    for _ in range(times):
        with servers.Rtsp(video, FRAMES) as server:
            source, stop = rtsp.open(server.url, SourceSettings(read_timeout_s=TIMEOUT_S)), Stop()
            thread = threading.Thread(target=lambda s=source, e=stop: sum(1 for _ in s.frames(e)))
            thread.start()
            time.sleep(1.5)
            server.frozen.set()
            began = time.monotonic()
            while source.state != REOPENING and time.monotonic() < began + 10:
                time.sleep(0.005)
            took.append(time.monotonic() - began)
            stop.ask()
            server.frozen.clear()
            thread.join()
    more = {"median": float(np.median(took))}
    return Figure("frozen_s", max(took) / TIMEOUT_S, "ratio", FROZEN, n=times, more=more)


def _many(engine: Engine, folder: Path, seconds: float) -> list[Figure]:
    """Serve 16 files of 640x480 in loops at once; count what is lost, and look at the memory."""
    video = videos.write(folder / "numbers.avi", FRAMES, servers.FPS, times=480 // videos.SIZE[0])
    how = SourceSettings(loop=True)
    sources = [file.open(str(video), how) for _ in range(STREAMS)]
    stop = Stop()
    run = Pipeline(engine, sources, stop=stop)
    began, memory, due_s, count = time.monotonic(), [], 0.0, 0
    for _ in run.results():
        count += 1
        gone_s = time.monotonic() - began
        if gone_s > due_s:
            due_s += seconds / 50
            memory.append(_memory_bytes())
        if gone_s > seconds:
            stop.ask()
    tally = run.tally
    lost = tally.windows_dropped + tally.results_dropped + tally.frames_dropped
    settled = memory[len(memory) // 5 :]
    grown = max(settled) / settled[0] - 1
    per_s = count / (time.monotonic() - began)
    fair = [lane.tally.windows for lane in run.lanes]
    return [
        Figure("lost_windows", lost + tally.windows_incomplete, "count", 0, n=count,
               more={"per_second": per_s, "least": min(fair), "most": max(fair)}),
        Figure("memory_growth", grown, "share", GROWTH, n=len(settled),
               more={"seconds": seconds, "mib": settled[-1] / 2**20}),
    ]  # fmt: skip


def _memory_bytes() -> int:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")
