"""Triton Inference Server: the graphs run on another machine, or on many behind one address.

The server has the bundle's parts (`vmoe-export BUNDLE --triton-repo DIR`); what is read of the
bundle here is its manifest. A clip crosses the network once: the server routes it
(runtime/served.py). What a stream knows stays here, so that any server may answer its next window,
and one that is restarted has lost nothing: requests are repeated until it is back.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from vmoe import bundle as bundles
from vmoe.bundle import Bundle, Part
from vmoe.clips import Clips
from vmoe.errors import EngineMismatchError, ServerError, SettingError
from vmoe.runtime import served as names

from . import SERVER, BackendSettings, Outputs, Run
from ._kserve import Arrays, AwayError, Client, RefusedError, address, connect

log = logging.getLogger("vmoe")
T = TypeVar("T")

FORMATS = (SERVER,)
DEVICES = ("cpu", "cuda")  # the server's, whichever they are
TIMEOUT_S = 10.0  # for one answer; a server that freezes is away
PATIENCE_S = 60.0  # for a server that was there before
PAUSES_S = (0.05, 1.0)  # between two tries, the first and the longest
POLL_S = 0.1


def why_unavailable() -> None:
    """Return None: it runs wherever there is a network."""


def served(bundle: Bundle) -> Bundle:
    """Return a bundle as the server answers it."""
    return names.whole(bundle)


def open(settings: BackendSettings) -> Triton:
    """Open the backend; nothing is asked yet.

    Raises:
        SettingError: no server is named, or by what is no address.
        MissingDependencyError: gRPC's client is not installed.
    """
    return Triton(settings)


class Triton:
    """A bundle on a server.

    Attributes:
        retries: requests that were repeated because the server was away.
    """

    def __init__(self, settings: BackendSettings) -> None:
        """Take the address; nothing is asked yet."""
        if settings.server is None:
            raise SettingError(
                "backend triton needs the server's address: --server HOST:PORT "
                "(vmoe-export BUNDLE --triton-repo DIR writes what it serves)."
            )
        self._bundle = settings.bundle or bundles.read(settings.folder)
        self._version = names.version(self._bundle)
        self._place = address(settings.server)
        self._stopping = settings.stopping
        self._known = False  # whether it ever answered
        self._lock = threading.Lock()
        self._own = threading.local()
        self._clients: list[Client] = []
        self._client()
        self.retries = 0

    def load(self, part: Part) -> Run:
        """Ask the server for one part, and for the shapes that it takes.

        Raises:
            ServerError: nobody answers.
            EngineMismatchError: it serves no such part of this bundle.
        """
        name = self._name(part)
        model = names.model(self._bundle, name)
        try:
            config = self._ask(lambda client: client.config(model, self._version))
            most = self._most(config, part)
        except RefusedError as e:
            raise EngineMismatchError(
                f"{self._place} does not serve {name} of {self._bundle.path}, model {model} in "
                f"version {self._version}: {e}. Serve what vmoe-export {self._bundle.path} "
                "--triton-repo DIR writes."
            ) from e
        outputs = [port.name for port in part.outputs]

        def run(inputs: Mapping[str, Any]) -> Outputs:
            n = len(inputs["clip"])
            given = {key: _rows(np.asarray(value), n) for key, value in inputs.items()}
            found = []
            for start in range(0, n, most):
                some = {key: value[start : start + most] for key, value in given.items()}
                found.append(self._run(model, some, outputs, part))
            joined = {name: np.concatenate([one[name] for one in found]) for name in outputs}
            return {port.name: _shaped(joined[port.name], len(port.shape)) for port in part.outputs}

        return run

    def _name(self, part: Part) -> str:
        parts = self.served.parts
        return next(name for name, of in parts.items() if of.file == part.file)

    def _most(self, config: Mapping[str, Any], part: Part) -> int:
        """Return how many clips one request may hold; refuse other ports than the manifest's."""
        has = {port["name"] for key in ("input", "output") for port in config.get(key, ())}
        wanted = {port.name for port in (*part.inputs, *part.outputs)}
        if not wanted <= has or not int(config.get("max_batch_size", 0)):
            raise RefusedError(f"it has {', '.join(sorted(has)) or 'nothing'}, and batches of none")
        return int(config["max_batch_size"])

    def _run(self, model: str, inputs: Arrays, outputs: list[str], part: Part) -> Arrays:
        try:
            return self._ask(lambda c: c.infer(model, self._version, inputs, outputs))
        except RefusedError as e:
            raise EngineMismatchError(f"{part.file} does not run on {self._place}: {e}.") from e

    def _ask(self, call: Callable[[Client], T]) -> T:
        """Ask the server; one that was there before and is away is asked until it is back.

        Raises:
            ServerError: it does not come back, or never was there.
            RefusedError: it answers that it will not.
        """
        since_s: float | None = None
        pause_s = PAUSES_S[0]
        while True:
            try:
                answer = call(self._client())
            except AwayError as e:
                now_s = time.monotonic()
                if not self._known:
                    raise ServerError(
                        f"no Triton server answers at {self._place} ({e}). Start it: tritonserver "
                        "--model-repository DIR; or run here: --backend auto, without --server."
                    ) from e
                if since_s is None:
                    since_s = now_s
                    log.warning("%s is away (%s); trying again.", self._place, e)
                if now_s - since_s >= PATIENCE_S or self._stopping():
                    raise ServerError(
                        f"{self._place} was lost {now_s - since_s:.0f} s ago ({e}). Start it again."
                    ) from e
                with self._lock:
                    self.retries += 1
                self._wait(pause_s)
                pause_s = min(2 * pause_s, PAUSES_S[1])
            else:
                self._known = True
                if since_s is not None:
                    log.warning("%s is back after %.1f s.", self._place, time.monotonic() - since_s)
                return answer

    def _wait(self, pause_s: float) -> None:
        until_s = time.monotonic() + pause_s
        while (left_s := until_s - time.monotonic()) > 0 and not self._stopping():
            time.sleep(min(left_s, POLL_S))

    def _client(self) -> Client:
        """Return this thread's own connection."""
        if not hasattr(self._own, "client"):
            self._own.client = connect(self._place, TIMEOUT_S)
            with self._lock:
                self._clients.append(self._own.client)
        client: Client = self._own.client
        return client

    def put(self, clips: Clips) -> Any:
        """Return clips, uint8 [N, T, H, W, 3], as they are: each request takes them along."""
        return np.ascontiguousarray(clips)

    def close(self) -> None:
        """Hang up; a second call does nothing."""
        with self._lock:
            while self._clients:
                self._clients.pop().close()

    @property
    def served(self) -> Bundle:
        """The bundle as the server answers it."""
        return served(self._bundle)


def _rows(value: np.ndarray[Any, Any], n: int) -> np.ndarray[Any, Any]:
    """Return an input with one row for each clip, as Triton wants it: a scalar is repeated."""
    return np.full((n, 1), value) if value.ndim == 0 else value


def _shaped(value: np.ndarray[Any, Any], rank: int) -> np.ndarray[Any, Any]:
    """Return an output of the rank that the manifest says: [N, 1] where it says [N]."""
    return value[:, 0] if value.ndim == rank + 1 else value
