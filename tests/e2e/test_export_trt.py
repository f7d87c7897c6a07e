"""vmoe-export --trt as a user runs it: without TensorRT here, and over its real signatures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests import bundles
from tests.bindings import Bindings
from tests.cuda_fake import Driver
from tests.tensorrt_fake import Fake
from vmoe import bundle as reader
from vmoe.__main__ import main as vmoe_main
from vmoe.batches import to_tensor
from vmoe.clips import ClipSpec
from vmoe.export import pipeline, sparsity
from vmoe.export.cli import main
from vmoe.export.gates import PARITY
from vmoe.export.plan import ExportSettings, plan
from vmoe.export.tensorrt import agreement
from vmoe.runtime import load

ROOT = Path(__file__).parents[2]
QUICK = ("--verify-clips", "8", "--robust-clips", "0", "--gate-sparsity", "1000")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def last_line(result: Result) -> str:
    return result.stderr.strip().splitlines()[-1]


def largest_score(small: Path) -> float:
    """Return the largest score that a twin gives the clips that QUICK checks it with."""
    made = plan(small, ExportSettings(fp16=True, verify_clips=8))
    clips = pipeline.sample_of(made).clips
    return float(made.checkpoint.twin.scores(to_tensor(clips)).detach().abs().max())


def without(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)


def test_without_tensorrt_it_says_what_to_install_before_any_work(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "tensorrt")
    result = run(small, "--trt", "--fp16", "--out", tmp_path / "out")
    assert result.exit_code == 5
    assert "tensorrt is not installed: pip install 'vmoe[tensorrt]'" in last_line(result)
    assert "JetPack" in last_line(result)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_needs_no_tensorrt_and_prints_the_whole_build(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "tensorrt")
    monkeypatch.chdir(tmp_path)
    options = ("--workspace", "512", "--opt-batch", "2", "--max-batch", "6", "--strip",
               "--timing-cache", "t.cache", "--hardware-compatible", "ampere-plus")  # fmt: skip
    plain = run(small, "--trt", "--int8", "--calib", "camera-motion", *options, "--dry-run")
    assert plain.exit_code == 0, plain.stderr
    for line in (
        "out: runs/export/small-trt",
        "optimize: none",
        "int8_form: s8s8",
        "passes: cast_first",
        "build: by: the ONNX parser",
        "build: profile: batch 1 to 6, fastest at 2",
        "build: flags: no-TF32, STRIP_PLAN, REFIT_IDENTICAL; level 3, workspace 512 MiB, other "
        "GPUs ampere-plus, one stream",
        "build: timing cache: t.cache",
        "build: router: router.onnx (fp32, cast of pixels first) -> router.plan, "
        "router.layers.json, router.onnx",
        "build: expert1: expert1.onnx (int8, cast of pixels first) -> expert1.plan, "
        "expert1.layers.json, expert1.onnx",
        "build: run: CUDA graphs for batch 1, 2, 4, 6; host routes",
    ):
        assert line in plain.stdout.splitlines()
    told = json.loads(run(small, "--trt", "--dry-run", "--json").stdout)
    assert told["precision"] == "fp32"
    assert told["gates"]["parity"] == PARITY["fp32"]
    told |= json.loads(run(small, "--trt", "--tf32", "--dry-run", "--json").stdout)
    assert (told["gates"]["parity"], told["gates"]["parity_mean"]) == (2e-3, 3e-4)
    assert len(told["build"]) == 11
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--onnx", "--trt"), "--onnx and --trt exclude each other"),
        (("--max-batch", "4"), "--max-batch is for --trt: give that too, or leave it out."),
        (("--trt", "--lowering", "if"), "--trt builds no plan of --lowering if: TensorRT before"),
        (("--trt", "--lowering", "plugin", "--int8"), "has no routed layers in int8, for TensorRT"),
        (("--torch-trt", "--lowering", "dense"), "apart: leave --lowering dense out."),
        (("--trt", "--optimize", "winograd"), "--optimize winograd is for CPUs"),
        (("--trt", "--min-batch", "4", "--max-batch", "2"), "are not in order"),
        (("--trt", "--form", "online"), "--trt is not for --form online"),
        (("--torch-trt", "--int8"), "--torch-trt is not for --int8"),
        (("--torch-trt", "--onnx"), "--onnx and --trt exclude each other"),
        (("--from-onnx",), "--from-onnx is for --trt: give that too, or leave it out."),
        (("--trt", "--from-onnx", "--fp16", "--opset", "21"), "as they are: leave --fp16 and --op"),
        (("--torch-trt", "--from-onnx"), "--torch-trt builds from the twin, --from-onnx does not"),
    ],
)
def test_what_excludes_each_other_is_said_first(
    small: Path, flags: tuple[str, ...], said: str
) -> None:
    result = run(small, *flags)
    assert result.exit_code == 2
    assert said in last_line(result)


@pytest.mark.parametrize("bindings", ["10.3"], indirect=True)  # all of them: tests/unit
def test_a_bundle_of_plans_passes_its_gates_and_answers(
    small: Path, tmp_path: Path, trt: Fake, gpu: Driver, bindings: Bindings
) -> None:
    out = tmp_path / "plans"
    result = run(small, "--trt", "--fp16", "--tf32", "--timing-cache", tmp_path / "t", *QUICK,
                 "--out", out)  # fmt: skip
    assert result.exit_code == 0, result.stderr
    bundle = reader.read(out)
    assert {part.format for part in bundle.parts.values()} == {"plan"}
    assert [bundle.parts[n].precision["found"] for n in ("router", "expert1")] == ["fp32", "fp16"]
    plan = bundle.parts["expert1"].extra["plan"]
    assert plan["tensorrt"].startswith(bindings.version)
    assert (plan["gpu"], plan["capability"], plan["batch"]) == ("NVIDIA Test", "8.7", [1, 1, 8])
    said = bundle.report()
    bounds = {gate["what"]: gate["bound"] for gate in said["gates"]}
    scores = [bounds["max |d scores|"] / PARITY["tf32"], largest_score(small)]
    assert scores[0] == pytest.approx(scores[1]), "the router is judged as fp32"
    assert {"parity", "route", "sparsity", "precision"} <= {g["gate"] for g in said["gates"]}
    assert said["backends"]["tensorrt"]["ok"]
    assert (tmp_path / "t").read_bytes().startswith(b"timed ")
    assert json.loads((out / "router.layers.json").read_text())["Layers"]
    assert gpu.left() == {}
    with load(out) as engine:
        assert engine.backend_name == "tensorrt"
    shown = CliRunner().invoke(vmoe_main, ["inspect", str(out)])
    assert "expert1.plan" in shown.stdout


@pytest.mark.parametrize("bindings", ["11.4"], indirect=True)
def test_one_plan_of_routed_layers_passes_its_gates(
    small: Path, tmp_path: Path, trt: Fake, gpu: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sparsity, "BOUND", 1e3)  # of the ONNX: its times prove nothing here
    asked = (small, "--trt", "--lowering", "plugin", "--fp16")
    told = run(*asked, "--dry-run")
    assert told.exit_code == 0, told.stderr
    for line in (
        "out: runs/export/small-plugin-trt",
        "parts: moe",
        "build: plugins: vmoe::VmoeTopK 1, vmoe::RoutedLinear 1, vmoe::RoutedConv3d 1; registered "
        "before the graph is read",
        "build: moe: moe-tensorrt.onnx (fp16, cast of pixels first) -> moe.plan, moe.layers.json",
        "build: check: every plan loaded again, against the twin: parity, routes, accuracy",
        "build: run: CUDA graphs for batch 1, 2, 4, 8; the plan routes each clip's layers, by our "
        "kernels",
    ):
        assert line in told.stdout.splitlines()
    result = run(*asked, *QUICK[:4], "--out", "plans")
    assert result.exit_code == 0, result.stderr
    bundle = reader.read(Path("plans"))
    part = bundle.parts["moe"]
    assert part.precision["found"] == "fp16+fp32"
    assert part.extra["plan"]["plugins"] == [
        "vmoe::RoutedConv3d 1", "vmoe::RoutedLinear 1", "vmoe::VmoeTopK 1",
    ]  # fmt: skip
    assert bundle.report()["sparsity"].startswith("not judged: routed layers run our kernels")
    assert gpu.left() == {}


WITHOUT_TORCH = """
import importlib.util, sys
for name in ("torch", "onnxscript", "safetensors"):
    sys.modules[name] = None
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "torch" else find(name, *a)
import vmoe.__main__
vmoe.__main__.export()
"""


def test_plans_are_built_of_onnx_without_torch(tmp_path: Path, spec: ClipSpec) -> None:
    """As on a Jetson; up to where TensorRT is missing."""
    parts = bundles.write(tmp_path / "onnx", spec)
    for more, code in ((["--dry-run"], 0), (["--out", str(tmp_path / "plans")], 5)):
        command = [sys.executable, "-c", WITHOUT_TORCH, str(parts), "--trt", "--from-onnx"]
        done = subprocess.run([*command, *more], capture_output=True, text=True, check=False,
                              env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
        assert done.returncode == code, done.stderr
        said = done.stderr.splitlines()[-1] if code else done.stdout
        assert ("tensorrt is not installed" if code else "ONNX Runtime, where it is") in said
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]


@pytest.mark.parametrize("bindings", ["10.3"], indirect=True)
def test_plans_of_onnx_are_compared_with_onnx_runtime(
    tmp_path: Path, spec: ClipSpec, trt: Fake, gpu: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, out = bundles.write(tmp_path / "onnx", spec), tmp_path / "plans"
    (parts / reader.REPORT).write_text(json.dumps({"model": {}, "clean": {"twin": 99}}))
    result = run(parts, "--trt", "--from-onnx", "--out", out, "--json")
    assert result.exit_code == 0, result.stderr
    assert [g["gate"] for g in json.loads(result.stdout)["gates"]][-3:] == [
        "parity", "parity", "route",
    ]  # fmt: skip
    said = reader.read(out).report()
    assert said["of_onnx"] == {"clean": {"twin": 99}}
    assert "clean" not in said
    assert said["backends"]["tensorrt"]["ok"]
    with load(out) as engine:
        assert engine.backend_name == "tensorrt"
    assert gpu.left() == {}
    assert "exists" in last_line(run(parts, "--trt", "--from-onnx", "--out", out))
    result = run(parts, "--trt", "--from-onnx", "--tf32", "--out", tmp_path / "tf32", "--json")
    coarser = [gate["bound"] for gate in json.loads(result.stdout)["gates"][-3:]]
    assert coarser == [PARITY["tf32"]] * 2 + [0]
    monkeypatch.setattr(agreement, "PARITY", {"fp32": -1.0})
    result = run(parts, "--trt", "--from-onnx", "--out", tmp_path / "wrong")
    assert result.exit_code == 3
    assert "refused: d logits to ONNX is" in last_line(result)
    assert "Nothing was kept." in last_line(result)
    assert not (tmp_path / "wrong").exists()
    monkeypatch.setattr(agreement, "why_unavailable", lambda: "onnxruntime is not installed.")
    result = run(parts, "--trt", "--from-onnx", "--out", tmp_path / "alone")
    assert "are not compared with their ONNX: onnxruntime is not installed." in result.stderr
    assert result.exit_code == 0
    assert "backends" not in reader.read(tmp_path / "alone").report(), "nobody looked"
