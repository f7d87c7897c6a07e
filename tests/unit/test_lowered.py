"""What some lowerings promise beside what all do: the plugin's two files, dense's selection."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper

from tests.graphs import Writer, clips_for, mean_of, run
from tests.twins import SPEC, lively, random_clips
from vmoe import bundle as bundles
from vmoe import checkpoint
from vmoe.checkpoint import Checkpoint
from vmoe.errors import CorruptBundleError, GateError, SettingError
from vmoe.export import export, graphs, precision, routed
from vmoe.export.lowerings import _routed, dense, if_, plugin
from vmoe.export.onnx import Parts
from vmoe.export.pipeline import ExportSettings, Plan, write
from vmoe.runtime import load

LABELS = ("a", "b", "c")
EXPERTS = 3


def parts(seed: int = 0, classes: int = 512) -> Parts:
    """Return a router that takes the brightest colour, and experts of enough weights to map."""
    rng = np.random.default_rng(seed)
    experts = [mean_of("logits", rng.standard_normal((3, classes))) for _ in range(EXPERTS)]
    return Parts(mean_of("scores", np.eye(3)), experts)


def session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bundle of the lowering plugin."""
    path = tmp_path_factory.mktemp("plugin")
    labels = tuple(f"label{i}" for i in range(512))
    held = Checkpoint(lively(EXPERTS, 512), labels)
    write(Plan(held, None, "t", ExportSettings(lowering="plugin")), parts(), path)
    return path


def nodes_of(model: ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.domain == "vmoe"]


def said(node: onnx.NodeProto) -> dict[str, object]:
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


NAMED = {"plugin_namespace": b"vmoe", "plugin_version": b"1"}


def test_onnx_runtimes_file_has_one_node_and_tensorrts_has_layers(folder: Path) -> None:
    whole = onnx.load(folder / "moe.onnx")
    routed = onnx.load(folder / "moe-tensorrt.onnx")
    (node,) = nodes_of(whole)
    assert node.op_type.startswith("Experts_")
    assert said(node) == {**NAMED, "experts": EXPERTS}
    assert list(node.output) == ["logits"]
    topk, linear = nodes_of(routed)
    assert (topk.op_type, linear.op_type) == ("VmoeTopK", "RoutedLinear")
    assert said(topk) == {**NAMED, "k": 1}
    assert said(linear) == {**NAMED, "relu": 0}
    for model, file in ((whole, "moe.onnx"), (routed, "moe-tensorrt.onnx")):
        assert ("vmoe", 1) in {(o.domain, o.version) for o in model.opset_import}
        onnx.checker.check_model(folder / file, full_check=True)


def test_the_function_holds_the_weights_inside_its_branches_outside_of_the_file(
    folder: Path,
) -> None:
    model = onnx.load(folder / "moe.onnx", load_external_data=False)
    (function,) = model.functions
    assert (function.domain, function.name) == ("vmoe", nodes_of(model)[0].op_type)
    assert set(function.attribute) == {"plugin_namespace", "plugin_version", "experts"}
    assert list(nodes_of(model)[0].input) == list(function.input) == ["clip", "expert"]
    held = [t for scope in graphs.scopes(model) for t in scope.initializer if "fc" in t.name]
    names = sorted(t.name for t in held[1:])
    assert names == [f"expert{i}/module.1.fc.weight" for i in range(EXPERTS)]
    assert all(t.data_location == TensorProto.EXTERNAL for t in held[1:])
    assert (folder / "moe.onnx").stat().st_size < 3 * 512 * 4 * EXPERTS


def test_tensorrts_file_has_no_function_and_stacked_weights(folder: Path) -> None:
    model = onnx.load(folder / "moe-tensorrt.onnx")
    assert not model.functions
    *_, linear = nodes_of(model)
    weight = "experts/module.1.fc.weight"
    assert list(linear.input) == ["experts/mean", "expert", weight, f"{weight}/no_bias"]
    held = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    wanted = [
        numpy_helper.to_array(next(t for t in e.graph.initializer if "fc" in t.name)).T
        for e in parts().experts
    ]
    assert np.array_equal(held[weight], np.stack(wanted))
    assert held["experts/white"].shape == (), "what is alike in all experts stands there once"
    with pytest.raises(Exception, match="is not a registered function/op"):
        session(folder / "moe-tensorrt.onnx")


