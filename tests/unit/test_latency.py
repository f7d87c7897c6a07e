"""What `auto` chooses by: the least CPU time of one clip, on one thread, backends in turn."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests import bundles
from vmoe import bundle as reader
from vmoe.checkpoint import Checkpoint
from vmoe.clips import Clips, ClipSpec
from vmoe.export import ExportSettings, latency, online
from vmoe.export.pipeline import Plan, write
from vmoe.models import ModelSettings, build
from vmoe.runtime import Engine
from vmoe.runtime.engine import Prediction
from vmoe.runtime.engines.onnxruntime import OnnxRuntime
from vmoe.runtime.online import States

Followed = tuple[NDArray[np.float32], States]
WAIT_S = 0.02


def test_backends_take_turns_and_what_interrupts_them_does_not_count(
    tmp_path: Path, spec: ClipSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr(latency, "SECONDS", 0.0)
    infer = Engine.infer
    called: list[str] = []

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


def test_an_online_bundle_is_measured_by_the_frame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = ClipSpec(frames=9, spacing_s=0.1, height=32, width=32)
    twin = build(ModelSettings("tsm-online", 0.1, 2, 3), spec).eval()
    (tmp_path / "b").mkdir()
    plan = Plan(Checkpoint(twin, ("a", "b", "c")), None, "causal", ExportSettings(form="online"))
    write(plan, online.from_twin(twin, 20), tmp_path / "b")
    monkeypatch.setattr(latency, "SECONDS", 0.0)
    follow = Engine.follow
    frames: list[tuple[int, bool]] = []

    def counted(engine: Engine, expert: int, some: Clips, states: States | None = None) -> Followed:
        frames.append((some.shape[1], states is None))
        return follow(engine, expert, some, states)

    monkeypatch.setattr(Engine, "follow", counted)
    monkeypatch.setattr(Engine, "infer", None)
    clip = bundles.plain_clips(spec, (255, 0, 0))
    took = latency.measure(reader.read(tmp_path / "b"), ["onnxruntime"], "cpu", clip)
    assert took["onnxruntime"]["latency_ms"] > 0
    assert frames == [(9, True), *[(1, False)] * (1 + latency.ROUNDS)]
