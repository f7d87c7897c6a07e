"""Plans of the lowerings in one file: routed layers by our plugins, and dense; over real names."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner, Result

from tests import bundles
from tests.cuda_fake import Driver
from tests.graphs import mean_of
from tests.plans import built
from tests.tensorrt_fake import Fake
from tests.twins import lively, random_clips
from vmoe import bundle as reader
from vmoe.bundle import Bundle
from vmoe.checkpoint import Checkpoint
from vmoe.clips import ClipSpec
from vmoe.errors import BundleError, EngineMismatchError
from vmoe.export import sparsity
from vmoe.export.cli import main
from vmoe.export.onnx import Parts
from vmoe.export.pipeline import ExportSettings, Plan, write
from vmoe.export.tensorrt import pipeline, plans
from vmoe.export.tensorrt.settings import BuildSettings
from vmoe.runtime import load
from vmoe.runtime.plugins import nodes

EXPERTS, LABELS = 3, ("a", "b", "c", "d")
ONE = pytest.mark.parametrize("bindings", ["10.3"], indirect=True)
PLUGINS = ["vmoe::RoutedLinear 1", "vmoe::VmoeTopK 1"]


WEIGHTS = np.random.default_rng(0).standard_normal((EXPERTS, 3, len(LABELS)))
# The router takes the brightest colour, the experts are matrices.
PARTS = Parts(mean_of("scores", np.eye(3)), [mean_of("logits", w) for w in WEIGHTS])


def onnx(folder: Path, lowering: str = "plugin") -> Bundle:
    """Write a bundle of PARTS."""
    held = Checkpoint(lively(EXPERTS, len(LABELS)), LABELS)
    plan = Plan(held, None, "t", ExportSettings(lowering=lowering))
    folder.mkdir()
    return write(plan, PARTS, folder)


@pytest.fixture
def source(tmp_path: Path) -> Bundle:
    return onnx(tmp_path / "onnx")


def same(source: Bundle, path: Path) -> None:
    """Compare plans with their ONNX, on free and forced routes, at every batch."""
    clips = random_clips(11)
    with load(source.path, "onnxruntime", "cpu") as wanted, load(path, "tensorrt") as engine:
        for n in (1, 3, 8, 11):
            a, b = wanted.infer(clips[:n]), engine.infer(clips[:n])
            np.testing.assert_allclose(b.logits, a.logits, atol=1e-5)
            np.testing.assert_allclose(b.scores, a.scores, atol=1e-5)
            assert b.route.tolist() == a.route.tolist()
        np.testing.assert_allclose(engine.run_all(clips), wanted.run_all(clips), atol=1e-5)
        routes = [i % EXPERTS for i in range(11)]
        forced = engine.infer(clips, force_route=routes)
        assert forced.route.tolist() == routes
        np.testing.assert_array_equal(
            engine.infer(clips[:1]).logits, engine.infer(clips).logits[:1]
        )


def test_one_plan_of_routed_layers_answers_as_its_onnx(
    trt: Fake, gpu: Driver, source: Bundle
) -> None:
    path = built(source)
    bundle = reader.read(path)
    assert [part.file for part in bundle.parts.values()] == ["moe.plan"]
    assert bundle.lowering == "plugin"
    assert not bundle.others
    said = bundle.parts["moe"].extra["plan"]
    assert said["plugins"] == PLUGINS
    assert bundle.parts["moe"].layers == {"fp32": 3}  # the router's product, two plugins
    trt.creators.clear()  # as in the process that loads it
    trt.calls.clear()
    same(source, path)
    names = [name for name, _ in trt.calls]
    assert names.index("IPluginRegistry.register_creator") < names.index(
        "Runtime.deserialize_cuda_engine"
    )
    assert gpu.launches > 0
    assert gpu.left() == {}


@ONE
def test_the_command_builds_it_of_onnx_and_refuses_what_it_computes_in(
    trt: Fake, source: Bundle, tmp_path: Path
) -> None:
    def run(*more: str) -> Result:
        asked = [str(source.path), "--trt", "--from-onnx", "--out", str(tmp_path / "out"), *more]
        return CliRunner().invoke(main, asked)

    told = run("--dry-run")
    assert told.exit_code == 0, told.stderr
    assert "build: moe: moe-tensorrt.onnx (fp32, cast of pixels first) -> moe.plan" in told.stdout
    trt.layers = json.dumps(
        {"Layers": [{"LayerType": "PluginV3", "Inputs": [{"Datatype": "Half"}]}]}
    )
    refused = run()
    assert refused.exit_code == 3
    assert "fp32 layers of moe.plan is 0 %, must be at least 95 %" in refused.stderr
    assert not (tmp_path / "out").exists()
    trt.layers = None
    made = run()
    assert made.exit_code == 0, made.stderr
    said = reader.read(tmp_path / "out").report()
    assert {gate["gate"] for gate in said["gates"]} == {"precision", "parity", "route"}


@ONE
def test_one_plan_in_which_every_expert_runs_is_a_baseline(trt: Fake, tmp_path: Path) -> None:
    source = onnx(tmp_path / "onnx", "dense")
    path = built(source)
    assert reader.read(path).parts["moe"].extra["plan"]["plugins"] == []
    assert "IPluginRegistry.register_creator" not in [name for name, _ in trt.calls]
    same(source, path)


@ONE
def test_a_plan_whose_plugins_are_not_known_first_is_not_deserialised(
    trt: Fake, source: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the fake demands, as TensorRT does: else the order would prove nothing."""
    path = built(source)
    trt.creators.clear()
    monkeypatch.setattr(nodes, "register", lambda _: None)
    with pytest.raises(BundleError, match="TensorRT cannot load it: no creator of VmoeTopK"):
        load(path, "tensorrt")