def in_memory(model: ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def two_of(write: Callable[[Writer], str]) -> list[ModelProto]:
    """Return two experts of one graph with weights of their own."""
    writers = [Writer(4, 12, seed) for seed in (0, 1)]
    return [writer.model(write(writer)) for writer in writers]


def router_for(experts: list[ModelProto]) -> ModelProto:
    router = mean_of("scores", np.eye(3)[:, :2])
    router.graph.input[0].CopyFrom(experts[0].graph.input[0])
    return router


def one_layer(writer: Writer) -> str:
    x = writer.conv(writer.pixels(), 3, 4, (3, 3, 3), pads=[1] * 6, bias=True)
    return writer.head(writer.node("Relu", x), 4)


def test_a_relu_goes_into_the_layer_before_it_where_nothing_else_reads_it() -> None:
    def block(writer: Writer) -> str:
        x = writer.conv(writer.pixels(), 3, 4, (3, 3, 3), pads=[1] * 6)
        y = writer.node("Relu", writer.conv(x, 4, 4, (1, 1, 1)))
        y = writer.node("Relu", writer.node("Add", x, y))
        z = writer.conv(y, 4, 4, (1, 3, 3))
        return writer.head(writer.node("Add", z, writer.node("Relu", z)), 4)

    experts = two_of(block)
    nodes, _ = _routed.merged(experts)
    convs = [node for node in nodes if node.op_type == "RoutedConv3d"]
    assert [said(node)["relu"] for node in convs] == [0, 1, 0]
    assert sum(node.op_type == "Relu" for node in nodes) == 2
    model = plugin.with_functions(plugin.routed(router_for(experts), experts), 2)
    clips = clips_for(experts[0], 3)
    for i, expert in enumerate(experts):
        given = {"clip": clips, "force_route": np.array(i)}
        (logits,) = in_memory(model).run(["logits"], given)
        assert np.allclose(logits, run(expert, clips), atol=1e-5)


def test_half_experts_are_routed_in_half_precision() -> None:
    def low(writer: Writer) -> str:
        x = writer.node("Cast", writer.pixels(), to=TensorProto.FLOAT16)
        weight = writer.constant(writer.rng.normal(0, 0.1, (4, 3, 3, 3, 3)), np.float16)
        x = writer.node("Conv", x, weight, kernel_shape=[3, 3, 3])
        return writer.head(writer.node("Cast", x, to=TensorProto.FLOAT), 4)

    experts = two_of(low)
    model = plugin.routed(router_for(experts), experts)
    conv = nodes_of(model)[1]
    kinds = {t.name: t.data_type for t in model.graph.initializer}
    assert [kinds[name] for name in conv.input[2:]] == [TensorProto.FLOAT16] * 2
    for expert in experts:  # ... and what the kernels have no numbers of is refused
        for tensor in expert.graph.initializer:
            if tensor.data_type == TensorProto.FLOAT16:
                tensor.CopyFrom(
                    numpy_helper.from_array(
                        numpy_helper.to_array(tensor).astype(np.float64), tensor.name
                    )
                )
    with pytest.raises(SettingError, match="no routed layers in float64"):
        _routed.merged(experts)


def test_routed_layers_are_proven_as_layers() -> None:
    experts = two_of(one_layer)
    model = plugin.routed(router_for(experts), experts)
    assert precision.prove(model, "moe-tensorrt", ExportSettings()).found == {"fp32": 3}


def test_the_manifest_lists_it_apart_and_no_backend_loads_it(folder: Path) -> None:
    read = bundles.read(folder)
    assert list(read.parts) == ["moe"]
    assert list(read.others) == ["tensorrt"]
    assert read.others["tensorrt"].file == "moe-tensorrt.onnx"
    clips = random_clips(5)
    with load(folder, "onnxruntime", threads=1) as engine:
        got = engine.infer(clips)
    mean = clips.mean(axis=(1, 2, 3)) / 255
    assert list(got.route) == list(mean.argmax(axis=1))
    assert len(set(got.route)) > 1
    path = folder / "moe-tensorrt.onnx"
    before = path.read_bytes()
    path.write_bytes(before[:-1] + b"!")
    try:
        with pytest.raises(CorruptBundleError, match=r"moe-tensorrt.onnx has changed since export"):
            bundles.read(folder)
    finally:
        path.write_bytes(before)


def test_two_models_never_share_an_operator() -> None:
    names = [plugin.op_type(parts(seed).experts) for seed in (0, 0, 1)]
    assert names[0] == names[1] != names[2]


def test_the_file_for_tensorrt_is_judged_at_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(Checkpoint(lively(2, 3), LABELS), tmp_path / "twin.safetensors")
    right = plugin.others

    def wrong(*parts: Any) -> dict[str, ModelProto]:
        """Give every clip the next expert's weights."""
        made = right(*parts)
        weights = {n.input[2] for n in nodes_of(made["tensorrt"]) if len(n.input) > 2}
        for tensor in made["tensorrt"].graph.initializer:
            if tensor.name in weights:
                turned = np.roll(numpy_helper.to_array(tensor), 1, axis=0)
                tensor.CopyFrom(numpy_helper.from_array(turned, tensor.name))
        return made

    monkeypatch.setattr(plugin, "others", wrong)
    asked = ExportSettings(
        lowering="plugin", optimize="none", gate_sparsity=1e3, robust_clips=0, verify_clips=16
    )
    with pytest.raises(GateError, match=r"max \|d logits\| in the file for TensorRT is"):
        export(tmp_path / "twin.safetensors", tmp_path / "x", asked)
    said = json.loads((tmp_path / "x.rejected" / "report.json").read_text())["gates"]
    ok = {gate["what"]: gate["ok"] for gate in said if routed.SHOWN in gate["what"]}
    assert list(ok.values()) == [False, True, False, True]  # scores and routes are as they should
    assert all(gate["ok"] for gate in said if routed.SHOWN not in gate["what"])


def test_experts_that_no_kernel_routes_have_no_second_file(
    caplog: pytest.LogCaptureFixture,
) -> None:
    router, experts = parts()
    other = mean_of("logits", np.zeros((3, 7)))
    with caplog.at_level("WARNING", logger="vmoe"):
        assert plugin.others(router, [experts[0], other]) == {}
    assert "no file for TensorRT: --lowering plugin stacks the experts' weights" in caplog.text
    assert plugin.others(None, experts[:1]) == {}


def test_what_the_kernels_do_not_do_is_refused_by_name() -> None:
    def refused(says: str, change: Callable[[GraphProto], None], *, both: bool = True) -> None:
        made = two_of(one_layer)
        for model in made if both else made[1:]:
            change(model.graph)
        with pytest.raises(SettingError, match=says):
            _routed.merged(made)

    def attribute(op: str, name: str, value: object) -> Callable[[GraphProto], None]:
        def change(graph: GraphProto) -> None:
            node = next(node for node in graph.node if node.op_type == op)
            kept = [a for a in node.attribute if a.name != name]
            del node.attribute[:]
            node.attribute.extend([*kept, helper.make_attribute(name, value)])

        return change

    def renamed(op: str, to: str) -> Callable[[GraphProto], None]:
        def change(graph: GraphProto) -> None:
            next(node for node in graph.node if node.op_type == op).op_type = to

        return change

    uneven = "no routed convolution with groups, dilations or uneven pads, and the experts differ"
    refused(uneven, attribute("Conv", "pads", [1, 1, 1, 0, 1, 1]))
    refused(uneven, attribute("Conv", "dilations", [1, 2, 2]))
    refused("no routed Gemm of that form", attribute("Gemm", "alpha", 0.5))
    refused("no routed ConvTranspose", renamed("Conv", "ConvTranspose"))
    refused("expert 1 has another than expert 0", renamed("Relu", "Sigmoid"), both=False)


def test_rows_that_are_not_the_clips_are_refused() -> None:
    def flat(writer: Writer) -> str:
        x = writer.conv(writer.pixels(), 3, 4, (3, 3, 3), pads=[1] * 6)
        x = writer.node("Reshape", x, writer.constant([1, -1], np.int64))
        weight = writer.constant(writer.rng.normal(0, 1, (4, 2 * 4 * 4 * 144)))
        return writer.node("Gemm", x, weight, transB=1)

    experts = two_of(flat)
    with pytest.raises(SettingError, match="no routed layer whose rows are not those of the clips"):
        _routed.merged(experts)


def test_dense_selects_and_lets_nothing_of_other_experts_through(tmp_path: Path) -> None:
    router, experts = parts(classes=4)
    experts[1] = mean_of("logits", np.full((3, 4), np.nan))
    lowered = {
        "dense": dense.lower(router, experts)["moe"],
        "if": if_.lower(router, experts)["moe"],
        "plugin": plugin.lower(router, experts)["moe"],
    }
    clips = random_clips(12, seed=4)
    found = {}
    for name, model in lowered.items():
        onnx.save(model, tmp_path / f"{name}.onnx")
        found[name] = session(tmp_path / f"{name}.onnx").run(None, {"clip": clips})
    route = found["if"][2]
    assert set(route) == {0, 1, 2}
    for logits, scores, chosen in found.values():
        assert np.array_equal(chosen, route)
        assert np.array_equal(np.isnan(logits).all(axis=1), route == 1)
        assert np.array_equal(scores, found["if"][1])
        assert np.allclose(logits[route != 1], found["if"][0][route != 1], atol=1e-6)


def test_its_file_runs_where_vmoe_is_not_installed(folder: Path) -> None:
    code = (
        "import sys; sys.modules['vmoe'] = None\n"
        "import numpy as np, onnxruntime as ort\n"
        f"s = ort.InferenceSession({str(folder / 'moe.onnx')!r}, "
        "providers=['CPUExecutionProvider'])\n"
        f"out = s.run(None, {{'clip': np.full((2, *{SPEC.shape}), 9, np.uint8)}})\n"
        "print([list(o.shape) for o in out])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[[2, 512], [2, 3], [2]]", done.stderr
