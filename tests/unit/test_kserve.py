"""One connection to a Triton server: what is away, and what is refused."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from vmoe.errors import SettingError
from vmoe.runtime.engines import _kserve

SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # HTTP/2: the server's greeting


def test_grpc_dials_again_when_the_other_end_has_gone_silent() -> None:
    grpc = pytest.importorskip("grpc", reason="tritonclient[grpc] is not installed")
    service = pytest.importorskip("tritonclient.grpc.service_pb2_grpc")
    messages = pytest.importorskip("tritonclient.grpc.service_pb2")

    class Servicer(service.GRPCInferenceServiceServicer):
        def ModelConfig(self, request: object, context: object) -> object:  # noqa: N802
            answer = messages.ModelConfigResponse()
            answer.config.max_batch_size = 4
            return answer

    with ThreadPoolExecutor(2) as pool:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            port = listening.getsockname()[1]
            client = _kserve.connect(_kserve.address(f"grpc://127.0.0.1:{port}"), 2)
            asked = pool.submit(client.config, "tiny", 1)
            silent, _ = listening.accept()
        silent.sendall(SETTINGS)
        with pytest.raises(_kserve.AwayError, match="deadline exceeded"):
            asked.result()
        server = grpc.server(pool)
        service.add_GRPCInferenceServiceServicer_to_server(Servicer(), server)
        assert server.add_insecure_port(f"127.0.0.1:{port}") == port
        server.start()
        try:
            assert client.config("tiny", 1)["max_batch_size"] == 4
        finally:
            client.close()
            server.stop(None).wait()
            silent.close()


@contextlib.contextmanager
def proxy(status: int, body: bytes) -> Iterator[str]:
    """Answer one request so, whatever it is; yield the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        thread.join()


PAGE = b"<html><h1>Bad Gateway</h1></html>"


@pytest.mark.parametrize(
    ("status", "body", "error", "said"),
    [
        (429, b"", _kserve.AwayError, "HTTP 429"),
        (502, PAGE, _kserve.AwayError, "HTTP 502"),
        (503, b'{"error": "not ready"}', _kserve.AwayError, "not ready"),
        (504, PAGE, _kserve.AwayError, "HTTP 504"),
        (404, PAGE, _kserve.RefusedError, "HTTP 404"),
        (400, b'{"error": "unknown model"}', _kserve.RefusedError, "unknown model"),
    ],
)
def test_a_proxy_that_reaches_no_server_is_away_and_its_page_is_not_printed(
    status: int, body: bytes, error: type[Exception], said: str
) -> None:
    with proxy(status, body) as at:
        client = _kserve.connect(_kserve.address(at), 10)
        with pytest.raises(error) as e:
            client.config("tiny", 1)
        client.close()
    assert str(e.value) == said


@pytest.mark.parametrize(
    "text",
    ["me:sesame@gpu7", "http://me:sesame@gpu7:8000", "gpu7?token=sesame", "ftp://:sesame@gpu7"],
)
def test_of_an_address_that_is_refused_no_secret_is_printed(text: str) -> None:
    with pytest.raises(SettingError, match=r"^--server is '.*\*\*\*") as e:
        _kserve.address(text)
    assert "sesame" not in str(e.value)


@pytest.mark.parametrize("scheme", ["grpc", "grpcs"])
def test_grpc_takes_no_path(scheme: str) -> None:
    with pytest.raises(SettingError, match=r"is 'grpcs?://gpu7/triton'; a path is for HTTP: leave"):
        _kserve.address(f"{scheme}://gpu7/triton")
    assert str(_kserve.address(f"{scheme}://gpu7/")).startswith(f"{scheme}://gpu7:")
