"""MQTT: results and events as JSON (`jsonl.py` has the keys), and whether vmoe is there.

TOPIC/<stream>/result    every window
TOPIC/<stream>/event     every start, update and end
TOPIC/available          online or offline, retained; offline is also the broker's last will
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

from vmoe.errors import MissingDependencyError, SettingError
from vmoe.runtime import addresses

from . import Step
from ._sender import Sender

PORTS = {"mqtt": 1883, "mqtts": 8883}
TOPIC = "vmoe"
KEEP_ALIVE_S = 30
LONGEST_WAIT_S = 10  # between two tries of paho to connect again
ARRIVES_S = 5.0  # within which the broker must confirm a message


def open(url: str) -> Mqtt:
    """Return a sink that publishes to mqtt://USER:PASSWORD@HOST:PORT/TOPIC, or mqtts with TLS.

    Raises:
        SettingError: no such address.
        MissingDependencyError: paho-mqtt is not installed.
    """
    try:
        split = urlsplit(url)
        right = split.scheme in PORTS and split.hostname and split.port != 0
    except ValueError:
        right = False
    if not right or "#" in url or "+" in split.path:  # wildcards
        raise SettingError(
            f"--mqtt is {addresses.shown(url)!r}; it is mqtt://HOST/TOPIC, or mqtts with TLS."
        )
    try:
        import paho.mqtt.client  # noqa: F401
    except ImportError as e:
        raise MissingDependencyError("--mqtt needs paho-mqtt: pip install 'vmoe[mqtt]'.") from e
    return Mqtt(url)


class Mqtt:
    """See `Sink`."""

    wants_frames = False

    def __init__(self, url: str) -> None:
        """Take the address; nothing is connected yet."""
        import paho.mqtt.client as paho
        from paho.mqtt.enums import CallbackAPIVersion

        self.name = addresses.shown(url)
        split = urlsplit(url)
        self._host = split.hostname or ""
        self._port = split.port or PORTS[split.scheme]
        self._topic = split.path.strip("/") or TOPIC
        self._client = paho.Client(CallbackAPIVersion.VERSION2)
        if split.username:
            self._client.username_pw_set(unquote(split.username), unquote(split.password or ""))
        if split.scheme == "mqtts":
            self._client.tls_set()
        self._client.will_set(f"{self._topic}/available", "offline", qos=1, retain=True)
        self._there = threading.Event()  # set while the broker is
        self._client.reconnect_delay_set(1, LONGEST_WAIT_S)
        self._client.on_connect = self._connected
        self._client.on_disconnect = lambda *_: self._there.clear()
        self._begun = False
        self._flying: paho.MQTTMessageInfo | None = None  # the message that is under way
        self.sender: Sender[tuple[str, dict[str, Any]]] = Sender(self.name, self._publish)

    def take(self, step: Step) -> None:
        """Publish the result and the events of a step."""
        place = f"{self._topic}/{step.stream}"
        if step.result is not None:
            self.sender.put((f"{place}/result", step.result.to_json()))
        for event in step.events:
            self.sender.put((f"{place}/event", event.to_json()))

    def _publish(self, message: tuple[str, dict[str, Any]]) -> None:
        """Send one message, and wait until the broker has it."""
        from paho.mqtt.client import MQTT_ERR_NO_CONN, MQTT_ERR_SUCCESS

        until_s = time.monotonic() + ARRIVES_S
        if not self._begun:
            self._client.connect(self._host, self._port, KEEP_ALIVE_S)
            self._client.loop_start()  # from now on paho connects again by itself
            self._begun = True
        if not self._there.wait(ARRIVES_S):
            raise OSError("the broker does not answer")
        topic, value = message
        told = self._flying or self._client.publish(topic, json.dumps(value), qos=1)
        if told.rc == MQTT_ERR_NO_CONN:  # it was just lost; paho keeps the message and sends it
            told.rc = MQTT_ERR_SUCCESS
        self._flying = told  # tried again, it is waited for again, not sent twice
        try:
            told.wait_for_publish(max(0.0, until_s - time.monotonic()))
        except (ValueError, RuntimeError) as e:
            self._flying = None
            raise OSError(f"the broker does not take messages ({e})") from e
        if not told.is_published():
            raise OSError("the broker does not answer")
        self._flying = None

    def _connected(self, client: Any, data: Any, flags: Any, reason: Any, more: Any) -> None:
        """Say that vmoe is there, at every connection: the last will said that it is not."""
        if not reason.is_failure:
            client.publish(f"{self._topic}/available", "online", qos=1, retain=True)
            self._there.set()

    def _leave(self) -> None:
        if self._there.is_set():
            gone = self._client.publish(f"{self._topic}/available", "offline", qos=1, retain=True)
            with contextlib.suppress(ValueError, RuntimeError):  # the last will says it, too
                gone.wait_for_publish(1.0)
        self._client.disconnect()
        self._client.loop_stop()

    def __enter__(self) -> Mqtt:
        self.sender.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.sender.end(kind)
        finally:
            if self._begun:
                self._leave()
