"""The live page in a real browser, and its server under viewers who mean it no good."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests import browser, bundles, servers, videos
from tests.contract.test_sinks import result
from vmoe.clips import ClipSpec
from vmoe.errors import SettingError
from vmoe.runtime import Engine, Stream, StreamSettings, load
from vmoe.runtime.frames import Frame
from vmoe.runtime.sinks import Step, _server, page
from vmoe.runtime.sinks.page import Page
from vmoe.runtime.sources._iterator import IteratorSource


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, spec: ClipSpec) -> Iterator[Engine]:
    path = bundles.write(tmp_path_factory.mktemp("b") / "b", spec)
    with load(path, all_parts=True) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def served(engine: Engine) -> Iterator[Page]:
    """Serve two streams of 20 frames a second for as long as the tests of this file last."""
    shown = page.open("127.0.0.1:0")
    ready = threading.Event()

    def endless(red: int) -> Iterator[np.ndarray]:
        for number in range(10_000):
            time.sleep(0.05)
            frame = videos.picture(number % 256)
            frame[..., 0] = red
            yield frame

    sources = [
        IteratorSource(endless(red), live=True, name=name)
        for red, name in ((0, "door <b>1</b>"), (255, "yard"))
    ]
    stream = Stream(engine, *sources, sinks=[shown], settings=StreamSettings(hop=0.2))

    def run() -> None:
        for number, _ in enumerate(stream):
            if number == 3:
                ready.set()

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(20)
    yield shown
    stream.stop()
    thread.join()


def get(served: Page, path: str, host: str | None = None) -> tuple[int, str, bytes]:
    request = urllib.request.Request(f"http://127.0.0.1:{served.port}{path}")
    if host:
        request.add_header("Host", host)
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read()
    except urllib.error.HTTPError as e:
        with e:
            return e.code, e.headers["Content-Type"], e.read()


@pytest.mark.skipif(browser.chromium() is None, reason="no Chromium here to look at the page with")
@pytest.mark.parametrize("width", [1200, 390])
def test_the_page_in_a_browser(served: Page, tmp_path: Path, width: int) -> None:
    with browser.browsing(tmp_path / "profile") as tab:
        tab.open(f"http://127.0.0.1:{served.port}/", width, 1500)
        tab.until("document.querySelectorAll('img').length == 2")
        tab.until("[...document.images].every(image => image.naturalWidth > 0)")
        before = tab.value("document.getElementById('counts').textContent")
        tab.until(f"document.getElementById('counts').textContent != {json.dumps(before)}")
        text = tab.text()
        for said in ("vmoe live", "door <b>1</b>", "yard", "running", "waving", "expert 0",
                     "expert 2", "capture to label", "p95", "Guard".upper()):  # fmt: skip
            assert said in text, text
        assert "connection is lost" not in text
        assert tab.value("document.documentElement.scrollWidth") <= width
        tab.screenshot(tmp_path / "page.png")
        places = tab.value(
            "[...document.images].map(i => i.getBoundingClientRect()).map(r => [r.x, r.y, r.width,"
            " r.height])"
        )
    picture = cv2.imread(str(tmp_path / "page.png"))
    for (x, y, w, h), red in zip(places, (0, 255), strict=True):
        seen = picture[round(y + 0.6 * h) : round(y + 0.9 * h), round(x) : round(x + w)]
        assert abs(seen[..., 2].mean() - red) < 40  # each stream's own picture


def test_frames_state_and_health(served: Page) -> None:
    code, kind, data = get(served, "/frame/1.jpg")
    assert (code, kind) == (200, "image/jpeg")
    assert cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR).shape[1] == 512
    code, kind, data = get(served, "/state.json")
    state = json.loads(data)
    assert [s["source"] for s in state["streams"]] == ["door <b>1</b>", "yard"]
    assert {one[2] for one in state["streams"][1]["timeline"]} == {2}
    code, kind, data = get(served, "/healthz")
    assert (code, json.loads(data)["status"]) == (200, "ok")
    for path in ("/frame/2.jpg", "/etc/passwd", "/../page.py", "/stream/x.mjpg"):
        assert get(served, path)[0] == 404


def test_metrics_as_prometheus_reads_them(served: Page) -> None:
    parser = pytest.importorskip("prometheus_client.parser", reason="no prometheus-client here")
    code, _, data = get(served, "/metrics")
    assert code == 200
    families = {f.name: f for f in parser.text_string_to_metric_families(data.decode())}
    frames = {s.labels["source"]: s.value for s in families["vmoe_frames"].samples}
    assert frames.keys() == {"door <b>1</b>", "yard"}
    assert all(value > 3 for value in frames.values())
    states = families["vmoe_source_state"].samples
    assert [s.labels["state"] for s in states if s.value] == ["running"] * 2
    quantiles = families["vmoe_latency_seconds"].samples
    assert {s.labels["stage"] for s in quantiles} >= {"age", "label_age", "infer", "decode"}
    assert families["vmoe_first_label_seconds"].samples[0].value > 0


def test_a_page_of_the_web_cannot_read_it(served: Page) -> None:
    assert get(served, "/state.json", host="evil.example:80")[0] == 403
    for host in ("localhost:1", "127.0.0.1", "[::1]:80"):
        assert get(served, "/healthz", host=host)[0] == 200


def test_viewers_are_capped_and_who_reads_nothing_harms_nobody(served: Page) -> None:
    """A nasty viewer: 200 connections that ask for the stream and read nothing."""
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            with contextlib.suppress(OSError):
                one = stack.enter_context(
                    socket.create_connection(("127.0.0.1", served.port), timeout=1)
                )
                one.sendall(b"GET /stream/0.mjpg HTTP/1.1\r\nHost: localhost\r\n\r\n")
        before = served.views[0].number
        time.sleep(0.5)
        assert served.views[0].number >= before + 5  # the stream goes on at its own pace
        names = [t.name for t in threading.enumerate()]
        assert sum("process_request_thread" in name for name in names) <= _server.CONNECTIONS
        assert get(served, "/stream/0.mjpg")[0] == 503
    deadline = time.monotonic() + 15
    while get_or_none(served) != 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_who_asks_for_nothing_does_not_keep_others_out(served: Page) -> None:
    with contextlib.ExitStack() as stack:
        for number in range(2 * _server.CONNECTIONS):
            one = stack.enter_context(socket.create_connection(("127.0.0.1", served.port), 5))
            if number % 2:
                one.sendall(b"GET /healthz HT")  # and says no more
        began = time.monotonic()
        assert get(served, "/healthz")[0] == 200
        assert time.monotonic() - began < _server.TIMEOUT_S / 2
        names = [t.name for t in threading.enumerate()]
        assert sum("process_request_thread" in n for n in names) <= _server.CONNECTIONS + 8


@pytest.mark.skipif(browser.chromium() is None, reason="no Chromium here to look at the page with")
def test_the_page_comes_back_after_a_restart(engine: Engine, tmp_path: Path) -> None:
    """The browser's own reconnection: events and pictures go on with the next run."""
    port = servers.free_port()

    @contextlib.contextmanager
    def running(name: str) -> Iterator[None]:
        given = (videos.picture(i % 256) for i in itertools.count() if not time.sleep(0.05))
        source = IteratorSource(given, live=True, name=name)
        shown = page.open(f"127.0.0.1:{port}")
        stream = Stream(engine, source, sinks=[shown])
        thread = threading.Thread(target=lambda: list(stream))
        thread.start()
        try:
            yield
        finally:
            stream.stop()
            thread.join()

    banner = "getComputedStyle(document.getElementById('lost')).display"
    with browser.browsing(tmp_path / "profile") as tab:
        with running("before"):
            time.sleep(0.5)
            tab.open(f"http://127.0.0.1:{port}/", 800, 900)
            tab.until("document.body.innerText.includes('before')")
            assert tab.value(banner) == "none"
        tab.until(f"{banner} == 'block'")
        with running("after"):
            tab.until("document.body.innerText.includes('after')")
            tab.until(f"{banner} == 'none'")
            tab.until("document.images[0].src.includes('?t=')")
            tab.until("document.images[0].naturalWidth > 0")


