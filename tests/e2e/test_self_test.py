"""vmoe doctor --self-test: what it would do, and the report of what it did."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests import bundles
from tests.cuda_fake import CUresult, Driver
from tests.plans import built
from tests.tensorrt_fake import Fake
from vmoe import bundle as reader
from vmoe.__main__ import main
from vmoe.clips import ClipSpec
from vmoe.doctor import UNVERIFIED
from vmoe.errors import MissingDependencyError
from vmoe.export.tensorrt import acceptance, selftest
from vmoe.runtime.plugins import nodes


def doctor(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["doctor", *map(str, arguments)])


def without_torch(name: str) -> object:
    """Look for a module; torch is not there, so that the tests are fast."""
    return None if name == "torch" else importlib.util.find_spec(name)


def test_what_was_never_run_is_named() -> None:
    plain = doctor()
    assert plain.exit_code == 0, plain.output
    for line in UNVERIFIED:
        assert f"  {line}\n" in plain.stdout
    assert "no plan was ever built" in plain.stdout
    assert json.loads(doctor("--json").stdout)["unverified"] == UNVERIFIED


def test_a_dry_run_lists_every_step_without_tensorrt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.chdir(tmp_path)
    plain = doctor("--self-test", "--dry-run")
    assert plain.exit_code == 0, plain.output
    names = [line.partition(":")[0] for line in plain.stdout.splitlines()]
    assert names == [*(step.__name__ for step in selftest.STEPS), "report"]
    told = json.loads(doctor("--self-test", "--dry-run", "--json").stdout)
    assert [step["step"] for step in told["steps"]] == names[:-1]
    assert all(step["what"].endswith(".") for step in told["steps"])
    assert not list(tmp_path.iterdir())
    for given in (["--dry-run"], ["--out", "x.json"], ["--device", "cpu"]):
        assert f"{given[0]} is for --self-test" in doctor(*given).stderr


def test_without_tensorrt_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    result = doctor("--self-test", "--out", tmp_path / "r.json")
    assert result.exit_code == 5
    assert "tensorrt is not installed" in result.stderr
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert "onnx is not installed: pip install onnx." in doctor("--self-test").stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bindings", ["11.4"], indirect=True)
def test_every_step_is_done_and_what_fails_is_told(
    trt: Fake, gpu: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selftest, "ROUNDS", 2)
    monkeypatch.setattr(selftest, "CLIPS", 8)
    monkeypatch.setattr(selftest, "find_spec", without_torch)
    file = tmp_path / "r.json"
    result = doctor("--self-test", "--out", file)
    assert result.exit_code == 0, result.stderr
    found = json.loads(file.read_text())
    steps = found["steps"]
    assert found["ok"]
    assert steps["machine"]["tensorrt"] == trt.__version__
    assert "torch is not installed" in steps["build_fp16"]["skipped"]
    assert steps["build"]["layers"]["expert3"] == {"fp32": 21}
    assert steps["parity"]["fp32"]["flips"] == 0
    for kind, plan in (("fp32", "expert0.plan"), ("routed", "moe.plan")):
        assert steps["graphs"][kind]["captured"][plan] == [8, 1, 2, 4]  # in the order of the runs
        assert {"free", "route3", "all experts"} <= set(steps["latency"][kind]["ms"])
        assert steps["latency"][kind]["of_one_call"]["device_ms"] > 0
    assert "router alone" in steps["latency"]["fp32"]["ms"]
    assert "worst_route_over_parts_alone" not in steps["latency"]["routed"]
    assert set(steps["plugins"]) == {"ok", *acceptance.trials()}
    assert steps["build_routed"]["layers"]["moe"]["fp32"] > 20
    assert steps["parity"]["routed"]["flips"] == 0
    assert steps["plugins"]["RoutedConv3d"]["max_d"] < 1e-5
    assert {creator for creator, _, _ in trt.creators} == {node.op_type for node in nodes.NODES}
    assert steps["latency"]["fp32"]["worst_route_over_parts_alone"] > 0
    assert gpu.left() == {}

    trt.answers = {"OnnxParser.parse": False}
    result = doctor("--self-test", "--out", file)
    assert result.exit_code == 3
    steps = json.loads(file.read_text())["steps"]
    assert steps["build"]["why"].startswith("VmoeError: router: TensorRT cannot read the graph")
    assert not steps["graphs"]["ok"]
    for step in ("parity", "graphs", "latency"):
        assert steps[step]["why"] == "VmoeError: no plans: see the steps that build them."
    assert steps["build_routed"]["why"].startswith("VmoeError: moe: TensorRT cannot read the gra")


@pytest.mark.parametrize("bindings", ["10.3"], indirect=True)
def test_a_part_that_runs_without_a_graph_fails_its_step(
    trt: Fake, gpu: Driver, tmp_path: Path, spec: ClipSpec
) -> None:
    source = reader.read(bundles.write(tmp_path / "onnx", spec))
    state = selftest.State(tmp_path, "cuda:0", built={"fp32": (source, built(source))})
    assert "why" not in selftest.graphs(state)
    gpu.fail = {"cuStreamBeginCapture": CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED}
    said = selftest.graphs(state)
    assert not said["ok"]
    assert "expert0.plan at 8 runs without a graph" in said["why"]


@pytest.mark.parametrize("bindings", ["10.3"], indirect=True)
def test_answers_that_are_wrong_fail_their_steps(
    trt: Fake, gpu: Driver, tmp_path: Path, spec: ClipSpec
) -> None:
    source = reader.read(bundles.write(tmp_path / "onnx", spec))
    state = selftest.State(tmp_path, "cuda:0", built={"fp32": (source, built(source))})
    selftest.machine(state)
    trt.skew = lambda name, answer: answer + answer.dtype.type(len(answer))
    assert "fp32: max |d logits| between batches is 7, at most 0.0" in selftest.graphs(state)["why"]
    assert "fp32: d logits to ONNX is" in selftest.parity(state)["why"]
    said = selftest.plugins(state)["why"]
    for name in acceptance.trials():
        assert f"{name}: max |d| to NumPy is" in said
    trt.answers = {"IExecutionContext.get_tensor_shape": (3, 7)}
    assert "RoutedLinear: y has the shape [3, 7], not [3, 6]" in selftest.plugins(state)["why"]
    trt.answers = {"IExecutionContext.execute_async_v3": False}
    assert "VmoeTopK: execute_async_v3 failed" in selftest.plugins(state)["why"]

    def lacks(_: selftest.State) -> dict[str, object]:
        raise MissingDependencyError("onnxscript is not installed: pip install onnxscript.")

    assert selftest._done(lacks, state)["why"].startswith("onnxscript is not installed")
    assert gpu.left() == {}