def changed(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    manifest = json.loads((path / "vmoe.json").read_text())
    change(manifest["parts"]["moe"]["plan"])
    (path / "vmoe.json").write_text(json.dumps(manifest))


@ONE
def test_plugins_that_are_refused_or_not_ours_are_told(trt: Fake, source: Bundle) -> None:
    path = built(source)
    trt.creators.clear()
    trt.answers = {"IPluginRegistry.register_creator": False}
    why = r"^TensorRT 10\.3\.0 refuses the plugin VmoeTopK; see vmoe doctor\.$"
    for do in (lambda: load(path, "tensorrt"), lambda: built(source, name="again")):
        with pytest.raises(EngineMismatchError, match=why):
            do()
    trt.answers = {}
    trt.answers = {"ICudaEngine.get_tensor_location": trt.TensorLocation.HOST}
    why = r"^moe\.plan: TensorRT reads force_route on the host, where .* Use --lowering split\.$"
    with pytest.raises(EngineMismatchError, match=why):
        load(path, "tensorrt")
    trt.answers = {}
    changed(path, lambda plan: plan.update(plugins=["vmoe::VmoeTopK 1", "acme::TopK 2"]))
    trt.calls.clear()
    why = r"^moe\.plan needs the plugins acme::TopK 2; this vmoe has vmoe::VmoeTopK 1, .* Build it"
    with pytest.raises(EngineMismatchError, match=why):
        load(path, "tensorrt")
    assert "Runtime.deserialize_cuda_engine" not in [name for name, _ in trt.calls]
    changed(path, lambda plan: plan.update(plugins="VmoeTopK"))
    with pytest.raises(BundleError, match="does not say what it was built with"):
        load(path, "tensorrt")


@ONE
def test_a_gpu_that_is_older_than_the_kernels_is_told(
    trt: Fake, gpu: Driver, source: Bundle
) -> None:
    path = built(source, BuildSettings(hardware_compatible="ampere-plus"))
    gpu.capability = (8, 0)
    why = r"compute capability is 8\.0; the routed kernels need 8\.7 or newer\. Use --lowering spl"
    with pytest.raises(BundleError, match=why):
        load(path, "tensorrt")
    trt.calls.clear()
    with pytest.raises(BundleError, match=why):
        built(source, name="again")
    assert "Builder" not in {name.partition(".")[0] for name, _ in trt.calls}


def test_what_no_plan_is_built_of_is_refused_by_name(
    source: Bundle, tmp_path: Path, spec: ClipSpec
) -> None:
    without = replace(source, others={})
    with pytest.raises(EngineMismatchError, match="has no file for TensorRT: its experts are int8"):
        plans.check(without)
    branches = reader.read(bundles.write(tmp_path / "if", spec, lowering="if"))
    why = r"is of the lowering if, of which no plan is built: TensorRT before 10\.6 runs every bra"
    with pytest.raises(EngineMismatchError, match=why):
        plans.check(branches)
    plans.check(source)


@ONE
def test_gate_sparsity_compares_it_with_plans_of_the_parts(
    trt: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.onnx_pipeline, "graphs", lambda plan: SimpleNamespace(parts=PARTS))
    settings, folder = BuildSettings(max_batch=2), tmp_path / "split"
    folder.mkdir()
    plan = Plan(Checkpoint(lively(EXPERTS, len(LABELS)), LABELS), None, "t",
                ExportSettings(lowering="plugin"))  # fmt: skip
    pipeline._write_split(plan, settings, plans.here("auto", settings), folder)
    with load(folder, "tensorrt") as engine:  # trusted, as it was built here
        assert list(engine.bundle.parts) == ["router", "expert0", "expert1", "expert2"]
        assert engine.infer(random_clips(1)).logits.shape == (1, len(LABELS))
    assert (sparsity._unjudged("plugin", "tensorrt") or "").startswith("routed layers run our ker")
    assert sparsity._unjudged("dense", "tensorrt") == "every expert of the lowering dense runs"
    assert sparsity._unjudged("plugin", "onnxruntime") is None
    assert sparsity._unjudged("split", "tensorrt") is None


@ONE
def test_a_stripped_plan_of_routed_layers_gets_its_weights(trt: Fake, source: Bundle) -> None:
    same(source, built(source, BuildSettings(strip=True)))
