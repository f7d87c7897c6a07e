"""Live sources against real servers on loopback; which frame is which is read from its pixels."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests import servers, videos
from vmoe import opencv
from vmoe.errors import SourceError
from vmoe.runtime import addresses, sources
from vmoe.runtime.frames import Frame, Stop
from vmoe.runtime.sources import (
    ENDED,
    OPENING,
    REOPENING,
    RUNNING,
    STALLED,
    SourceSettings,
    _live,
    http,
    udp,
)
from vmoe.runtime.sources._iterator import IteratorSource
from vmoe.runtime.sources._live import Shot
from vmoe.runtime.sources.stdin import StdinSource

FRAMES = 60


@pytest.fixture(scope="module")
def ts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return videos.write(tmp_path_factory.mktemp("ts") / "a.ts", FRAMES, servers.FPS)


def numbers(frames: list[Frame]) -> list[int]:
    return [videos.number_of(frame.pixels) for frame in frames]


class Watched:
    """Reads a source in a thread; notes every state that it is seen in."""

    def __init__(self, source: sources.Source) -> None:
        self.source, self.stop = source, Stop()
        self.frames: list[Frame] = []
        self.states = [source.state]
        self.error: SourceError | None = None
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        try:
            for frame in self.source.frames(self.stop):
                self.frames.append(frame)
        except SourceError as e:
            self.error = e

    def until(self, count: int | None = None, state: str | None = None) -> float:
        """Wait for so many frames, or for a state; return how long that took, in seconds."""
        began = time.monotonic()
        while time.monotonic() < began + 15:
            if self.source.state != self.states[-1]:
                self.states.append(self.source.state)
            if self.source.state == state or (count and len(self.frames) >= count):
                return time.monotonic() - began
            time.sleep(0.005)
        raise AssertionError(f"{len(self.frames)} frames, {self.states}, {self.error}")

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop.ask()
        self._thread.join()


def test_rtsp_is_reopened_in_a_new_epoch_when_its_server_is_killed(ts: Path) -> None:
    server = servers.Rtsp(ts, FRAMES)
    source = sources.open(server.url, SourceSettings(read_timeout_s=1.0))
    try:
        with Watched(source) as seen:
            counts = [0]
            for _ in range(3):
                seen.until(count=counts[-1] + 8)
                server.kill()
                seen.until(state=REOPENING)
                counts.append(len(seen.frames))
                time.sleep(0.4)
                server = servers.Rtsp(ts, FRAMES, server.port)
            seen.until(count=counts[-1] + 3)
    finally:
        server.kill()
    for epoch, (first, after) in enumerate(itertools.pairwise([*counts, counts[-1] + 3])):
        part = seen.frames[first:after]
        assert len({frame.epoch for frame in part}) == 1
        assert numbers(part) == list(range(len(part))), epoch  # from the server's first frame on
    assert len({frame.epoch for frame in seen.frames}) == 4
    assert [f.sequence for f in seen.frames] == list(range(len(seen.frames)))
    assert all(b.t_s > a.t_s for a, b in itertools.pairwise(seen.frames))
    order = [RUNNING, REOPENING] * 3 + [RUNNING]
    assert [s for s in seen.states if s != STALLED] == [OPENING, *order]
    assert source.state == ENDED
    assert seen.error is None


@pytest.mark.skipif(not servers.has_gstreamer(), reason="no GStreamer RTSP server here")
@pytest.mark.parametrize("transport", ["tcp", "udp"])
def test_h264_of_gstreamers_rtsp_server(tmp_path: Path, transport: str) -> None:
    """What is usual in cameras: true times, though the first frames come at once; reconnects."""
    video, port = videos.write(tmp_path / "n.avi", 100, 20.0), servers.free_port()
    how = SourceSettings(read_timeout_s=1.0, rtsp_transport=transport)
    with contextlib.ExitStack() as stack:
        with servers.gstreamer(video, port) as url:
            seen = stack.enter_context(Watched(sources.open(url, how)))
            seen.until(count=30)
        seen.until(state=REOPENING)
        before = len(seen.frames)
        stack.enter_context(servers.gstreamer(video, port))
        seen.until(count=before + 10)
    for first, after in ((0, 30), (before, before + 10)):
        part = seen.frames[first:after]
        assert numbers(part) == list(range(len(part)))
        assert len({frame.epoch for frame in part}) == 1
        apart = np.diff([frame.t_s for frame in part])
        assert apart[2:] == pytest.approx(0.05, abs=0.002)
    assert seen.frames[before].epoch == seen.frames[0].epoch + 1


def test_a_frozen_server_is_found_out_within_twice_the_read_timeout(ts: Path) -> None:
    with servers.Rtsp(ts, FRAMES) as server:
        source = sources.open(server.url, SourceSettings(read_timeout_s=0.6))
        with Watched(source) as seen:
            seen.until(count=10)
            server.frozen.set()
            took_s = seen.until(state=REOPENING)
            before = len(seen.frames)
            server.frozen.clear()
            seen.until(count=before + 5)
    assert took_s < 2 * 0.6 + 0.3  # 0.3 s of frames were still on their way
    assert STALLED in seen.states
    assert numbers(seen.frames[:before]) == list(range(before))
    assert numbers(seen.frames[before : before + 5]) == list(range(5))
    assert seen.frames[before].epoch == seen.frames[0].epoch + 1


def test_only_connections_that_gave_a_frame_are_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_live, "FIRST_WAIT_S", 0.01)
    given = [1, 0, 0, 2]  # frames of each connection

    class Shaky(_live.LiveSource):
        def _shots(self, stop: Stop) -> Iterator[_live.Shot]:
            for i in range(given.pop(0)):
                yield _live.Shot(videos.picture(i), i / 10, time.monotonic(), 1.0)

        def _why_missing(self) -> str | None:
            return None

    frames = Shaky("x", SourceSettings(reconnect=5)).frames(Stop())
    assert [frame.epoch for frame in itertools.islice(frames, 3)] == [0, 1, 1]
    frames.close()


def test_a_stream_that_is_lost_for_good_is_an_error_without_its_password(ts: Path) -> None:
    server = servers.Rtsp(ts, FRAMES)
    settings = SourceSettings(read_timeout_s=1.0, reconnect=1)
    with Watched(sources.open(server.url, settings)) as seen:
        seen.until(count=5)
        server.kill()
        seen.until(state=ENDED)
    said = str(seen.error)
    assert f"rtsp://viewer:***@127.0.0.1:{server.port}/live was lost after" in said
    assert "1 tries to reopen it failed" in said
    assert "sesame" not in said


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("rtsp://u:sesame@127.0.0.1:1/x", "127.0.0.1 port 1: Connection refused"),
        ("http://u:sesame@no.invalid/x?token=sesame", "the host no.invalid is not known"),
        ("rtsp://:99999/x", "Write scheme://user:password@host:port/path"),
        ("rtsp://admin:ses/ame@cam/1", "its port is no number. Write scheme://"),
        ("rtsp://cam..local/1", r"the host cam\.\.local is not known"),
    ],
)
def test_why_an_address_cannot_be_opened(address: str, why: str) -> None:
    with pytest.raises(SourceError, match=why) as e:
        list(sources.open(address).frames(Stop()))
    assert "sesame" not in str(e.value)
    assert "ses" not in str(e.value)  # nor half of one


def test_a_server_without_video_says_so(tmp_path: Path) -> None:
    with servers.http(tmp_path) as root, pytest.raises(SourceError, match="answers, but gives no"):
        list(sources.open(f"{root}/no.mp4").frames(Stop()))


def test_several_sources_wait_for_one_that_is_not_there_yet(ts: Path) -> None:
    port = servers.free_port()
    source = sources.open(f"rtsp://127.0.0.1:{port}/live", SourceSettings(patient=True))
    with Watched(source) as seen:
        seen.until(state=REOPENING)
        with servers.Rtsp(ts, FRAMES, port):
            seen.until(count=3)
    assert numbers(seen.frames)[:3] == [0, 1, 2]


def test_a_file_by_http_is_no_live_stream(ts: Path, tmp_path: Path) -> None:
    whole = videos.cut(videos.write(tmp_path / "a.mp4", FRAMES, 20.0), 1.0)
    with servers.http(tmp_path) as root:
        source = sources.open(f"{root}/{whole.name}")
        assert numbers(list(source.frames(Stop()))) == list(range(FRAMES))
        assert not source.live
        videos.cut(tmp_path / "a.mp4", 0.6)
        with pytest.raises(SourceError, match=r"breaks off: \d+ of 60 frames"):
            list(sources.open(f"{root}/{whole.name}").frames(Stop()))


def test_hls_that_has_an_end_is_read_to_it(ts: Path, tmp_path: Path) -> None:
    for part in range(2):
        videos.write(tmp_path / f"{part}.ts", 20, 20.0, first=20 * part)
    lines = ["#EXTM3U", "#EXT-X-VERSION:3", "#EXT-X-TARGETDURATION:1"]
    for part in range(2):
        lines += [*(["#EXT-X-DISCONTINUITY"] * part), "#EXTINF:1.0,", f"{part}.ts"]
    (tmp_path / "a.m3u8").write_text("\n".join([*lines, "#EXT-X-ENDLIST", ""]))
    with servers.http(tmp_path) as root:
        source = sources.open(f"{root}/a.m3u8")
        got = list(source.frames(Stop()))
    assert not source.live
    assert numbers(got)[:20] == list(range(20))
    assert numbers(got)[-1] == 39


def test_live_hls_is_given_at_its_own_pace(tmp_path: Path) -> None:
    """Pieces last longer than the read timeout; what FFmpeg reads at once is not dropped."""
    video = videos.write(tmp_path / "n.ts", 120, servers.FPS)
    with servers.live_hls(tmp_path, video, 120) as url:
        source = sources.open(url, SourceSettings(read_timeout_s=0.7))
        with Watched(source) as seen:
            seen.until(count=80)
    got = seen.frames[:80]
    assert source.live
    assert numbers(got) == list(range(80))
    assert {frame.epoch for frame in got} == {0}
    arrived = np.array([frame.arrived_s for frame in got])
    assert np.median(np.diff(arrived)) == pytest.approx(0.05, abs=0.01)
    assert arrived[-1] - arrived[0] > 0.9 * 79 / 20


@pytest.mark.parametrize("jump_s", [3.0, 5000.0, -5000.0])
def test_the_pace_goes_on_where_the_times_of_hls_jump(
    monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    now = [100.0]
    monkeypatch.setattr(http, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def sleep(seconds: float, stop: Stop) -> None:
        now[0] += max(0.0, seconds)

    monkeypatch.setattr(http, "sleep", sleep)
    pixels = np.zeros((1, 1, 3), np.uint8)
    times = [i / 20 + (jump_s if i >= 20 else 0.0) for i in range(40)]
    shots = (Shot(pixels, at_s, 100.0, 0.0) for at_s in times)  # all are there at once
    given = [shot.arrived_s for shot in http._paced(shots, Stop())]
    apart = np.diff(given)
    assert np.delete(apart, 19) == pytest.approx(1 / 20)
    assert apart[19] == pytest.approx(1 / 20 if jump_s > 0 else 0)
    assert now[0] - 100 < 2


def test_mjpeg_is_stamped_as_it_arrives() -> None:
    with servers.http() as root:
        source = sources.open(root + "/cam", SourceSettings(reconnect=0))
        got = list(itertools.islice(source.frames(Stop()), 20))
    assert source.live
    assert numbers(got) == list(range(20))
    apart = np.diff([frame.t_s for frame in got])
    assert 0.04 < np.median(apart) < 0.08  # FFmpeg would say 0.04, whatever the camera does


def test_udp(ts: Path) -> None:
    port = servers.free_port()
    source = sources.open(f"udp://127.0.0.1:{port}", SourceSettings(read_timeout_s=0.5))
    with Watched(source) as seen, servers.udp(ts, FRAMES, port) as silent:
        seen.until(count=10)
        while not in_order(numbers(seen.frames)):  # joined midway, it may begin with half pictures
            seen.until(count=len(seen.frames) + 5)
        listening = [
            line.split()[1]
            for name in ("udp", "udp6")
            for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
        ]
        silent.set()
        seen.until(state=REOPENING)
        seen.stop.ask()
    here = [where for where in listening if where.endswith(f":{port:04X}")]
    assert here == [f"0100007F:{port:04X}"]  # 127.0.0.1 and no other


def in_order(got: list[int]) -> bool:
    """Return whether ten numbers stand there that follow each other."""
    return any(got[i : i + 10] == list(range(n, n + 10)) for i, n in enumerate(got))


def test_udp_is_bound_to_its_host_alone() -> None:
    for given, bound in (
        ("udp://10.0.0.7:5000?fifo_size=9", "udp://10.0.0.7:5000?fifo_size=9&localaddr=10.0.0.7"),
        ("udp://[::1]:5000", "udp://[::1]:5000?localaddr=::1"),
        ("udp://239.0.0.1:5000", "udp://239.0.0.1:5000"),
        ("udp://@:5000", "udp://@:5000"),
        ("udp://10.0.0.7:5000?localaddr=10.0.0.8", "udp://10.0.0.7:5000?localaddr=10.0.0.8"),
    ):
        assert udp.bound(given) == bound


# --- stdin, pictures, a program's own frames ----------------------------------------------------


@pytest.fixture
def piped() -> Iterator[tuple[int, io.FileIO]]:
    out, into = os.pipe()
    writer = io.FileIO(into, "w")
    yield out, writer
    writer.close()
    os.close(out)


def fill(writer: io.FileIO, data: bytes) -> threading.Thread:
    def write() -> None:
        left = data
        while left:
            left = left[writer.write(left) or 0 :]
        writer.close()

    thread = threading.Thread(target=write)
    thread.start()
    return thread


def test_a_container_on_stdin(piped: tuple[int, io.FileIO], ts: Path) -> None:
    thread = fill(piped[1], ts.read_bytes())
    got = list(StdinSource(piped[0], SourceSettings()).frames(Stop()))
    thread.join()
    assert numbers(got) == list(range(FRAMES))
    np.testing.assert_allclose([f.t_s for f in got], np.arange(FRAMES) / 20, atol=0.002)


def test_raw_frames_on_stdin(piped: tuple[int, io.FileIO]) -> None:
    data = b"".join(videos.picture(i).tobytes() for i in range(5))
    thread = fill(piped[1], data + b"rest")
    got = []
    settings = SourceSettings(raw=videos.SIZE[::-1], fps=20.0)
    with pytest.raises(SourceError, match="4 bytes are left after 5 frames of 128x96"):  # noqa: PT012
        for frame in StdinSource(piped[0], settings).frames(Stop()):
            got.append(frame)
    thread.join()
    assert numbers(got) == list(range(5))
    assert [f.t_s for f in got] == [0.0, 0.05, 0.1, 0.15, 0.2]


@pytest.mark.parametrize("raw", [None, videos.SIZE])
def test_silent_stdin_can_be_left(
    piped: tuple[int, io.FileIO], raw: tuple[int, int] | None
) -> None:
    with Watched(StdinSource(piped[0], SourceSettings(raw=raw))) as seen:
        time.sleep(0.1)
    assert seen.frames == []
    assert seen.error is None


def test_garbage_on_stdin(piped: tuple[int, io.FileIO]) -> None:
    thread = fill(piped[1], np.random.default_rng(0).bytes(20000))
    with pytest.raises(SourceError, match="source -: no video that can be decoded"):
        list(StdinSource(piped[0], SourceSettings()).frames(Stop()))
    thread.join()


def test_nothing_piped_in_is_said() -> None:
    code = "from vmoe.runtime import sources; sources.open('-')"
    done = subprocess.run(
        ["sh", "-c", f'"$0" -c "{code}" <&-', sys.executable], capture_output=True, text=True
    )
    assert "source -: nothing is piped in" in done.stderr


def test_pictures_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    cv2 = opencv.quiet()
    for number in range(12):
        bgr = cv2.cvtColor(videos.picture(number), cv2.COLOR_RGB2BGR)
        cv2.imwrite(str(tmp_path / f"{number}.png"), bgr)
    (tmp_path / "notes.txt").write_text("no picture")
    source = sources.open(str(tmp_path), SourceSettings(fps=5.0))
    got = list(source.frames(Stop()))
    assert numbers(got) == list(range(12))
    assert got[-1].t_s == pytest.approx(11 / 5)
    assert (source.live, source.state) == (False, ENDED)
    some = sources.open(str(tmp_path / "1*.png"), SourceSettings(loop=True))
    again = list(itertools.islice(some.frames(Stop()), 4))
    assert numbers(again) == [1, 10, 11, 1]
    assert [f.epoch for f in again] == [0, 0, 0, 1]
    with pytest.raises(SourceError, match="names no pictures"):
        sources.open(str(tmp_path / "2*.jpg"))
    (tmp_path / "3.png").write_bytes(b"broken")
    with pytest.raises(SourceError, match=r"3\.png is no picture that can be decoded"):
        list(sources.open(str(tmp_path)).frames(Stop()))


def test_frames_of_a_program() -> None:
    given = [videos.picture(i) for i in range(5)]
    got = list(IteratorSource(given, fps=20.0).frames(Stop()))
    assert numbers(got) == list(range(5))
    assert got[-1].t_s == pytest.approx(0.2)
    same = np.zeros((8, 8, 3), np.uint8)
    reused = (same for i in range(3) if same.fill(i) is None)  # one array, filled again
    frames = list(IteratorSource(reused).frames(Stop()))
    assert [int(frame.pixels[0, 0, 0]) for frame in frames] == [0, 1, 2]
    (own,) = IteratorSource([same], copy=False).frames(Stop())
    assert own.pixels is same
    timed = list(IteratorSource([(3.5, given[0]), (4.5, given[1])]).frames(Stop()))
    assert [frame.t_s for frame in timed] == [3.5, 4.5]
    back = [(1.0, given[0]), (2.0, given[1]), (0.0, given[2]), (1.0, given[3])]
    assert [frame.epoch for frame in IteratorSource(back).frames(Stop())] == [0, 0, 1, 1]
    for wrong, said in ((np.zeros((4, 4, 3)), r"frame 0 is float64 \[4, 4, 3\]"), ("x", "is str")):
        with pytest.raises(SourceError, match=said):
            list(IteratorSource([wrong]).frames(Stop()))  # type: ignore[list-item]


# --- passwords ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("rtsp://admin:pa:ss@cam.local:554/1", "rtsp://admin:***@cam.local:554/1"),
        ("rtsp://admin:p@ss@cam.local/1", "rtsp://admin:***@cam.local/1"),
        ("rtsp://admin:p/a@cam.local/1", "rtsp://admin:***@cam.local/1"),
        ("rtsp://admin:1234/x@cam/1", "rtsp://admin:***@cam/1"),
        ("rtsp://admin:12#34@cam/1", "rtsp://admin:***@cam/1"),
        ("http://cam:8080/live@2x.m3u8", "http://cam:***@2x.m3u8"),  # it may be a password
        ("http://cam:8080/live?mail=a@b", "http://cam:8080/live?mail=a@b"),
        ("rtsp://h/user=admin_password=XYZ_channel=1.sdp", "rtsp://h/user=admin_password=***"),
        ("http://h/v?loginuse=admin&loginpas=8888", "http://h/v?loginuse=admin&loginpas=***"),
        ("http://cam/a?user=me&password=x&q=1", "http://cam/a?user=me&password=***&q=1"),
        ("https://cam/a?access_token=x#t", "https://cam/a?access_token=***#t"),
        ("rtsp://admin@cam/1", "rtsp://admin@cam/1"),
        ("udp://@:5000", "udp://@:5000"),
        ("a:b@c.mp4", "a:b@c.mp4"),
    ],
)
def test_passwords_are_not_shown(address: str, shown: str) -> None:
    assert addresses.shown(address) == shown
