"""One connection to a Triton server, by HTTP or gRPC: the KServe protocol, version 2.

HTTP needs nothing but Python; gRPC is Triton's own client. Neither is for two threads at once.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

import numpy as np
from numpy.typing import NDArray

from vmoe.errors import MissingDependencyError, SettingError
from vmoe.runtime import addresses

Arrays = Mapping[str, NDArray[Any]]
PORTS = {"http": 8000, "https": 443, "grpc": 8001, "grpcs": 443}  # Triton's own, or a proxy's
TYPES = {
    "uint8": "UINT8", "int32": "INT32", "int64": "INT64", "float16": "FP16", "float32": "FP32",
    "bool": "BOOL",
}  # fmt: skip
HEADER = "Inference-Header-Content-Length"  # of a body: so many bytes JSON, then the tensors
OK = 200
AWAY = (429, 502, 503, 504)  # a server that is not ready, or a proxy that reaches none
SILENT = "StatusCode.DEADLINE_EXCEEDED"
HUNG_UP = (ConnectionResetError, BrokenPipeError)


class AwayError(Exception):
    """Nobody answers, or a server that is not ready."""


class RefusedError(Exception):
    """The server answers that it will not."""


@dataclass(frozen=True)
class Address:
    """Where a server is: scheme, host, port, and a path that an HTTP proxy may want before all."""

    scheme: str
    host: str
    port: int
    path: str = ""

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.path}"


def address(text: str) -> Address:
    """Return the address that --server names: HOST:PORT is HTTP.

    Raises:
        SettingError: it names none.
    """
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        port = parts.port
    except ValueError:
        port, parts = None, urlsplit("")
    if parts.scheme not in PORTS or not parts.hostname or parts.query or "@" in parts.netloc:
        raise SettingError(
            f"--server is {_shown(text)!r}; it is HOST:PORT, http://HOST:PORT or grpc://HOST:PORT."
        )
    path = parts.path.rstrip("/")
    if path and parts.scheme.startswith("grpc"):
        raise SettingError(
            f"--server is {_shown(text)!r}; a path is for HTTP: leave it out, or write "
            "http://HOST:PORT/PATH."
        )
    return Address(parts.scheme, parts.hostname, port or PORTS[parts.scheme], path)


def _shown(text: str) -> str:
    """Return a refused address as it may be printed: it may hold a password."""
    mark = "" if "://" in text else "http://"
    return addresses.shown(mark + text).removeprefix(mark)


class Client(Protocol):
    """One connection."""

    def config(self, model: str, version: int) -> dict[str, Any]:
        """Return a model's configuration.

        Raises:
            AwayError: nobody answers.
            RefusedError: there is no such model, or no such version of it.
        """
        ...

    def infer(self, model: str, version: int, inputs: Arrays, outputs: Sequence[str]) -> Arrays:
        """Run a model; return the outputs by name. Raises as `config` does."""
        ...

    def close(self) -> None:
        """Hang up."""
        ...


def connect(place: Address, timeout_s: float) -> Client:
    """Return a connection, which is made when it is first used.

    Raises:
        MissingDependencyError: gRPC needs Triton's client, which is not installed.
    """
    if place.scheme.startswith("http"):
        return _Http(place, timeout_s)
    if importlib.util.find_spec("tritonclient") is None or importlib.util.find_spec("grpc") is None:
        raise MissingDependencyError(
            f"{place} is gRPC, for which tritonclient is not installed: pip install "
            f"'vmoe[server]'. Or use HTTP: --server http://{place.host}:{PORTS['http']}"
        )
    return _Grpc(place, timeout_s)


class _Http:
    def __init__(self, place: Address, timeout_s: float) -> None:
        import http.client  # here: 20 ms, which who runs its graphs itself does not wait for

        plain = place.scheme == "http"
        line = http.client.HTTPConnection if plain else http.client.HTTPSConnection
        self._line = line(place.host, place.port, timeout=timeout_s)
        self._path = place.path

    def config(self, model: str, version: int) -> dict[str, Any]:
        _, body = self._ask("GET", f"{_model(model, version)}/config")
        return _object(body)

    def infer(self, model: str, version: int, inputs: Arrays, outputs: Sequence[str]) -> Arrays:
        raw = {name: np.ascontiguousarray(value) for name, value in inputs.items()}
        said = json.dumps({
            "inputs": [
                {"name": name, "shape": list(value.shape), "datatype": TYPES[str(value.dtype)],
                 "parameters": {"binary_data_size": value.nbytes}}
                for name, value in raw.items()
            ],
            "outputs": [{"name": n, "parameters": {"binary_data": True}} for n in outputs],
        }).encode()  # fmt: skip
        body = b"".join([said, *(value.tobytes() for value in raw.values())])
        headers = {HEADER: str(len(said)), "Content-Type": "application/octet-stream"}
        size, answer = self._ask("POST", f"{_model(model, version)}/infer", body, headers)
        return _tensors(answer, size)

    def close(self) -> None:
        self._line.close()

    def _ask(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] = {}
    ) -> tuple[int | None, bytes]:
        """Ask once; twice where a connection that was kept turns out to have been closed."""
        kept = self._line.sock is not None
        try:
            return self._once(method, path, body, headers)
        except HUNG_UP as e:
            self._line.close()
            if not kept:
                raise AwayError(_why(e)) from e
        return self._ask(method, path, body, headers)

    def _once(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str]
    ) -> tuple[int | None, bytes]:
        from http.client import BadStatusLine, HTTPException

        try:
            self._line.request(method, self._path + path, body, dict(headers))
            response = self._line.getresponse()
            answer = response.read()
        except HUNG_UP:
            raise
        except BadStatusLine as e:
            self._line.close()
            raise RefusedError("it speaks no HTTP; of a gRPC port write grpc://HOST:PORT") from e
        except (OSError, HTTPException) as e:
            self._line.close()
            raise AwayError(_why(e)) from e
        if response.status in AWAY:
            raise AwayError(_error(response.status, answer))
        if response.status != OK:
            raise RefusedError(_error(response.status, answer))
        size = response.getheader(HEADER)
        return (int(size) if size and size.isdigit() else None), answer


def _model(name: str, version: int) -> str:
    return f"/v2/models/{quote(name)}/versions/{version}"


def _tensors(body: bytes, size: int | None) -> Arrays:
    """Return the tensors of an answer: JSON of `size` bytes, and after it their own.

    Raises:
        RefusedError: it is no such answer.
    """
    kinds = {name: kind for kind, name in TYPES.items()}
    try:
        at, found = size or 0, {}
        for of in _object(body[:at])["outputs"]:
            count = of["parameters"]["binary_data_size"]
            value = np.frombuffer(body[at : at + count], kinds[of["datatype"]])
            found[of["name"]] = value.reshape(of["shape"])
            at += count
    except (KeyError, TypeError, ValueError) as e:
        raise RefusedError(f"its answer is no answer of Triton ({type(e).__name__}: {e})") from e
    return found


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise RefusedError("its answer is no answer of Triton")
    return value


def _error(status: int, body: bytes) -> str:
    """Return what Triton says of an error; of a proxy, which says a page, the code alone."""
    try:
        return _line(str(json.loads(body)["error"]))
    except (ValueError, KeyError, TypeError):
        return f"HTTP {status}"


def _line(text: str) -> str:
    """Return the server's words as one line, without what it says of a request's number."""
    text = re.sub(r"\[request id: [^\]]*\] ?", "", text)
    return " ".join(text.split("NOTE:")[0].split()).rstrip(".")[:300]


def _why(e: BaseException) -> str:
    if isinstance(e, TimeoutError):
        return "timed out"
    return (getattr(e, "strerror", None) or str(e) or type(e).__name__).lower()


class _Grpc:
    def __init__(self, place: Address, timeout_s: float) -> None:
        import tritonclient.grpc as grpc

        self._grpc, self._place, self._timeout_s = grpc, place, timeout_s
        self._client = self._dialled()

    def config(self, model: str, version: int) -> dict[str, Any]:
        config = self._asked(self._client.get_model_config, model, str(version), as_json=True)
        return dict(config["config"])

    def infer(self, model: str, version: int, inputs: Arrays, outputs: Sequence[str]) -> Arrays:
        given = []
        for name, value in inputs.items():
            one = self._grpc.InferInput(name, list(value.shape), TYPES[str(value.dtype)])
            given.append(one.set_data_from_numpy(np.ascontiguousarray(value)))
        wanted = [self._grpc.InferRequestedOutput(name) for name in outputs]
        answer = self._asked(self._client.infer, model, given, str(version), outputs=wanted)
        return {name: answer.as_numpy(name) for name in outputs}

    def close(self) -> None:
        self._client.close()

    def _dialled(self) -> Any:
        host = f"[{self._place.host}]" if ":" in self._place.host else self._place.host
        return self._grpc.InferenceServerClient(
            f"{host}:{self._place.port}",
            ssl=self._place.scheme == "grpcs",
            channel_args=[
                ("grpc.max_send_message_length", -1),
                ("grpc.max_receive_message_length", -1),
                # gRPC's own pause between two tries of a connection grows to two minutes
                ("grpc.max_reconnect_backoff_ms", 1000),
                # else a new channel takes over the connection of the one before
                ("grpc.use_local_subchannel_pool", 1),
            ],
        )

    def _asked(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        from tritonclient.utils import InferenceServerException

        try:
            return call(*args, client_timeout=self._timeout_s, **kwargs)
        except InferenceServerException as e:
            said = _line(e.message() or "")
            if e.status() == SILENT:  # gRPC keeps a connection whose other end is gone
                self._client.close()
                self._client = self._dialled()
            if e.status() in (SILENT, "StatusCode.UNAVAILABLE"):
                raise AwayError(said.lower()) from e
            raise RefusedError(said) from e
