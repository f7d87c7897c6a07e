"""What `auto` chooses by: the least CPU time of one clip, on one thread, backends in turn."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests import bundles
from vmoe import bundle as reader
from vmoe.clips import Clips, ClipSpec
from vmoe.export import latency
from vmoe.runtime import Engine
from vmoe.runtime.engine import Prediction
from vmoe.runtime.engines.onnxruntime import OnnxRuntime

WAIT_S = 0.02


def test_backends_take_turns_and_what_interrupts_them_does_not_count(
    tmp_path: Path, spec: ClipSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr(latency, "SECONDS", 0.0)
    infer, called = Engine.infer, []

    def interrupted(engine: Engine, clips: Clips) -> Prediction:
        called.append(engine.backend_name)
        if isinstance(engine._backend, OnnxRuntime):
            assert engine._backend._threads == 1
        time.sleep(WAIT_S)  # as if another process had the CPU
        return infer(engine, clips)

    monkeypatch.setattr(Engine, "infer", interrupted)
    read = reader.read(bundles.write(tmp_path / "b", spec))
    names = ["onnxruntime", "openvino"]
    took = latency.measure(read, names, "cpu", bundles.plain_clips(spec, (255, 0, 0)))
    assert list(took) == names
    for of in took.values():
        assert set(of) == {"device", "latency_ms"}
        assert of["device"] == "cpu"
        assert 0 < of["latency_ms"] < WAIT_S * 1e3
    rounds = [sorted(called[i : i + 2]) for i in range(0, len(called), 2)]
    assert rounds == [names] * (1 + latency.ROUNDS), "one to warm up, then those that count"
    assert called != names * (1 + latency.ROUNDS), "each round in an order of its own"
