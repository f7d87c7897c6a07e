"""Sinks that send over a network: in order, tried again, and never in the stream's way."""

from __future__ import annotations

import base64
import csv as reader
import json
import logging
import time
from pathlib import Path

import pytest

from tests import servers
from tests.contract.test_sinks import FPS, feed, result, steps
from vmoe.errors import MissingDependencyError, OutputError, SettingError
from vmoe.runtime.guard import Verdict
from vmoe.runtime.sinks import Step, _kept, _sender, csv, mqtt, webhook
from vmoe.runtime.smoothing import Event


def event(kind: str, number: int = 0) -> Event:
    return Event(kind, number, 0, "a.mp4", "shake", 0.75, 1.0, 2.0, 1001.0, 1002.0, 4)


def told(*kinds: str) -> list[Step]:
    return [Step(None, result(), FPS, 0, (event(kind, i),)) for i, kind in enumerate(kinds)]


@pytest.fixture(autouse=True)
def _no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sender, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(_sender, "END_S", 0.3)


def test_a_webhook_gets_starts_and_ends_and_is_tried_again() -> None:
    with servers.hook(503, 503) as (port, taken):
        feed(webhook.open(f"http://me:sesame@127.0.0.1:{port}/x"), told("start", "update", "end"))
    bodies = [json.loads(body) for _, body in taken]
    assert [(b["event"], b["id"]) for b in bodies] == [("start", 0)] * 3 + [("end", 2)]
    assert taken[0][0] == "Basic " + base64.b64encode(b"me:sesame").decode()


def test_a_webhook_that_never_answers_is_counted_and_its_password_is_not_said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vmoe"), "propagate", True)
    url = f"http://me:sesame@127.0.0.1:{servers.free_port()}/services/sesame"
    with pytest.raises(OutputError, match="2 messages never arrived, 0 did") as e:
        feed(webhook.open(url), told("start", "end"))
    assert caplog.text.count("Connection refused. It is tried again.") == 1
    assert "sesame" not in caplog.text + str(e.value)
    with pytest.raises(ZeroDivisionError), webhook.open(url) as sink:  # noqa: PT012
        sink.take(told("start")[0])
        raise ZeroDivisionError


def test_a_slow_peer_delays_nobody_and_what_it_misses_is_counted() -> None:
    sender: _sender.Sender[int] = _sender.Sender("slow", lambda number: time.sleep(0.05))
    sender.start()
    began = time.monotonic()
    for number in range(_sender.WAITING + 50):
        sender.put(number)
    assert time.monotonic() - began < 0.5
    with pytest.raises(OutputError, match="messages never arrived"):
        sender.end()
    sender._thread.join()
    assert sender.dropped >= 49
    assert sender.sent + sender.dropped == _sender.WAITING + 50


@pytest.mark.parametrize("error", [OSError("gone"), ValueError("no number")])
def test_what_never_arrives_is_counted_with_the_sink(error: Exception) -> None:
    def fail(message: object) -> None:
        raise error

    sink = webhook.open("http://127.0.0.1/x")
    sink.sender = _sender.Sender(sink.name, fail)
    with _kept.Kept(sink) as kept:
        for step in told("start", "end"):
            kept.take(step)
    assert kept.missed == 2  # the one that was under way, too
    assert kept.failures >= 2
    assert "2 messages never arrived, 0 did" in str(kept.error)


def test_mqtt_after_an_outage_sends_nothing_twice_and_says_that_it_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("paho.mqtt.client", reason="paho-mqtt is not installed")
    monkeypatch.setattr(_sender, "END_S", 3.0)
    monkeypatch.setattr(mqtt, "ARRIVES_S", 0.1)  # tried again while the broker is away
    with servers.broker(loses=2) as (port, taken):
        sink = mqtt.open(f"mqtt://127.0.0.1:{port}")
        feed(sink, told("start"))
    said = [topic.removeprefix("vmoe/") for topic, _ in taken]
    assert said == ["available", "0/result", "available", "0/result", "0/event", "available"]
    assert [taken[2][1], taken[-1][1]] == [b"online", b"offline"]
    assert sink.sender.failures > 1


def test_mqtt_has_results_events_and_whether_vmoe_is_there() -> None:
    pytest.importorskip("paho.mqtt.client", reason="paho-mqtt is not installed")
    with servers.broker() as (port, taken):
        feed(mqtt.open(f"mqtt://me:sesame@127.0.0.1:{port}/door/1"), told("start", "update"))
    topics = [topic for topic, _ in taken]
    stream = ["door/1/0/result", "door/1/0/event"] * 2
    assert topics == ["door/1/available", *stream, "door/1/available"]
    assert [taken[0][1], taken[-1][1]] == [b"online", b"offline"]
    assert json.loads(taken[1][1])["label"] == "pan-left"
    assert json.loads(taken[4][1])["event"] == "update"


def test_addresses_that_cannot_be_used() -> None:
    for url in ("ftp://me:sesame@x/y", "http://", "x"):
        with pytest.raises(SettingError, match=r"--webhook is .*it is http://HOST/PATH") as e:
            webhook.open(url)
        assert "sesame" not in str(e.value)
    for url in ("http://x", "mqtt://", "mqtt://x/a/#", "mqtt://x:99999/a"):
        with pytest.raises(SettingError, match=r"--mqtt is .*it is mqtt://HOST/TOPIC"):
            mqtt.open(url)


def test_mqtt_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "paho.mqtt.client", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'vmoe\[mqtt\]'"):
        mqtt.open("mqtt://x/y")


def test_csv_has_a_row_for_each_window(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    feed(csv.open(path), steps(10))
    with path.open() as file:
        rows = list(reader.DictReader(file))
    assert [(row["window"], row["label"], row["expert"]) for row in rows] == [
        ("0", "pan-left", "1"),
        ("1", "pan-left", "1"),
    ]
    assert tuple(rows[0]) == csv.COLUMNS
    assert csv.__doc__ is not None
    assert all(column in csv.__doc__ for column in csv.COLUMNS)
    guarded = {**result().__dict__, "guard": Verdict(0.5, True, "flips", "abstain")}
    values = csv._values(type(result())(**guarded))
    assert values[csv.COLUMNS.index("guard_alarm")] is True
    with pytest.raises(SettingError, match=r"a\.csv exists.*--overwrite"):
        csv.open(path)
    with pytest.raises(SettingError, match="is a folder"):
        csv.open(tmp_path)
    feed(csv.open(tmp_path / "none.csv"), steps(3))
    assert (tmp_path / "none.csv").read_text().count("\n") == 1  # the header alone
    with pytest.raises(OutputError, match="cannot write /dev/full: No space left"):
        feed(csv.open(Path("/dev/full"), overwrite=True), steps(5))
