"""ONNX Runtime's CUDA graphs, on no GPU: the places that they need, with sessions on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from tests import bundles as tiny
from vmoe import bundle as bundles
from vmoe.clips import ClipSpec
from vmoe.errors import EngineMismatchError, SettingError
from vmoe.runtime import load
from vmoe.runtime.engines._bound import Bound

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


@pytest.fixture
def path(tmp_path: Path, spec: ClipSpec) -> Path:
    return tiny.write(tmp_path / "b", spec)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let sessions that ask for CUDA run on the CPU; return what they asked for."""
    real, value = onnxruntime.InferenceSession, onnxruntime.OrtValue
    make = value.ortvalue_from_shape_and_type
    seen: list[Any] = []

    class Session(real):  # type: ignore[misc, valid-type]
        def __init__(self, graph: str, options: Any, providers: list[Any]) -> None:
            seen.append(providers)
            super().__init__(graph, options, providers=[CPU])

        def get_providers(self) -> list[str]:
            return [CUDA, CPU]

    def on_cpu(shape: Any, kind: Any, device: str, index: int) -> Any:
        assert device == "cuda"
        return make(shape, kind, "cpu", 0)

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(value, "ortvalue_from_shape_and_type", staticmethod(on_cpu))
    return seen


def test_answers_are_those_of_plain_runs_for_any_batch_and_stay_as_they_were(
    path: Path, spec: ClipSpec, asked: list[Any]
) -> None:
    clips = tiny.plain_clips(spec, (0, 200, 0), (255, 10, 0), (120, 90, 0), (250, 60, 0))
    scores, logits = tiny.expected(clips, 3)
    with load(path, "onnxruntime", "cuda:1", cuda_graph=True, all_parts=True) as engine:
        answers = [engine.infer(clips[rows]) for rows in (slice(0, 4), slice(1, 2), slice(0, 4))]
        other = engine.infer(clips[::-1])  # in the same place, after them
    for answer in (answers[0], answers[2]):
        np.testing.assert_allclose(answer.scores, scores, atol=1e-5)
        routed = logits[np.arange(4), scores.argmax(axis=1)]
        np.testing.assert_allclose(answer.logits, routed, atol=1e-4)
    np.testing.assert_array_equal(answers[1].logits, answers[0].logits[1:2])
    np.testing.assert_array_equal(other.logits, answers[0].logits[::-1])
    assert asked[0] == [(CUDA, {"device_id": "1", "enable_cuda_graph": "1"}), CPU]
    asked.clear()
    load(path, "onnxruntime", "cuda:1").close()
    assert asked[0] == [(CUDA, {"device_id": "1"}), CPU]


def test_each_batch_has_a_graph_and_one_place(path: Path, spec: ClipSpec) -> None:
    part = bundles.read(path).parts["router"]
    session = onnxruntime.InferenceSession(str(path / part.file), providers=[CPU])
    bound = Bound(onnxruntime, session, part, ("cpu", 0))
    clips = tiny.plain_clips(spec, (0, 1, 0), (9, 9, 9))
    for n in (1, 2, 1, 2):
        bound.run({"clip": clips[:n]})
    graphs = {
        n: place.options.get_run_config_entry("gpu_graph_id") for n, place in bound._places.items()
    }
    assert graphs == {1: "1", 2: "2"}


def test_what_takes_more_than_clips_is_no_graph(path: Path, spec: ClipSpec) -> None:
    part = bundles.read(path).parts["router"]
    bound = Bound(onnxruntime, None, part, ("cpu", 0))
    with pytest.raises(EngineMismatchError, match=r"router\.onnx takes force_route beside clips"):
        bound.run({"clip": tiny.plain_clips(spec, (0, 0, 0)), "force_route": np.array(1)})


def test_a_graph_that_fails_is_one_line(path: Path, spec: ClipSpec, asked: list[Any]) -> None:
    clips = tiny.plain_clips(spec, (0, 0, 0))
    with load(path, "onnxruntime", "cuda:0", cuda_graph=True) as engine:
        session = onnxruntime.InferenceSession
        session.run_with_iobinding = lambda *_: (_ for _ in ()).throw(RuntimeError("no\nroom"))
        with pytest.raises(EngineMismatchError, match=r"router\.onnx does not run: no$"):
            engine.infer(clips)


def test_a_part_that_onnx_runtime_makes_no_graph_of_says_what_to_leave_out(
    path: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: Any, **__: Any) -> None:
        raise RuntimeError("[ONNXRuntimeError] : 1 : FAIL : not all nodes are on CUDA.")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuses)
    why = r"router\.onnx: onnxruntime makes no CUDA graph of it: not .* CUDA\. Leave out --cuda-g"
    with pytest.raises(EngineMismatchError, match=why):
        load(path, "onnxruntime", "cuda:0", cuda_graph=True)


def test_a_cpu_has_no_cuda_graphs(path: Path) -> None:
    with pytest.raises(SettingError, match="onnxruntime runs on the CPU here, which has no CUDA g"):
        load(path, "onnxruntime", "cpu", cuda_graph=True)
    load(path, "onnxruntime", "cpu", cuda_graph=False).close()
