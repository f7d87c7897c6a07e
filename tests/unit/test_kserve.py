"""One connection to a Triton server: what is away, and what is refused."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest

from vmoe.runtime.engines import _kserve

SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # HTTP/2: the server's greeting


def test_grpc_dials_again_when_the_other_end_has_gone_silent() -> None:
    grpc = pytest.importorskip("grpc", reason="tritonclient[grpc] is not installed")
    service = pytest.importorskip("tritonclient.grpc.service_pb2_grpc")
    messages = pytest.importorskip("tritonclient.grpc.service_pb2")

    class Servicer(service.GRPCInferenceServiceServicer):  # type: ignore[misc, name-defined]
        def ModelConfig(self, request: object, context: object) -> object:
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
