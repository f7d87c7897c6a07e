"""Plans from ONNX to answers, over a TensorRT with the names and signatures of real bindings."""

from __future__ import annotations

import json
import logging
import platform
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests import bundles
from tests.cuda_fake import CUresult, Driver
from tests.plans import built
from tests.tensorrt_fake import MAGIC, WHY, Fake
from vmoe import bundle as reader
from vmoe.bundle import Bundle
from vmoe.clips import ClipSpec
from vmoe.errors import EngineMismatchError, VmoeError
from vmoe.export.tensorrt import builder, plans, proof
from vmoe.export.tensorrt.settings import BuildSettings
from vmoe.runtime import load


@pytest.fixture
def source(tmp_path: Path, spec: ClipSpec) -> Bundle:
    return reader.read(bundles.write(tmp_path / "onnx", spec))


def test_plans_answer_as_the_onnx_does(trt: Fake, gpu: Driver, source: Bundle) -> None:
    path = built(source)
    clips = bundles.plain_clips(
        source.spec, *[(red, red // 2, 0) for red in range(0, 256, 23)]
    )  # 12 clips: more than a plan takes at once
    scores, logits = bundles.expected(clips, 3)
    with load(path, "tensorrt", all_parts=True) as engine:
        for n in (1, 2, 3, 5, 8, 12):
            got = engine.infer(clips[:n])
            np.testing.assert_allclose(got.scores, scores[:n], atol=1e-5)
            assert got.route.tolist() == scores[:n].argmax(axis=1).tolist()
            np.testing.assert_allclose(got.logits, logits[np.arange(n), got.route], atol=1e-4)
    assert gpu.launches > 0
    assert gpu.left() == {}, "memory, streams or graphs were not freed"


def test_what_is_built_is_what_was_asked(trt: Fake, source: Bundle) -> None:
    settings = BuildSettings(
        min_batch=2, opt_batch=4, max_batch=6, workspace=64, opt_level=5,
        version_compatible=True, hardware_compatible="ampere-plus", tf32=True,
    )  # fmt: skip
    path = built(source, settings)
    bundle = reader.read(path)
    head = head_of((path / "expert2.plan").read_bytes())
    assert head["flags"] == ["TF32", "VERSION_COMPATIBLE"]
    assert head["profile"] == {"clip": [[n, *source.spec.shape] for n in (2, 4, 6)]}
    assert head["details"]["pool WORKSPACE"] == 64 << 20
    assert head["details"]["builder_optimization_level"] == 5
    assert head["details"]["max_aux_streams"] == 0
    said = bundle.parts["expert2"].extra["plan"]
    assert said["flags"] == ["VERSION_COMPATIBLE"]
    assert (said["system"], said["cuda"], said["level"]) == (
        f"{sys.platform}-{platform.machine()}", "12.6", 5,
    )  # fmt: skip
    assert bundle.versions["tensorrt"] == trt.__version__
    clips = bundles.plain_clips(source.spec, (255, 100, 3))
    with load(path) as engine:  # one clip, though a plan takes at least two
        np.testing.assert_allclose(
            engine.infer(clips).logits, [[20, 20 + 100 / 255, 20 + 200 / 255]]
        )


def head_of(plan: bytes) -> dict[str, Any]:
    size = int.from_bytes(plan[len(MAGIC) : len(MAGIC) + 4], "big")
    head: dict[str, Any] = json.loads(plan[len(MAGIC) + 4 :][:size])
    return head


def test_a_stripped_plan_gets_its_weights_from_the_onnx_beside_it(
    trt: Fake, source: Bundle
) -> None:
    path = built(source, BuildSettings(strip=True))
    part = reader.read(path).parts["router"]
    assert set(part.hashes) == {"router.plan", "router.onnx"}
    clips = bundles.plain_clips(source.spec, (0, 200, 0))
    with load(path) as engine:
        assert engine.infer(clips).route.tolist() == [0]
    for call, why in (("OnnxParserRefitter.refit_from_file", "refit_from_file"),
                      ("Refitter.refit_cuda_engine", "refit_cuda_engine")):  # fmt: skip
        trt.answers = {call: False}
        with pytest.raises(EngineMismatchError, match=rf"router.onnx: {why} failed: {WHY}"):
            load(path)
    for call, why in (("OnnxParserRefitter.refit_from_bytes", "refit_from_bytes"),
                      ("Refitter.refit_cuda_engine", "refit_cuda_engine")):  # fmt: skip
        trt.answers = {call: False}
        with pytest.raises(EngineMismatchError, match=rf"^router: {why} failed: {WHY}"):
            built(source, BuildSettings(strip=True), "refused")
    for made in ("Refitter", "OnnxParserRefitter"):
        trt.answers = {made: None}
        with pytest.raises(EngineMismatchError, match=f"^TensorRT: {made} cannot be made: "):
            load(path)


def test_the_timing_cache_is_kept_and_one_of_another_version_is_replaced(
    trt: Fake, source: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "timing.cache"
    settings = BuildSettings(timing_cache=file)
    built(source, settings)
    assert file.read_bytes() == b"timed ++++"  # four parts, one after the other
    built(source, settings, "again")
    assert file.read_bytes() == b"timed ++++++++"
    file.write_bytes(b"another version's")
    with caplog.at_level(logging.WARNING, "vmoe.export"):
        built(source, settings, "third")
    assert "the timing cache is of another TensorRT or GPU" in caplog.text
    assert file.read_bytes() == b"timed ++++"
    trt.answers = {"IBuilderConfig.create_timing_cache": None}
    with caplog.at_level(logging.WARNING, "vmoe.export"):
        built(source, name="fourth")
    assert "TensorRT takes no timing cache" in caplog.text


REFUSALS = [
    ("Builder", None, "TensorRT: Builder cannot be made"),
    ("OnnxParser", None, "TensorRT: OnnxParser cannot be made"),
    ("Builder.create_network", None, "router: create_network failed"),
    ("OnnxParser.parse", False, "router: TensorRT cannot read the graph"),
    ("Builder.create_builder_config", None, "router: create_builder_config failed"),
    ("Builder.create_optimization_profile", None, "router: create_optimization_profile failed"),
    ("IBuilderConfig.add_optimization_profile", -1, "router: add_optimization_profile failed"),
    ("Builder.build_serialized_network", None, "router: TensorRT finds no plan"),
    ("Runtime", None, "TensorRT: Runtime cannot be made"),
    ("Runtime.deserialize_cuda_engine", None, "router: deserialize_cuda_engine failed"),
    ("ICudaEngine.create_execution_context", None, "router: create_execution_context failed"),
    ("IExecutionContext.set_input_shape", False, "router: set_input_shape failed"),
    ("ICudaEngine.create_engine_inspector", None, "router: create_engine_inspector failed"),
]  # fmt: skip


def test_every_refusal_of_the_builder_is_one_line_with_its_words(trt: Fake, source: Bundle) -> None:
    for call, answer, said in REFUSALS:
        trt.answers = {call: answer}
        with pytest.raises(VmoeError, match=f"^{re.escape(said)}") as e:
            built(source)
        assert "\n" not in str(e.value)
        if answer is not None or "." in call:
            assert WHY in str(e.value), call
    assert not source.path.with_name("plans").exists()
    for text in ("{", "[]"):
        trt.answers = {"EngineInspector.get_engine_information": text}
        with pytest.raises(
            VmoeError, match="router: what TensorRT's inspector says cannot be read"
        ):
            built(source)


def test_what_the_parser_does_not_take_is_told_by_node(
    trt: Fake, source: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = onnx.load(source.path / "router.onnx")
    graph.graph.node[0].CopyFrom(onnx.helper.make_node("Transpose", ["clip"], ["float"], "first"))
    why = r"graph: Transpose first: UINT8 is not supported here\.$"
    at = plans.here("auto", BuildSettings())
    with at.current(), pytest.raises(VmoeError, match=why):
        builder.build(trt, graph.SerializeToString(), "router", BuildSettings())
    del graph.graph.node[0]
    graph.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "T"
    for node in graph.graph.node:
        node.input[:] = [name.replace("float", "pixels") for name in node.input]
    graph.graph.node.insert(0, onnx.helper.make_node("Cast", ["clip"], ["pixels"], to=1))
    why = r"input clip has the shape \[-1, -1, 32.*only N may be"
    with at.current(), pytest.raises(VmoeError, match=why):
        builder.build(trt, graph.SerializeToString(), "router", BuildSettings())


def test_what_a_version_does_not_have_is_said_before_the_build(trt: Fake) -> None:
    settings = BuildSettings(hardware_compatible="same-compute-capability")
    if hasattr(trt.HardwareCompatibilityLevel, "SAME_COMPUTE_CAPABILITY"):
        plans.here("auto", settings)
        return
    with pytest.raises(EngineMismatchError, match=r"is of TensorRT 10\.9 and newer; here is 10\.3"):
        plans.here("auto", settings)


@pytest.mark.parametrize("bindings", ["10.3"], indirect=True)
def test_plans_are_built_on_the_gpu_that_was_named(
    trt: Fake, gpu: Driver, source: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "cuDeviceGetCount", lambda: (CUresult.CUDA_SUCCESS, 2))
    settings, seen = BuildSettings(), []
    build = builder.build

    def looked(*given: Any) -> builder.Made:
        seen.append(list(gpu.live["context"].values()))
        return build(*given)

    monkeypatch.setattr(builder, "build", looked)
    plans.write(source, tmp_path, settings, plans.here("cuda:1", settings))
    assert seen == [[1]] * 4
    assert gpu.left() == {}


def test_only_onnx_that_tensorrt_reads_is_built(trt: Fake, source: Bundle) -> None:
    path = built(source)
    plain = (source.path / "expert0.onnx").read_bytes()
    settings = BuildSettings()
    with pytest.raises(EngineMismatchError, match="has parts in plan; plans are built of ONNX"):
        plans.write(reader.read(path), path, settings, plans.here("cuda", settings))
    for zero, refused in ((np.uint8(128), True), (np.int8(0), False)):
        model = onnx.load(source.path / "expert0.onnx")
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(zero), "zero"))
        made = onnx.helper.make_node("QuantizeLinear", ["logits", "255", "zero"], ["rounded"])
        model.graph.node.append(made)
        onnx.save(model, source.path / "expert0.onnx")
        rounded = replace(source.parts["expert0"], precision={"asked": "int8", "found": "int8"})
        bundle = replace(source, parts={**source.parts, "expert0": rounded})
        if refused:
            why = r"expert0\.onnx is int8 of the form u8s8.*export again with --int8-form s8s8"
            with pytest.raises(EngineMismatchError, match=why):
                plans.check(bundle)
        else:
            plans.check(bundle)
        source.path.joinpath("expert0.onnx").write_bytes(plain)


def test_layers_that_are_not_as_asked_do_not_pass(
    trt: Fake, source: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = {"expert0": replace(source.parts["expert0"], layers={"fp16": 18, "fp32": 2})}
    settings = BuildSettings()
    at = plans.here("auto", settings)
    layer = {"LayerType": "CaskConvolution", "Weights": {"Type": "Half", "Count": 9}}
    other = {**layer, "Weights": {"Type": "Float", "Count": 9}}
    for halves, *ok in ((20, True, False), (18, True, True), (16, False, True), (0, False, True)):
        trt.layers = json.dumps({"Layers": [layer] * halves + [other] * (20 - halves)})
        _, gates = plans.write(replace(source, parts=parts), tmp_path, settings, at)
        assert [(gate.name, gate.ok) for gate in gates] == [("precision", one) for one in ok]
    few = proof.gates("router", {"int8": 1, "fp32": 39}, {"fp32": 40})
    assert [gate.refusal() for gate in few if not gate.ok] == [
        "int8 layers of router.plan is 0 %, must be at least 0.1 %"
    ]
    with caplog.at_level(logging.WARNING, "vmoe.export"):
        plans.write(source, tmp_path, settings, at)
    assert "router.onnx: the bundle does not say what its layers compute in" in caplog.text
    trt.layers = json.dumps({"Layers": ["names", "alone"]})
    _, gates = plans.write(replace(source, parts=parts), tmp_path, settings, at)
    assert gates[0].refusal() == "fp16 layers of expert0.plan is 0 %, must be at least 85 %"


@pytest.mark.parametrize(
    ("layer", "precision"),
    [
        ({"LayerType": "CaskConvolution", "Weights": {"Type": "Int8", "Count": 9}}, "int8"),
        ({"LayerType": "x", "Weights": {"Type": "BFloat16", "Count": 9}}, "bf16"),
        ({"LayerType": "CaskConvolution", "Weights": {"Type": "", "Count": 9},
          "Inputs": [{"Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}]},
         "fp16"),
        ({"LayerType": "gemm", "Inputs": [{"Datatype": "FP8"}]}, "fp8"),
        ({"LayerType": "MatrixMultiply",
          "Inputs": [{"Format/Datatype": "N/A due to dynamic shapes"}]}, "unknown"),
        ({"LayerType": "Reformat", "Inputs": [{"Format/Datatype": "Float"}]}, None),
        ({"LayerType": "kgen", "Inputs": []}, None),
    ],
)  # fmt: skip
def test_a_layers_precision_is_read_as_the_inspector_says_it(
    layer: dict[str, Any], precision: str | None
) -> None:
    assert proof.layers({"Layers": [layer]}) == ({} if precision is None else {precision: 1})
