"""Verification: every gate on every backend; what is refused is kept; what is not proven is not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from tests.twins import SPEC
from vmoe import bundle as bundles
from vmoe.clips import Clips
from vmoe.errors import EngineMismatchError, GateError, SettingError
from vmoe.export import ExportSettings, executed, export, verify
from vmoe.export.executed import Executed
from vmoe.export.precision import Proof
from vmoe.runtime import Engine, Prediction
from vmoe.runtime.backends import choose

FAST = {"verify_clips": 8, "robust_clips": 4, "gate_sparsity": 1e3, "optimize": "none"}


def test_a_backend_that_fails_a_gate_is_said_to_and_is_never_auto(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("openvino")
    infer = Engine.infer

    def wrong_of_many(
        engine: Engine, clips: Clips, force_route: int | Sequence[int] | None = None
    ) -> Prediction:
        found = infer(engine, clips, force_route)
        wrong = engine.backend_name == "openvino" and len(clips) == FAST["robust_clips"]
        return found._replace(logits=found.logits[:, ::-1]) if wrong else found

    monkeypatch.setattr(Engine, "infer", wrong_of_many)
    made = export(small, tmp_path / "x", ExportSettings(**FAST, gate_robust=0.0))  # type: ignore[arg-type]
    said = made.report["backends"]
    assert said["onnxruntime"]["ok"] is True
    assert said["openvino"]["ok"] is False
    names = ["parity", "parity", "parity-mean", "route", "clean", "robust", "sparsity"]
    for backend in said.values():
        assert [gate["gate"] for gate in backend["gates"]] == names
        assert backend["latency_ms"] > 0
    refused = [gate["gate"] for gate in said["openvino"]["gates"] if not gate["ok"]]
    assert refused == ["robust"], "what the twin has right on its adversarial clips is lost"
    assert "adversarial clips broken on the engine alone (pgd 8/255: " in said["openvino"]["why"]
    assert "not verified for backend openvino: adversarial clips" in caplog.text
    assert [gate["gate"] for gate in made.report["gates"]] == [*names, "precision"]
    assert choose("auto", bundles.read(tmp_path / "x"), "cpu") == "onnxruntime"


def test_what_no_backend_answers_is_kept_as_rejected_with_its_report(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = verify.load

    def fails(path: Path, backend: str, *args: Any, **named: Any) -> Engine:
        if backend == "onnxruntime":
            raise EngineMismatchError(f"{path}/router.onnx does not run: it is of no use.")
        return load(path, backend, *args, **named)

    def answers_one(engine: Engine, clips: Clips, *_: Any) -> Prediction:
        if len(clips) > 1:
            raise EngineMismatchError("expert1.onnx does not run: not so many.")
        return Prediction(np.zeros((1, 2)), np.zeros((1, 2)), np.zeros(1))

    monkeypatch.setattr(verify, "load", fails)
    monkeypatch.setattr(Engine, "infer", answers_one)
    with pytest.raises(GateError, match=r"refused: backends here that run it \(onnxruntime: r"):
        export(small, tmp_path / "x", ExportSettings(**FAST))  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["x.rejected"]
    report = bundles.read(tmp_path / "x.rejected").report()
    refused = [gate for gate in report["gates"] if not gate["ok"]]
    assert [(gate["gate"], gate["measured"]) for gate in refused] == [("backend", 0)]
    why = "router.onnx does not run: it is of no use"
    assert report["backends"]["onnxruntime"] == {"ok": False, "device": "cpu", "why": why}
    assert report["precision"]["router"]["found"] == {"fp32": 4}


def test_a_device_that_is_not_here_is_told_before_any_work(small: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="--device cuda:99 cannot be used here"):
        export(small, tmp_path / "x", device="cuda:99")
    assert not list(tmp_path.iterdir())


PROOFS = [
    Proof("router", {"fp32": 4}, {"fp32": 4}, {}, ()),
    Proof("expert0", {"int8": 7}, {"int8": 7}, {}, ()),
]


@pytest.mark.parametrize(
    ("ran", "missed", "says"),
    [
        (Executed({"int8": 7}), 0, "int8 layers that onnxruntime runs in float"),
        (Executed({"int8": 9}), 0, "int8 layers that onnxruntime runs in float"),
        (Executed({"int8": 5, "float": 2}), 2, "int8 layers that onnxruntime runs in float"),
        (Executed({}, "it is secret"), 7, "in float (expert0 is not proven: it is secret)"),
    ],
)
def test_what_is_not_proven_to_run_as_int8_counts_as_float(
    ran: Executed, missed: int, says: str
) -> None:
    router = Executed({}, "nobody asks for int8 there")
    gate = executed.gate("onnxruntime", PROOFS, {"router": router, "expert0": ran})
    assert gate.measured == missed
    assert gate.ok is (missed == 0)
    assert gate.what.endswith(says)


def test_a_graph_that_cannot_be_saved_or_looked_into_is_not_proven(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = bundles.read(tiny_bundle)
    bundle = dataclasses.replace(held, parts={"expert1": held.parts["expert1"]})
    assert executed.on("onnxruntime", bundle)["expert1"].layers == {"float": 21}
    unknown = executed.on("another", bundle)["expert1"]
    assert unknown.to_report() == "not proven: another does not show what it runs"

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(onnxruntime, "InferenceSession", fails)
    found = executed.on("onnxruntime", bundle)["expert1"]
    assert found.why == "onnxruntime cannot save its optimised graph: No space left on device"
    json.dumps(found.to_report())


def test_openvino_shows_what_it_runs_but_not_inside_of_one_file(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    from tests import bundles as tiny

    held = bundles.read(tiny_bundle)
    bundle = dataclasses.replace(held, parts={"router": held.parts["router"]})
    assert executed.on("openvino", bundle)["router"].layers == {"float": 4}
    one_file = bundles.read(tiny.write(tmp_path / "b", SPEC, lowering="if"))
    found = executed.on("openvino", one_file)["moe"]
    assert found.why is None or "inside of one file" in found.why
