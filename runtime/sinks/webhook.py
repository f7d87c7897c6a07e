"""A webhook: every start and end of an event is POSTed as JSON (`jsonl.py` has the keys)."""

from __future__ import annotations

import base64
import http.client
import json
import urllib.error
import urllib.request
from types import TracebackType
from urllib.parse import unquote, urlsplit, urlunsplit

import vmoe
from vmoe.errors import SettingError
from vmoe.runtime import addresses
from vmoe.runtime.smoothing import UPDATE, Event

from . import Step
from ._sender import Sender

TIMEOUT_S = 5.0


def open(url: str) -> Webhook:
    """Return a sink that POSTs events; user and password in the address are sent as Basic.

    Raises:
        SettingError: no HTTP address.
    """
    try:
        split = urlsplit(url)
        right = split.scheme in ("http", "https") and split.hostname and split.port != 0
    except ValueError:
        right = False
    if not right:
        raise SettingError(
            f"--webhook is {addresses.shown(url)!r}; it is http://HOST/PATH or https://HOST/PATH."
        )
    return Webhook(url)


class Webhook:
    """See `Sink`."""

    wants_frames = False

    def __init__(self, url: str) -> None:
        """Take the address."""
        split = urlsplit(url)
        netloc = split.netloc.rpartition("@")[2]
        self.name = f"{split.scheme}://{netloc}"  # a webhook's path is often its token
        self._url = urlunsplit(split._replace(netloc=netloc))
        self._headers = {
            "Content-Type": "application/json",
            "User-Agent": f"vmoe-run/{vmoe.__version__}",
        }
        if split.username:
            pair = f"{unquote(split.username)}:{unquote(split.password or '')}"
            self._headers["Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
        self.sender: Sender[Event] = Sender(self.name, self._post)

    def take(self, step: Step) -> None:
        """Post starts and ends."""
        for event in step.events:
            if event.kind != UPDATE:
                self.sender.put(event)

    def _post(self, event: Event) -> None:
        data = json.dumps(event.to_json()).encode()
        request = urllib.request.Request(self._url, data, self._headers, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                answer.read()
        except urllib.error.HTTPError as e:
            e.close()
            raise OSError(f"it answers {e.code} {e.reason}") from e
        except urllib.error.URLError as e:
            raise OSError(str(getattr(e.reason, "strerror", None) or e.reason)) from e
        except http.client.HTTPException as e:
            raise OSError(f"it does not answer as HTTP does ({type(e).__name__})") from e

    def __enter__(self) -> Webhook:
        self.sender.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.sender.end(kind)