def get_or_none(served: Page) -> int | None:
    """Return the code of a stream that is opened and left."""
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=5)
    try:
        connection.request("GET", "/stream/0.mjpg")
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def test_a_slow_viewer_gets_the_newest_frame() -> None:
    view = page.View()
    for number in range(5):
        view.take(Step(Frame(videos.picture(number), 0.0, number, 0, 0.0, 0.0), result(), 20.0))
    number, jpeg = view.next_jpeg(1, 1.0)
    assert number == 5
    assert view.jpeg()[1] is jpeg  # encoded once
    assert view.next_jpeg(5, 0.01)[0] == 5


def test_vmoe_run_serves_it_until_it_is_ended(engine: Engine, tmp_path: Path) -> None:
    code = "from vmoe.runtime.cli import main; main(prog_name='vmoe-run')"
    command = [sys.executable, "-c", code, str(engine.bundle.path), "--source", "test", "--json",
               "--page", "127.0.0.1:0", "--metrics", "127.0.0.1:0"]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    assert process.stdout is not None
    found = {}
    while len(found) < 2:
        line = process.stderr.readline()
        assert line, "it ended"
        kind, _, url = line.strip().partition(": ")
        found |= {kind: url} if kind in ("page", "metrics") else {}
    process.stdout.readline()
    with urllib.request.urlopen(found["page"], timeout=5) as answer:
        assert "vmoe live" in answer.read().decode()
    root = found["metrics"].removesuffix("metrics")
    with urllib.request.urlopen(root + "healthz", timeout=5) as answer:
        assert json.loads(answer.read())["sources"] == {"test": "running"}
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(root, timeout=5)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert "Traceback" not in err


def test_it_listens_on_this_machine_alone_unless_told(served: Page) -> None:
    assert page.open().host == "127.0.0.1"
    assert page.open("9000").host == "127.0.0.1"
    assert (page.open("0.0.0.0:9000").host, page.open("[::1]:9000").host) == ("0.0.0.0", "::1")
    for wrong in ("x", "host:", "1.2.3.4:99999", "http://x"):
        with pytest.raises(SettingError, match=r"--page is .*it is HOST:PORT"):
            page.open(wrong)
    with pytest.raises(SettingError, match=rf"--page 127\.0\.0\.1:{served.port}: Address already"):
        page.open(f"127.0.0.1:{served.port}").__enter__()
